//! Threads: a team that claims work piece by piece.
//!
//! The calling thread always works, and helpers from a rayon pool join it when they wake. It waits for pieces that were claimed, never for
//! helpers that were not needed: when another library's threads keep a core busy, the caller just does more of the work itself. The pool
//! belongs to a process id, because a forked child inherits the memory of its parent's pool but none of its threads.

use std::num::NonZero;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::isa::Isa;
use crate::strict::StrictFloats;

/// Who computes: how many threads, on which instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Team {
    /// The caller and its helpers, at least 1.
    pub threads: NonZero<usize>,
    /// The instruction set of the kernels.
    pub isa: Isa,
}

impl Team {
    /// Those who work on so many bytes: the caller by itself where waking a helper would take longer than the work.
    #[must_use]
    pub(crate) fn for_bytes(self, bytes: usize) -> Self {
        if bytes < 1 << 20 { Self { threads: NonZero::<usize>::MIN, ..self } } else { self }
    }

    /// The results of `work(0..pieces)`, in order. Pieces are handed out in order too.
    pub(crate) fn map<T, W>(self, pieces: usize, work: W) -> Vec<T>
    where
        T: Clone + Send + Sync + 'static,
        W: Fn(usize) -> T + Send + Sync + 'static,
    {
        let helpers = self.threads.get().min(pieces).saturating_sub(1);
        // Without helpers (none wanted, or the system refuses to start threads) the caller does it all.
        let Some(pool) = (helpers > 0).then(|| pool(self.threads.get())).flatten() else {
            let _strict = StrictFloats::enter();
            return (0..pieces).map(work).collect();
        };
        let job = Arc::new(Job {
            work,
            results: (0..pieces).map(|_| OnceLock::new()).collect(),
            claimed: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            caller: thread::current(),
        });
        for _ in 0..helpers {
            let job = Arc::clone(&job);
            pool.spawn(move || job.take_part());
        }
        job.take_part();
        job.wait();
        // A helper that wakes late still holds the job, sees that nothing is left, and lets go of it.
        job.results.iter().filter_map(OnceLock::get).cloned().collect()
    }
}

/// Work in progress, shared by those who do it.
struct Job<T, W> {
    work: W,
    results: Box<[OnceLock<T>]>,
    claimed: AtomicUsize,
    finished: AtomicUsize,
    caller: Thread,
}

impl<T, W: Fn(usize) -> T> Job<T, W> {
    /// Claims pieces until none is left.
    fn take_part(&self) {
        let _strict = StrictFloats::enter();
        loop {
            let piece = self.claimed.fetch_add(1, Ordering::Relaxed);
            let Some(slot) = self.results.get(piece) else { return };
            // The piece is ours alone, so the slot is empty.
            let _ = slot.set((self.work)(piece));
            if self.finished.fetch_add(1, Ordering::Release) + 1 == self.results.len() {
                self.caller.unpark();
            }
        }
    }

    /// Waits until all pieces are finished: a moment awake, since the last piece rarely takes longer, then asleep.
    fn wait(&self) {
        let done = || self.finished.load(Ordering::Acquire) == self.results.len();
        for _ in 0..2000 {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        while !done() {
            thread::park();
        }
    }
}

/// The pool of this process, with helpers for at least this many threads.
fn pool(threads: usize) -> Option<&'static ThreadPool> {
    struct Owned {
        process: u32,
        pool: ThreadPool,
    }
    static CURRENT: AtomicPtr<Owned> = AtomicPtr::new(std::ptr::null_mut());
    // Without locks: a fork may come while another thread would hold one. A pool that is replaced is leaked; threads may still be using it,
    // and it happens once a fork or when the number of threads grows.
    loop {
        let seen = CURRENT.load(Ordering::Acquire);
        // SAFETY: non-null pointers come from `Box::leak` below and are never freed.
        if let Some(owned) = unsafe { seen.as_ref() }
            && owned.process == std::process::id()
            && owned.pool.current_num_threads() + 1 >= threads
        {
            return Some(&owned.pool);
        }
        let pool = ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|i| format!("normclip-{i}")).build().ok()?;
        let fresh = Box::into_raw(Box::new(Owned { process: std::process::id(), pool }));
        if CURRENT.compare_exchange(seen, fresh, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `fresh` was made above and nobody else has seen it.
            drop(unsafe { Box::from_raw(fresh) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn team(threads: usize) -> Team {
        Team { threads: NonZero::new(threads).unwrap(), isa: Isa::BASELINE }
    }

    #[test]
    fn results_come_in_order_and_each_piece_is_done_once() {
        for threads in 1..6 {
            for pieces in (0..20).chain([1000]) {
                let done: Arc<Vec<AtomicUsize>> = Arc::new((0..pieces).map(|_| AtomicUsize::new(0)).collect());
                let counts = Arc::clone(&done);
                let results = team(threads).map(pieces, move |piece| {
                    counts[piece].fetch_add(1, Ordering::Relaxed);
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
        let sums = team(3).map(8, |piece| team(4).map(5, move |inner| piece * inner).into_iter().sum::<usize>());
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
    fn a_pool_grows_and_does_not_shrink() {
        assert!(pool(3).unwrap().current_num_threads() >= 2);
        let large = pool(8).unwrap();
        assert!(large.current_num_threads() >= 7);
        assert!(std::ptr::eq(large, pool(2).unwrap()));
    }
}
