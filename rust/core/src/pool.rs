//! Threads: a team that claims work piece by piece.
//!
//! The calling thread always works, and helpers join it when they wake. It waits for those that have joined, never for helpers that were not
//! needed: when another library's threads keep a core busy, the caller just does more of the work itself. Whatever happens, a panic
//! included, nobody works any more when the call is over, so the work may borrow what it needs.

use std::any::Any;
use std::collections::VecDeque;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::error::room;
use crate::isa::Isa;
use crate::strict::StrictFloats;

/// Who computes: how many threads, on which instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Team {
    /// The caller and its helpers, at least 1.
    pub threads: NonZero<usize>,
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// Called on the calling thread about ten times a second while it reads. It may unwind, by `resume_unwind`, to give up: nobody works any more when that
    /// reaches the caller. Writing is never given up halfway.
    pub watch: Option<fn()>,
}

/// The bytes that make it worth another thread's while.
const SHARE: usize = 1 << 20;

/// How often the caller looks whether to give up.
const WATCH: Duration = Duration::from_millis(100);

/// How often a thread looks for what it waits for before it sleeps: some tens of microseconds, which waking up would take, too.
const SPINS: usize = 2000;

impl Team {
    /// Those who work on so many bytes: each has a share that is worth waking up for.
    #[must_use]
    pub(crate) fn for_bytes(self, bytes: usize) -> Self {
        let most = if bytes < SHARE { 1 } else { 1 + bytes / SHARE };
        Self { threads: NonZero::new(most).map_or(self.threads, |most| most.min(self.threads)), ..self }
    }

    /// The same, with work that is never given up halfway.
    #[must_use]
    pub(crate) fn to_the_end(self) -> Self {
        Self { watch: None, ..self }
    }

    /// The results of `work(0..pieces)`, in order. Pieces are handed out in order too.
    pub(crate) fn map<T: Send>(self, pieces: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut results = room(pieces);
        results.resize_with(pieces, || None);
        let slots = Slots(results.as_mut_ptr());
        self.run(pieces, &|piece| {
            let result = work(piece);
            // SAFETY: `piece` is below `pieces`, so the slot exists. It is claimed by one thread, which alone touches it until `run` is over.
            unsafe { *slots.get(piece) = Some(result) };
        });
        results.into_iter().flatten().collect()
    }

    /// Does `work(0..pieces)`, each once. A panic in any of them ends the others' claims and comes out here.
    fn run(self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        let job = Job {
            work,
            pieces,
            claimed: AtomicUsize::new(0),
            helping: AtomicUsize::new(0),
            caller: thread::current(),
            panic: Mutex::new(None),
        };
        let helpers = self.threads.get().min(pieces).saturating_sub(1);
        // Without helpers (none wanted, or the system refuses to start threads) the caller does it all.
        let shared = (helpers > 0).then(|| Shared::new(pool(), &job, helpers));
        job.take_part(self.watch);
        drop(shared);
        if let Some(panic) = locked(&job.panic).take() {
            resume_unwind(panic);
        }
    }
}

/// Where results go. Each slot is one thread's.
struct Slots<T>(*mut Option<T>);

impl<T> Slots<T> {
    fn get(&self, index: usize) -> *mut Option<T> {
        self.0.wrapping_add(index)
    }
}

// SAFETY: the pointer is to slots that are each used by one thread at a time, and T goes from one thread to another.
unsafe impl<T: Send> Sync for Slots<T> {}

/// Work in progress, on the caller's stack.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    pieces: usize,
    claimed: AtomicUsize,
    /// Helpers that hold a reference. They come to be under the pool's lock while the job is listed there.
    helping: AtomicUsize,
    caller: Thread,
    /// The first one.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Claims pieces until none is left. Does not unwind.
    fn take_part(&self, watch: Option<fn()>) {
        let _strict = StrictFloats::enter();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut watched = watch.map(|watch| (watch, Instant::now()));
            loop {
                let piece = self.claimed.fetch_add(1, Ordering::Relaxed);
                if piece >= self.pieces {
                    return;
                }
                (self.work)(piece);
                if let Some((watch, since)) = &mut watched
                    && since.elapsed() >= WATCH
                {
                    watch();
                    *since = Instant::now();
                }
            }
        }));
        if let Err(panic) = outcome {
            self.claimed.store(self.pieces, Ordering::Relaxed);
            locked(&self.panic).get_or_insert(panic);
        }
    }
}

