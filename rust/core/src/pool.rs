//! Threads: a job is claimed piece by piece, so that who claims more does more, and results do not depend on who it was.
//!
//! The calling thread always works. Others that work with it come from a [`Lender`], or are helpers of this module's own pool, which join
//! when they wake. The caller waits for helpers that have joined, and not for those that wake too late: where another program keeps a core
//! busy, it does more of the work itself. However a job ends, by a panic too, no thread works on it after [`run`] has returned, so the work
//! may borrow from the caller's stack.

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

/// How long a thread stays awake for what it waits for before it sleeps: longer than the tens of microseconds that lie between calls in a
/// row, which waking up would take again.
const AWAKE: Duration = Duration::from_micros(200);

/// Lends threads of another library: calls the function on up to so many threads at once, of which the calling thread is one, and returns
/// when every call has returned. The function does not unwind, and may be called any number of times.
pub type Lender = fn(NonZero<usize>, &(dyn Fn() + Sync));

/// Does `work(0..pieces)`, each once, on up to so many threads, those of the lender if there is one; the calling thread looks at the watch
/// after each of its pieces. If a piece or the watch unwinds, no more pieces are claimed, and this unwinds with the same payload.
pub(crate) fn run(threads: NonZero<usize>, lender: Option<Lender>, watch: &mut Watch, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
    let job = Job {
        work,
        pieces,
        claimed: AtomicUsize::new(0),
        helping: AtomicUsize::new(0),
        caller: thread::current(),
        panic: Mutex::new(None),
    };
    let helpers = threads.get().min(pieces).saturating_sub(1);
    let shared = match lender {
        _ if helpers == 0 => None,
        Some(lend) => {
            job.do_on_lent(lend, helpers, watch);
            None
        }
        None => Some(Shared::new(pool(), &job, helpers)),
    };
    // Without helpers (none wanted, or the system refuses to start threads) the caller does it all; after a lender, what was left undone.
    job.take_part(watch);
    drop(shared);
    if let Some(panic) = locked(&job.panic).take() {
        resume_unwind(panic);
    }
}

/// A function to be called about ten times a second, and when it was last called. All runs of one reading have one watch, as each may be
/// shorter than the time between two calls.
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

/// A job, on the stack of its caller.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    pieces: usize,
    /// The number of pieces claimed so far, which is the next piece.
    claimed: AtomicUsize,
    /// The number of helpers that hold a reference to the job. It grows under the pool's lock, while the job is listed.
    helping: AtomicUsize,
    caller: Thread,
    /// The first panic of a piece.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Claims pieces and does them until none is left. Does not unwind.
    fn take_part(&self, watch: &mut Watch) {
        let _strict = StrictFloats::enter();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
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

    /// Does pieces until none is left, on threads of the lender.
    fn do_on_lent(&self, lend: Lender, helpers: usize, watch: &mut Watch) {
        let watch = Mutex::new(watch);
        lend(NonZero::<usize>::MIN.saturating_add(helpers), &|| {
            if thread::current().id() == self.caller.id() {
                self.take_part(&mut locked(&watch));
            } else {
                self.take_part(&mut Watch::new(None));
            }
        });
    }
}

/// A job while helpers may find it. When this is dropped, no helper has a reference to it.
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
        // The last pieces rarely take long, so wait awake before sleeping.
        let alone = || self.job.helping.load(Ordering::Acquire) == 0;
        if !spin_until(alone) {
            while !alone() {
                thread::park();
            }
        }
    }
}

/// A job in the pool's list, and the number of helpers that it still wants.
struct Listed {
    job: *const Job<'static>,
    wanted: usize,
}

// SAFETY: a job may be used by several threads: its work is Sync and the rest are atomics and locks. It is alive while it is listed, and
// `Shared` keeps it alive while a helper has it.
unsafe impl Send for Listed {}

/// The helpers of a process, and the jobs for them.
struct Pool {
    process: u32,
    state: Mutex<State>,
    wake: Condvar,
    /// The number of times that the state was unlocked. It says nothing that the lock does not, but ThreadSanitizer sees it: see `lock`.
    turns: AtomicUsize,
    /// The number of jobs that were ever listed: waiting helpers read it without the lock.
    news: AtomicUsize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Listed>,
    /// The number of threads started: as many as the job with most helpers has wanted.
    helpers: usize,
}

