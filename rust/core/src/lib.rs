//! Exact, reproducible gradient norms and in-place clipping, over lists of tensors in memory.
//!
//! ```text
//! norm                  one number from totals
//! reduce · dot          lists of tensors → totals; pairs of them → products
//! apply · update        lists of tensors → the same, changed; parameters and gradients → the parameters, one step on
//! pool                  threads that claim pieces          strict   IEEE mode while they work
//! blocks                tensors cut into blocks            overlap  which tensors share memory
//! lattice               sums of multiples: the arithmetic of strides
//! kernels               one file an algorithm, written once
//! memory · view         bytes; pointer, element type, layout
//! moments               totals and their merge
//! isa · dtype · error   instruction sets; element types; what can be wrong
//! simd                  what an instruction set adds to plain Rust
//! ```
//!
//! A file knows those below it. Results have the same bits for every number of threads and every instruction set: blocks, lanes and the
//! order in which totals merge are fixed, and there are no atomics in the arithmetic. The arithmetic is IEEE's, as Rust assumes it: a caller
//! whose thread may be set otherwise comes in through [`strict()`].

mod apply;
mod blocks;
mod dot;
mod dtype;
mod error;
mod isa;
pub mod kernels;
mod lattice;
mod memory;
mod moments;
mod norm;
mod overlap;
mod pool;
mod reduce;
mod simd;
mod strict;
mod team;
mod tensors;
mod update;
mod view;

pub use apply::{apply, apply_each};
pub use blocks::BLOCK;
pub use dot::{Pairs, dot};
pub use dtype::{Bf16, Dtype, Element, F16};
pub use error::{OutOfMemory, Problem, TensorError, room};
pub use isa::{Isa, IsaError, Op};
pub use moments::{Largest, Merge, Moments, Smallest, Squares, Sum, merged};
pub use norm::{hard_coefficient, nonfinite, norm};
pub use overlap::{Repetition, repetitions, writable_repetitions};
pub use reduce::{reduce, reduce_all, reduce_each};
pub use simd::Simd;
pub use strict::strict;
pub use team::Team;
pub use tensors::{Tensors, WritableTensors, check_real};
pub use update::{Parameters, update};
pub use view::View;
