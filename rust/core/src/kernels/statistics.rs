//! All statistics in one read: Σ|x|, Σx², max|x|, the count and the special values.
//!
//! As the single kernels, whose parts these are: every figure has the bits that its own kernel would give. The elements pass in pieces that
//! stay in the first-level cache, each piece once through the sums and once through the integer part. NaN and infinities are counted apart
//! only where there are some.

use super::sum::{LANES, Terms, add_terms, fold};
use super::{Abs, Block, Count, Counts, Kernel, MaxAbs, SumSquares, Term};
use crate::dtype::Element;
use crate::moments::{Merge, Moments, Squares};
use crate::simd::Simd;

/// Everything that [`Moments`] holds.
#[derive(Clone, Copy)]
pub struct Statistics {
    /// Measure as if NaN and infinities were 0. They are counted all the same.
    pub finite_only: bool,
}

/// |x| and x².
#[derive(Clone, Copy)]
struct Both;

impl Terms<2> for Both {
    #[inline(always)]
    fn all(self, x: f64) -> [f64; 2] {
        [Abs.of(x), x * x]
    }
}

/// Elements of a piece.
const PIECE: usize = 1024;

/// The state of [`Statistics`].
#[derive(Clone, Copy)]
pub struct State<E: Element> {
    sums: [[f64; LANES]; 2],
    largest: E::Bits,
    zeros: u32,
    count: usize,
}

impl Kernel for Statistics {
    type Total = Moments;
    type State<E: Element> = State<E>;

    #[inline(always)]
    fn start<E: Element>(self) -> State<E> {
        State { sums: [[0.0; LANES]; 2], largest: MaxAbs.start::<E>(), zeros: 0, count: 0 }
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, simd: S, state: &mut State<E>, elements: &[E]) {
        for piece in elements.chunks(PIECE) {
            add_terms(simd, Both, &mut state.sums, piece);
            (state.largest, state.zeros) = piece.iter().fold((state.largest, state.zeros), |(largest, zeros), x| {
                let bits = x.abs_bits();
                (largest.max(bits), zeros + u32::from(bits == E::Bits::default()))
            });
        }
        state.count += elements.len();
    }

    #[inline(always)]
    fn finish<E: Element>(self, state: State<E>) -> Moments {
        let [abs, squares] = state.sums;
        Moments {
            count: state.count as u64,
            zeros: u64::from(state.zeros),
            sum_abs: fold(abs),
            squares: Squares { medium: fold(squares), ..Squares::EMPTY },
            largest: MaxAbs.finish::<E>(state.largest),
            ..Moments::EMPTY
        }
    }

    fn block<E: Element>(self, block: &Block<'_, E>) -> Moments {
        let mut moments = block.pass(self);
        if !moments.largest.0.is_finite() {
            let Counts { nans, infs, .. } = block.pass(Count);
            if self.finite_only {
                return Moments { nans, infs, ..self.block(&block.finite()) };
            }
            (moments.nans, moments.infs) = (nans, infs);
        }
        if !E::EXACT_SQUARES {
            moments.squares = SumSquares.rescaled(moments.squares, block);
        }
        moments
    }
}
