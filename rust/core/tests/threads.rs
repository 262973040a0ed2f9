//! Several callers at the same time, pools that grow, and forked processes.

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use normclip_core::kernels::{Map, Scale};
use normclip_core::{BLOCK, Dtype, Element, Isa, apply, norm};

use common::random::{Magnitudes, Random};
use common::tensor::Tensor;
use common::{alone, team, teams, to_read, to_write};

const PATIENCE: Duration = Duration::from_secs(30);

/// Large enough for helpers to join.
fn large(seed: u64) -> Tensor {
    Tensor::dense(Dtype::F64, 200_000, 0).filled(Magnitudes::ORDINARY, &mut Random(seed))
}

#[test]
fn callers_do_not_disturb_each_other() {
    thread::scope(|scope| {
        for caller in 0..8u64 {
            scope.spawn(move || {
                let tensor = large(caller);
                let list = to_write([&tensor]);
                let expected = norm(&list, 2.0, alone());
                for round in 0..6 {
                    let team = team(1 + (caller as usize + round) % 8, alone().isa);
                    assert_eq!(norm(&list, 2.0, team), expected);
                    // Doubling and halving are exact.
                    for (coefficient, factor) in [(2.0, 2.0), (0.5, 1.0)] {
                        // SAFETY: the tensor is this thread's own.
                        assert_eq!(unsafe { apply(&list, Scale { coefficient }, team) }, [0]);
                        assert_eq!(norm(&list, 2.0, team), factor * expected);
                    }
                }
            });
        }
    });
}

#[test]
fn callers_may_read_the_same() {
    let tensor = large(1);
    let list = &to_read([&tensor]);
    let expected = norm(list, 3.0, alone());
    thread::scope(|scope| {
        let read = |team| scope.spawn(move || (0..5).for_each(|_| assert_eq!(norm(list, 3.0, team), expected)));
        let callers: Vec<_> = teams().into_iter().map(read).collect();
        // ThreadSanitizer sees that a thread is joined, but not the end of a scope.
        callers.into_iter().for_each(|caller| caller.join().unwrap());
    });
}

/// Work that no thread finishes before all have begun.
#[derive(Clone, Copy)]
struct Meeting {
    /// The value of [`BEGUN`] when all threads have begun.
    complete: usize,
}

/// The threads that have begun. One test uses it at a time; a forked process has its own.
static BEGUN: AtomicUsize = AtomicUsize::new(0);

impl Map for Meeting {
    /// Whether a thread has not begun.
    fn apply<E: Element>(self, _isa: Isa, _elements: &mut [E]) -> bool {
        let start = Instant::now();
        BEGUN.fetch_add(1, Ordering::SeqCst);
        while BEGUN.load(Ordering::SeqCst) < self.complete && start.elapsed() < PATIENCE {
            thread::yield_now();
        }
        start.elapsed() >= PATIENCE
    }
}

/// Fails unless so many threads work at the same time.
fn all_join(threads: usize) {
    // One mebibyte for each thread, so that all are asked to help.
    let tensor = Tensor::dense(Dtype::F64, 2 * threads * BLOCK, 0);
    let meeting = Meeting { complete: BEGUN.load(Ordering::SeqCst) + threads };
    // SAFETY: the tensor is this thread's own, and nothing is changed.
    let missed = unsafe { apply(&to_write([&tensor]), meeting, team(threads, alone().isa)) };
    assert_eq!(missed, [], "{threads} threads have not met");
}

#[test]
fn the_number_of_threads_may_change() {
    let tensor = large(2);
    let list = to_read([&tensor]);
    let expected = norm(&list, 2.0, alone());
    for threads in [3, 8, 2, 9, 3] {
        all_join(threads);
        assert_eq!(norm(&list, 2.0, team(threads, alone().isa)), expected);
    }
}

/// Forks a process. The standard library only starts processes that run another program.
#[cfg(unix)]
mod forked {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    unsafe extern "C" {
        fn fork() -> i32;
        fn waitpid(child: i32, status: *mut i32, options: i32) -> i32;
        fn kill(child: i32, signal: i32) -> i32;
        fn _exit(status: i32) -> !;
    }

    const DO_NOT_WAIT: i32 = 1;
    const KILL: i32 = 9;

    /// Runs the task in a child; panics if it fails there or does not end.
    fn in_child(task: impl FnOnce()) {
        // SAFETY: the child does what a forked child of a program with threads may do at its own risk, and shall with this crate: allocate, start
        // threads, compute. It leaves by `_exit`, so nothing of the parent's is cleaned up twice.
        let child = unsafe { fork() };
        assert!(child >= 0);
        if child == 0 {
            let outcome = catch_unwind(AssertUnwindSafe(task));
            // SAFETY: ends the child at once.
            unsafe { _exit(i32::from(outcome.is_err())) };
        }
        let (mut status, start) = (0, Instant::now());
        // SAFETY: waits for our own child, with a place for its status.
        while unsafe { waitpid(child, &raw mut status, DO_NOT_WAIT) } == 0 {
            if start.elapsed() > 2 * PATIENCE {
                // SAFETY: our own child, which has not been waited for.
                unsafe { kill(child, KILL) };
                // SAFETY: as above.
                unsafe { waitpid(child, &raw mut status, 0) };
                panic!("the child hangs");
            }
            thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(status, 0, "the child failed");
    }

    /// Measures and changes with helpers.
    fn compute(tensor: &Tensor, expected: f64) {
        let list = to_write([tensor]);
        for threads in [3, 8] {
            let team = team(threads, alone().isa);
            assert_eq!(norm(&list, 2.0, team), expected);
            // SAFETY: the tensor is used by this thread alone; a child has a copy.
            unsafe { apply(&list, Scale { coefficient: -1.0 }, team) };
            assert_eq!(norm(&list, 1.0, team), norm(&list, 1.0, alone()));
        }
    }

    #[test]
    fn a_child_computes_as_its_parent_did() {
        let tensor = large(3);
        let expected = norm(&to_read([&tensor]), 2.0, alone());
        compute(&tensor, expected);
        // A process forked by a forked process, which has a pool of its own by then.
        in_child(|| {
            compute(&tensor, expected);
            all_join(4);
            in_child(|| {
                compute(&tensor, expected);
                all_join(2);
            });
        });
        compute(&tensor, expected);
    }

    #[test]
    fn children_may_come_while_helpers_work() {
        let done = AtomicBool::new(false);
        let tensor = large(4);
        let expected = norm(&to_read([&tensor]), 2.0, alone());
        thread::scope(|scope| {
            for caller in 5..8 {
                let done = &done;
                scope.spawn(move || {
                    let tensor = large(caller);
                    let list = to_read([&tensor]);
                    let mut threads = (2..5).cycle();
                    while !done.load(Ordering::Relaxed) {
                        norm(&list, 2.0, team(threads.next().unwrap(), alone().isa));
                    }
                });
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| (0..10).for_each(|_| in_child(|| compute(&tensor, expected)))));
            // The scope waits for its threads, so these have to learn of a failure as well.
            done.store(true, Ordering::Relaxed);
            outcome.unwrap();
        });
    }
}
