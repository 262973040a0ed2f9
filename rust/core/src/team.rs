//! How many threads compute, and on which instruction set.

use std::num::NonZero;

use crate::error::room;
use crate::isa::Isa;
use crate::pool::{Lender, Watch, run};
use crate::strict::StrictFloats;

/// How many threads compute, and on which instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Team {
    /// The calling thread and its helpers, at least 1.
    pub threads: NonZero<usize>,
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// Whose threads help; helpers of this crate's own if nobody's.
    pub lender: Option<Lender>,
    /// Called on the calling thread about ten times a second while it reads. To give up, it unwinds by `resume_unwind`, which reaches the
    /// caller when no helper works any more. Work that writes does not call it, so that no tensor is left half-changed.
    pub watch: Option<fn()>,
}

/// The bytes of work for each helper that make up for waking it.
const SHARE: usize = 1 << 20;

/// The bytes of work that make up for asking a lender, whose threads come all at once.
const LENT: usize = 1 << 19;

impl Team {
    /// The same with no more threads than are worth waking for so many bytes, and without a watch where they are read before it is called.
    #[must_use]
    pub(crate) fn for_bytes(self, bytes: usize) -> Self {
        let worth = match self.lender {
            None => 1 + bytes / SHARE,
            Some(_) if bytes < LENT => 1,
            Some(_) => usize::MAX,
        };
        let threads = self.threads.min(NonZero::new(worth).unwrap_or(NonZero::<usize>::MIN));
        Self { threads, watch: self.watch.filter(|_| bytes >= SHARE), ..self }
    }

    /// Whether the calling thread has no helpers, so that [`Team::alone`] may do the work.
    pub(crate) fn is_alone(self) -> bool {
        self.threads.get() == 1
    }

    /// The watch of one reading, from its start to its end.
    pub(crate) fn watch(self) -> Watch {
        Watch::new(self.watch)
    }

    /// Does `work(0..pieces)` on the calling thread.
    pub(crate) fn alone(pieces: usize, watch: &mut Watch, mut work: impl FnMut(usize)) {
        let _strict = StrictFloats::enter();
        for piece in 0..pieces {
            work(piece);
            watch.look();
        }
    }

    /// Does `work(0..pieces)`, each once and not to be given up halfway. Pieces are claimed in order.
    pub(crate) fn run(self, pieces: usize, work: impl Fn(usize) + Sync) {
        self.run_watched(pieces, &mut Watch::new(None), work);
    }

    fn run_watched(self, pieces: usize, watch: &mut Watch, work: impl Fn(usize) + Sync) {
        if self.is_alone() { Self::alone(pieces, watch, work) } else { run(self.threads, self.lender, watch, pieces, &work) }
    }

    /// The results of `work(0..pieces)`, in order. Pieces are claimed in order.
    pub(crate) fn map<T: Send>(self, pieces: usize, watch: &mut Watch, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut results = room(pieces);
        results.resize_with(pieces, || None);
        let slots = Slots(results.as_mut_ptr());
        self.run_watched(pieces, watch, |piece| {
            let result = work(piece);
            // SAFETY: `piece` is below `pieces`, so the slot exists. The piece is claimed by one thread, and nobody else uses its slot until
            // `run` has returned.
            unsafe { *slots.get(piece) = Some(result) };
        });
        results.into_iter().flatten().collect()
    }
}

/// Where results go. Each slot is used by one thread.
struct Slots<T>(*mut Option<T>);

impl<T> Slots<T> {
    fn get(&self, index: usize) -> *mut Option<T> {
        self.0.wrapping_add(index)
    }
}