/// A job that helpers may find. When it is dropped, none of them has it any more.
struct Shared<'a> {
    pool: &'static Pool,
    job: &'a Job<'a>,
}

impl<'a> Shared<'a> {
    fn new(pool: &'static Pool, job: &'a Job<'a>, helpers: usize) -> Self {
        pool.list(Listed { job: ptr::from_ref(job).cast(), wanted: helpers });
        Self { pool, job }
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.pool.unlist(ptr::from_ref(self.job).cast());
        // A moment awake, since the last piece rarely takes longer, then asleep.
        let alone = || self.job.helping.load(Ordering::Acquire) == 0;
        if !spin_until(alone) {
            while !alone() {
                thread::park();
            }
        }
    }
}

/// A job in the pool's list, and how many more helpers it wants.
struct Listed {
    job: *const Job<'static>,
    wanted: usize,
}

// SAFETY: a job may be used by several threads: its work is Sync and the rest are atomics and locks. It is alive while it is listed, and
// `Shared` keeps it alive while a helper has it.
unsafe impl Send for Listed {}

/// The helpers of a process and what they are wanted for.
struct Pool {
    process: u32,
    state: Mutex<State>,
    wake: Condvar,
    /// Jobs listed so far, to look for without the lock.
    news: AtomicUsize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Listed>,
    /// Threads that were started. There are as many as were ever wanted at once by one job.
    helpers: usize,
}

impl Pool {
    fn list(&'static self, listed: Listed) {
        let wanted = listed.wanted;
        let mut state = locked(&self.state);
        while state.helpers < wanted {
            let started = thread::Builder::new().name(format!("normclip-{}", state.helpers)).spawn(|| self.help());
            if started.is_err() {
                break;
            }
            state.helpers += 1;
        }
        state.jobs.push_back(listed);
        self.news.fetch_add(1, Ordering::Release);
        drop(state);
        (0..wanted).for_each(|_| self.wake.notify_one());
    }

    fn unlist(&self, job: *const Job<'static>) {
        locked(&self.state).jobs.retain(|listed| listed.job != job);
    }

    /// A helper's life.
    fn help(&self) {
        let mut state = locked(&self.state);
        loop {
            if let Some(listed) = state.jobs.front_mut() {
                // SAFETY: it is listed, so it is alive; from here on its caller waits for us.
                let job = unsafe { &*listed.job };
                job.helping.fetch_add(1, Ordering::Relaxed);
                listed.wanted -= 1;
                if listed.wanted == 0 {
                    state.jobs.pop_front();
                }
                drop(state);
                job.take_part(None);
                // The job ends with its last helper's last look at it.
                let caller = job.caller.clone();
                if job.helping.fetch_sub(1, Ordering::Release) == 1 {
                    caller.unpark();
                }
                state = locked(&self.state);
            } else {
                let seen = self.news.load(Ordering::Acquire);
                drop(state);
                spin_until(|| self.news.load(Ordering::Acquire) != seen);
                state = locked(&self.state);
                if state.jobs.is_empty() && self.news.load(Ordering::Acquire) == seen {
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// The pool of this process: a forked child inherits the memory of its parent's, but none of its threads.
fn pool() -> &'static Pool {
    static CURRENT: AtomicPtr<Pool> = AtomicPtr::new(ptr::null_mut());
    let process = std::process::id();
    // Without locks: a fork may come while another thread would hold one. So may it while one holds the parent's pool's, which is why the
    // child leaves that alone, once a fork.
    loop {
        let seen = CURRENT.load(Ordering::Acquire);
        // SAFETY: pointers that are not null come from `Box::into_raw` below and are not freed once they are here.
        if let Some(pool) = unsafe { seen.as_ref() }
            && pool.process == process
        {
            return pool;
        }
        let pool = Pool { process, state: Mutex::default(), wake: Condvar::new(), news: AtomicUsize::new(0) };
        let fresh = Box::into_raw(Box::new(pool));
        if CURRENT.compare_exchange(seen, fresh, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `fresh` was made above and nobody else has seen it.
            drop(unsafe { Box::from_raw(fresh) });
        }
    }
}

/// Whether it came true within a moment.
fn spin_until(done: impl Fn() -> bool) -> bool {
    (0..SPINS).any(|_| {
        std::hint::spin_loop();
        done()
    })
}

/// No code that may panic runs under our locks, so what they guard is whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn team(threads: usize) -> Team {
        Team { threads: NonZero::new(threads).unwrap(), isa: Isa::BASELINE, watch: None }
    }

    #[test]
    fn results_come_in_order_and_each_piece_is_done_once() {
        for threads in 1..6 {
            for pieces in (0..20).chain([1000]) {
                let done: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                let results = team(threads).map(pieces, |piece| {
                    done[piece].fetch_add(1, Ordering::Relaxed);
                    // Early pieces end late.
                    thread::sleep(Duration::from_micros(if piece % 7 == 0 { 300 } else { 0 }));
                    piece
                });
                assert!(results.into_iter().eq(0..pieces));
                assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_piece_may_be_work_for_a_team() {
        let sums = team(3).map(8, |piece| team(4).map(5, |inner| piece * inner).into_iter().sum::<usize>());
        assert!(sums.into_iter().eq((0..8).map(|piece| 10 * piece)));
    }

    #[test]
    fn an_old_wake_up_call_is_no_result() {
        let slow = |piece| {
            thread::sleep(Duration::from_millis(20));
            piece
        };
        for _ in 0..5 {
            thread::current().unpark();
            assert_eq!(team(2).map(2, slow), [0, 1]);
        }
    }

    #[test]
    fn callers_share_helpers_through_thousands_of_tiny_jobs() {
        thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..3000 {
                        assert_eq!(team(2 + caller % 3).map(4, |piece| piece + round), [round, round + 1, round + 2, round + 3]);
                    }
                });
            }
        });
    }