impl Pool {
    fn list(&'static self, listed: Listed) {
        let wanted = listed.wanted;
        let mut state = self.lock();
        while state.helpers < wanted {
            let started = thread::Builder::new().name(format!("normclip-{}", state.helpers)).spawn(|| self.help());
            if started.is_err() {
                break;
            }
            state.helpers += 1;
        }
        state.jobs.push_back(listed);
        self.news.fetch_add(1, Ordering::Release);
        self.unlock(state);
        (0..wanted).for_each(|_| self.wake.notify_one());
    }

    fn unlist(&self, job: *const Job<'static>) {
        let mut state = self.lock();
        state.jobs.retain(|listed| listed.job != job);
        self.unlock(state);
    }

    /// The state, locked. Where a thread has to wait for that, it is the standard library that takes the lock, which is not built for
    /// ThreadSanitizer. So that this still sees which thread comes after which, each counts a turn when it unlocks, and reads it here.
    fn lock(&self) -> MutexGuard<'_, State> {
        let state = locked(&self.state);
        self.turns.load(Ordering::Acquire);
        state
    }

    fn unlock(&self, state: MutexGuard<'_, State>) {
        self.turns.fetch_add(1, Ordering::Release);
        drop(state);
    }

    /// Unlocks the state until a job is listed, or for no reason.
    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.turns.fetch_add(1, Ordering::Release);
        let state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        self.turns.load(Ordering::Acquire);
        state
    }

    /// What a helper does from start to end of the process: takes part in jobs, and waits for more.
    fn help(&self) {
        let mut state = self.lock();
        loop {
            if let Some(listed) = state.jobs.front_mut() {
                // SAFETY: a listed job is alive, and the lock keeps it listed. Once `helping` counts this helper, the caller waits for it.
                let job = unsafe { &*listed.job };
                job.helping.fetch_add(1, Ordering::Relaxed);
                listed.wanted -= 1;
                if listed.wanted == 0 {
                    state.jobs.pop_front();
                }
                self.unlock(state);
                job.take_part(&mut Watch::new(None));
                // The job may be gone as soon as `helping` is 0, so the caller is cloned first.
                let caller = job.caller.clone();
                if job.helping.fetch_sub(1, Ordering::Release) == 1 {
                    caller.unpark();
                }
                state = self.lock();
            } else {
                let seen = self.news.load(Ordering::Acquire);
                self.unlock(state);
                spin_until(|| self.news.load(Ordering::Acquire) != seen);
                state = self.lock();
                if state.jobs.is_empty() && self.news.load(Ordering::Acquire) == seen {
                    state = self.wait(state);
                }
            }
        }
    }
}

/// The pool of this process. A forked child inherits the memory of its parent's pool but none of its threads, so it makes its own.
fn pool() -> &'static Pool {
    static CURRENT: AtomicPtr<Pool> = AtomicPtr::new(ptr::null_mut());
    let process = std::process::id();
    // No locks, as a fork may come while another thread holds one, which then stays locked in the child. For the same reason the child does
    // not touch the parent's pool: it is leaked, once for each fork.
    loop {
        let seen = CURRENT.load(Ordering::Acquire);
        // SAFETY: pointers that are not null come from `Box::into_raw` below, and what was stored in CURRENT is not freed.
        if let Some(pool) = unsafe { seen.as_ref() }
            && pool.process == process
        {
            return pool;
        }
        let pool = Pool { process, state: Mutex::default(), wake: Condvar::new(), turns: AtomicUsize::new(0), news: AtomicUsize::new(0) };
        let fresh = Box::into_raw(Box::new(pool));
        if CURRENT.compare_exchange(seen, fresh, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `fresh` was made above and nobody else has seen it.
            drop(unsafe { Box::from_raw(fresh) });
        }
    }
}

/// Whether `done` became true while this thread stayed awake for it.
fn spin_until(done: impl Fn() -> bool) -> bool {
    /// Between two looks at the clock: about a microsecond.
    const SPINS: usize = 50;
    let start = Instant::now();
    let spin = || {
        std::hint::spin_loop();
        done()
    };
    loop {
        if (0..SPINS).any(|_| spin()) {
            return true;
        }
        if start.elapsed() >= AWAKE {
            return false;
        }
    }
}

/// The guarded value, also after a panic of another thread: no code that could panic halfway through a change runs under these locks.
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
            run(NonZero::new(threads).unwrap(), None, &mut Watch::new(None), 20, &|_| ());
        }
        assert!(locked(&pool().state).helpers < most);
    }
}
