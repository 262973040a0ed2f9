//! The kernels: one file an algorithm, each written once for all element types and instruction sets.
//!
//! A reducing [`Kernel`] says how elements are added to its state and what total the state gives; sums of floats go through [`sum`], which has a fixed
//! number of lanes and a fixed fold, so that their bits do not depend on the width of the CPU's vectors. Strides, blocks and threads are dealt with elsewhere.
//! A [`Map`] changes elements one by one and has nothing to keep in order.

mod clamp;
mod count;
mod extremes;
mod power;
mod scale;
mod squares;
pub(crate) mod sum;

pub use clamp::Clamp;
pub use count::{Count, Counts};
pub use extremes::{MaxAbs, MinAbs};
pub use power::{Integer, PowerSum, Real, SumPowers};
pub use scale::Scale;
pub use squares::SumSquares;
pub use sum::{Abs, SumOf, Term};

use crate::dtype::Element;
use crate::isa::{Isa, Op};
use crate::moments::Merge;

/// A computation over a block of elements that yields a mergeable total.
pub trait Kernel: Copy + Send + Sync + 'static {
    /// What a block yields.
    type Total: Merge;

    /// What is kept while a block is read.
    type State<E: Element>: Copy;

    /// Whether the kernel wants the parts of complex numbers (else their absolute values).
    const READS_PARTS: bool = false;

    /// The state before the first element.
    fn start<E: Element>(self) -> Self::State<E>;

    /// Adds elements; their number is a multiple of [`sum::LANES`] but for the last of a block. Must be `#[inline(always)]`.
    fn add<E: Element>(self, state: &mut Self::State<E>, elements: &[E]);

    /// The total of all that was added.
    fn finish<E: Element>(self, state: Self::State<E>) -> Self::Total;

    /// The total of a block. A kernel may look at what a pass gave and decide on another; the block is in cache then.
    fn block<E: Element>(self, block: &Block<'_, E>) -> Self::Total {
        block.pass(self)
    }
}

/// A computation that changes a block of elements in place, each by itself.
pub trait Map: Copy + Send + Sync + 'static {
    /// Changes the elements; false if there was nothing to change.
    fn apply<E: Element>(self, isa: Isa, elements: &mut [E]) -> bool;
}

/// The elements of a block, ready to be read any number of times.
pub struct Block<'a, E> {
    isa: Isa,
    elements: Elements<'a, E>,
}

enum Elements<'a, E> {
    Slice(&'a [E]),
    /// Fills a buffer with the elements from this position on.
    Gather {
        len: usize,
        fill: Box<dyn Fn(usize, &mut [E]) + 'a>,
    },
}

/// Gathered elements pass through a buffer of this many, a multiple of [`sum::LANES`].
pub(crate) const GATHER: usize = 1024;

impl<'a, E: Element> Block<'a, E> {
    /// A block in contiguous, aligned memory.
    pub fn slice(isa: Isa, elements: &'a [E]) -> Self {
        Self { isa, elements: Elements::Slice(elements) }
    }

    /// A block whose elements `fill(position, buffer)` brings together.
    pub(crate) fn gather(isa: Isa, len: usize, fill: impl Fn(usize, &mut [E]) + 'a) -> Self {
        Self { isa, elements: Elements::Gather { len, fill: Box::new(fill) } }
    }

    /// Reads the block once.
    pub(crate) fn pass<K: Kernel>(&self, kernel: K) -> K::Total {
        let mut state = kernel.start();
        match &self.elements {
            Elements::Slice(elements) => self.isa.run(Add { kernel, state: &mut state, elements }),
            Elements::Gather { len, fill } => {
                let mut buffer = [E::default(); GATHER];
                for position in (0..*len).step_by(GATHER) {
                    let part = &mut buffer[..GATHER.min(len - position)];
                    fill(position, part);
                    self.isa.run(Add { kernel, state: &mut state, elements: part });
                }
            }
        }
        kernel.finish::<E>(state)
    }
}

struct Add<'a, K: Kernel, E: Element> {
    kernel: K,
    state: &'a mut K::State<E>,
    elements: &'a [E],
}

impl<K: Kernel, E: Element> Op for Add<'_, K, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.kernel.add(self.state, self.elements);
    }
}
