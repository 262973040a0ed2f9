//! What the tests share: tensors that own their memory, and an oracle that shares no code with the crate but its types.
#![allow(dead_code, reason = "each test file is a crate and takes what it needs")]

pub(crate) mod oracle;
pub(crate) mod random;
pub(crate) mod tensor;

use std::num::NonZero;
use std::thread;

use normclip_core::{Dtype, Isa, Team, Tensors, WritableTensors};
use proptest::prelude::ProptestConfig;

use tensor::Tensor;

pub(crate) const DTYPES: [Dtype; 6] = [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F64, Dtype::C64, Dtype::C128];

/// Orders of all kinds: those with a kernel of their own, small, large, fractional and negative ones.
pub(crate) const ORDERS: [f64; 14] = [2.0, 1.0, f64::INFINITY, f64::NEG_INFINITY, 0.0, 3.0, 4.0, 0.5, 2.5, -1.0, -2.0, 10.0, 100.0, 1000.0];

pub(crate) fn team(threads: usize, isa: Isa) -> Team {
    Team { threads: NonZero::new(threads).unwrap(), isa, lender: None, watch: None }
}

/// Every instruction set with 1 thread, 2, an odd number, and more threads than there are cores; and with threads that are lent.
pub(crate) fn teams() -> Vec<Team> {
    let helped = |isa| [1, 2, 3, 8].map(|threads| team(threads, isa));
    Isa::available().into_iter().flat_map(|isa| helped(isa).into_iter().chain([lent(3, isa)])).collect()
}

/// A team with threads that are lent by something else than this crate.
pub(crate) fn lent(threads: usize, isa: Isa) -> Team {
    let lend = |threads: NonZero<usize>, work: &(dyn Fn() + Sync)| {
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads.get()).map(|_| scope.spawn(work)).collect();
            work();
            // ThreadSanitizer sees that a thread is joined, but not the end of a scope.
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    };
    Team { lender: Some(lend), ..team(threads, isa) }
}

/// The calling thread alone, with the fastest instruction set.
pub(crate) fn alone() -> Team {
    team(1, *Isa::available().last().unwrap())
}

/// The tensors as a list to read.
pub(crate) fn to_read<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Tensors {
    Tensors::new(tensors.into_iter().map(Tensor::view).collect())
}

/// The tensors as a list to write.
pub(crate) fn to_write<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> WritableTensors {
    WritableTensors::new(tensors.into_iter().map(Tensor::view).collect()).unwrap()
}

/// This many cases, unless `PROPTEST_CASES` says otherwise. Nothing is written into the source tree: a failure prints its input.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { ProptestConfig { cases, ..config } }
}
