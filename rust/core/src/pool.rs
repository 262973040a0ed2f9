//! Threads: a job is claimed piece by piece.
//!
//! The calling thread always works, and helpers join it when they wake. It waits for those that have joined, and not for helpers that wake
//! too late: where another library's threads keep a core busy, the caller does more of the work itself. However a job ends, by a panic
//! too, no thread works on it after [`run`] has returned, so the work may borrow from the caller's stack.

use std::any::Any;
use std::collections::VecDeque;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::strict::StrictFloats;

/// The time between two calls of a watch.
const WATCH: Duration = Duration::from_millis(100);

/// How often a thread checks what it waits for before it sleeps: for some tens of microseconds, about the time that waking up takes.
const SPINS: usize = 2000;

/// Does `work(0..pieces)`, each once, on up to so many threads; the calling thread calls `watch` now and then. If a piece or the watch
/// unwinds, no more pieces are claimed, and this unwinds with the same payload.
pub(crate) fn run(threads: NonZero<usize>, watch: Option<fn()>, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
    let job = Job {
        work,
        pieces,
        claimed: AtomicUsize::new(0),
        helping: AtomicUsize::new(0),
        caller: thread::current(),
        panic: Mutex::new(None),
    };
    let helpers = threads.get().min(pieces).saturating_sub(1);
    // Without helpers (none wanted, or the system refuses to start threads) the caller does it all.
    let shared = (helpers > 0).then(|| Shared::new(pool(), &job, helpers));
    job.take_part(watch);
    drop(shared);
    if let Some(panic) = locked(&job.panic).take() {
        resume_unwind(panic);
    }
}

/// A function to be called about ten times a second.
pub(crate) struct Watch(Option<(fn(), Instant)>);

impl Watch {
    pub(crate) fn new(watch: Option<fn()>) -> Self {
        Self(watch.map(|watch| (watch, Instant::now())))
    }

    /// Calls the function if it is time to.
    pub(crate) fn look(&mut self) {
        if let Some((watch, since)) = &mut self.0
            && since.elapsed() >= WATCH
        {
            watch();
            *since = Instant::now();
        }
    }
}

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
            let mut watch = Watch::new(watch);
            loop {
                let piece = self.claimed.fetch_add(1, Ordering::Relaxed);
                if piece >= self.pieces {
                    return;
                }
                (self.work)(piece);
                watch.look();
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
    use super::*;

    #[test]
    fn helpers_are_as_many_as_were_wanted_at_once() {
        let most = 12;
        for threads in (1..=most).chain([3, 7, 2, most]).cycle().take(100) {
            run(NonZero::new(threads).unwrap(), None, 20, &|_| ());
        }
        assert!(locked(&pool().state).helpers < most);
    }
}