// SAFETY: each slot is used by one thread at a time, and T may be moved between threads.
unsafe impl<T: Send> Sync for Slots<T> {}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread::{self, ThreadId};
    use std::time::Duration;

    use super::*;

    fn team(threads: usize) -> Team {
        Team { threads: NonZero::new(threads).unwrap(), isa: Isa::BASELINE, lender: None, watch: None }
    }

    /// Lends threads that it starts for the occasion.
    fn lend(threads: NonZero<usize>, work: &(dyn Fn() + Sync)) {
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads.get()).map(|_| scope.spawn(work)).collect();
            work();
            // ThreadSanitizer sees that a thread is joined, but not the end of a scope.
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    }

    /// With helpers, and with threads that are lent.
    fn teams(threads: usize) -> [Team; 2] {
        [team(threads), Team { lender: Some(lend), ..team(threads) }]
    }

    fn unwatched() -> Watch {
        Watch::new(None)
    }

    #[test]
    fn results_come_in_order_and_each_piece_is_done_once() {
        for team in (1..6).flat_map(teams) {
            for pieces in (0..20).chain([1000]) {
                let done: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                let results = team.map(pieces, &mut unwatched(), |piece| {
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
        for (outer, inner) in teams(3).into_iter().flat_map(|outer| teams(4).map(|inner| (outer, inner))) {
            let sums =
                outer.map(8, &mut unwatched(), |piece| inner.map(5, &mut unwatched(), |inner| piece * inner).into_iter().sum::<usize>());
            assert!(sums.into_iter().eq((0..8).map(|piece| 10 * piece)));
        }
    }

    #[test]
    fn an_old_wake_up_call_is_no_result() {
        let slow = |piece| {
            thread::sleep(Duration::from_millis(20));
            piece
        };
        for _ in 0..5 {
            thread::current().unpark();
            assert_eq!(team(2).map(2, &mut unwatched(), slow), [0, 1]);
        }
    }

    #[test]
    fn callers_share_helpers_through_thousands_of_tiny_jobs() {
        thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..3000 {
                        assert_eq!(
                            team(2 + caller % 3).map(4, &mut unwatched(), |piece| piece + round),
                            [round, round + 1, round + 2, round + 3]
                        );
                    }
                });
            }
        });
    }

    #[test]
    fn nobody_works_when_a_panic_reaches_the_caller() {
        for team in [1, 4].into_iter().flat_map(teams) {
            for faulty in [0, 1, 50, 99] {
                let working = AtomicUsize::new(0);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    team.map(100, &mut unwatched(), |piece| {
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
        assert_eq!(team(4).map(3, &mut unwatched(), |piece| piece), [0, 1, 2], "helpers go on");
    }

    #[test]
    fn a_fault_of_a_helper_alone_reaches_the_caller() {
        let caller = thread::current().id();
        for team in teams(2) {
            let faulty = AtomicBool::new(false);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.map(2, &mut unwatched(), |_| {
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
    }

    #[test]
    fn reading_is_given_up_and_writing_is_not() {
        for team in teams(2) {
            let given_up = Team { watch: Some(|| resume_unwind(Box::new("enough"))), ..team };
            let done = AtomicUsize::new(0);
            let work = |_| {
                done.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(5));
            };
            for pieces in [100_000, 2] {
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    let mut watch = given_up.watch();
                    (0..200_000).step_by(pieces).for_each(|_| given_up.map(pieces, &mut watch, work).clear());
                }));
                assert_eq!(outcome.unwrap_err().downcast_ref(), Some(&"enough"));
                assert!(done.swap(0, Ordering::Relaxed) < 200_000);
            }
            given_up.run(100, work);
            assert_eq!(done.into_inner(), 100);
        }
    }

    #[test]
    fn only_the_caller_looks_at_the_watch() {
        static CALLER: Mutex<Option<ThreadId>> = Mutex::new(None);
        *CALLER.lock().unwrap() = Some(thread::current().id());
        for team in teams(3) {
            let watched = Team { watch: Some(|| assert_eq!(Some(thread::current().id()), *CALLER.lock().unwrap())), ..team };
            watched.map(200, &mut watched.watch(), |_| thread::sleep(Duration::from_millis(3)));
        }
    }

    #[test]
    fn all_is_done_however_little_is_lent() {
        let lenders: [Lender; 4] = [
            |_, _| (),
            |_, work| work(),
            |_, work| (0..3).for_each(|_| work()),
            |_, work| thread::scope(|scope| scope.spawn(work).join().unwrap()),
        ];
        for lender in lenders {
            let team = Team { lender: Some(lender), ..team(3) };
            assert!(team.map(50, &mut unwatched(), |piece| piece).into_iter().eq(0..50));
        }
    }

    #[test]
    fn no_more_threads_are_asked_for_than_there_is_work() {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let team = Team { lender: Some(|threads, _| ASKED.store(threads.get(), Ordering::Relaxed)), ..team(5) };
        for (pieces, asked) in [(1, 0), (3, 3), (100, 5)] {
            ASKED.store(0, Ordering::Relaxed);
            team.run(pieces, |_| ());
            assert_eq!(ASKED.load(Ordering::Relaxed), asked);
        }
    }

    #[test]
    fn teams_are_no_larger_than_the_work() {
        assert_eq!(team(1000).for_bytes(SHARE - 1).threads.get(), 1);
        assert_eq!(team(1000).for_bytes(20 * SHARE).threads.get(), 21);
        assert_eq!(team(3).for_bytes(20 * SHARE).threads.get(), 3);
        let [_, lent] = teams(1000);
        assert_eq!(lent.for_bytes(LENT - 1).threads.get(), 1);
        assert_eq!(lent.for_bytes(LENT).threads.get(), 1000);
    }
}