    #[test]
    fn nobody_works_when_a_panic_reaches_the_caller() {
        for threads in [1, 4] {
            for faulty in [0, 1, 50, 99] {
                let working = AtomicUsize::new(0);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    team(threads).map(100, |piece| {
                        working.fetch_add(1, Ordering::SeqCst);
                        thread::sleep(Duration::from_micros(200));
                        working.fetch_sub(1, Ordering::SeqCst);
                        assert_ne!(piece, faulty, "a fault");
                    })
                }));
                assert_eq!(working.load(Ordering::SeqCst), 0);
                let panic = outcome.unwrap_err();
                assert!(panic.downcast_ref::<String>().unwrap().contains("a fault"));
            }
        }
        assert_eq!(team(4).map(3, |piece| piece), [0, 1, 2], "helpers go on");
    }

    #[test]
    fn a_fault_of_a_helper_alone_reaches_the_caller() {
        let caller = thread::current().id();
        let faulty = AtomicBool::new(false);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            team(2).map(2, |_| {
                // Each waits until both are at work, so that one of them is a helper.
                while thread::current().id() == caller && !faulty.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                if thread::current().id() != caller {
                    faulty.store(true, Ordering::SeqCst);
                    resume_unwind(Box::new("a helper's fault"));
                }
            })
        }));
        assert_eq!(outcome.unwrap_err().downcast_ref(), Some(&"a helper's fault"));
    }

    #[test]
    fn reading_is_given_up_and_writing_is_not() {
        let given_up = Team { watch: Some(|| resume_unwind(Box::new("enough"))), ..team(2) };
        let done = AtomicUsize::new(0);
        let work = |_| {
            done.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(5));
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| given_up.map(100_000, work)));
        assert_eq!(outcome.unwrap_err().downcast_ref(), Some(&"enough"));
        assert!(done.swap(0, Ordering::Relaxed) < 100_000);
        assert_eq!(given_up.to_the_end().map(100, work).len(), 100);
        assert_eq!(done.into_inner(), 100);
    }

    #[test]
    fn helpers_are_as_many_as_were_wanted_at_once() {
        let most = 12;
        for threads in (1..=most).chain([3, 7, 2, most]).cycle().take(100) {
            team(threads).map(20, |piece| piece);
        }
        assert!(locked(&pool().state).helpers < most);
    }

    #[test]
    fn teams_are_no_larger_than_the_work() {
        assert_eq!(team(1000).for_bytes(SHARE - 1).threads.get(), 1);
        assert_eq!(team(1000).for_bytes(20 * SHARE).threads.get(), 21);
        assert_eq!(team(3).for_bytes(20 * SHARE).threads.get(), 3);
    }
}
