//! Σ of a term of each element.
//!
//! Input f16, bf16, f32, f64, widened → f64 lanes, carried into pairs of f64 every few rows → a [`Sum`] a block. NaN and infinity pass
//! through; an empty block gives 0.
//! Error bound: 32 or, for f64, 8 terms of a lane and four lanes are added plainly, and all after that is exact but for some 2⁻¹⁰⁰. So for
//! terms that are not negative the sum is within 33 · 2⁻⁵³ ≈ 3.7e-15 relative of the sum of the terms, 1.1e-15 for f64, at any size; rounding
//! errors that do not conspire leave 1e-16. Sums of few elements, which take no carry, have three roundings more for the tree.

use std::array;
use std::hint::black_box;

use super::Kernel;
use crate::dtype::Element;
use crate::moments::{Sum, two_sum};
use crate::simd::{Simd, fetch_ahead};

/// The number of accumulators. Element i of a block goes to lane i modulo this, so that the result does not depend on the width of registers.
pub(crate) const LANES: usize = 32;

/// A function of an element, to be summed.
pub trait Term: Copy + Send + Sync + 'static {
    /// Whether `of` gives x and −x the same term, so that it may be called without taking the absolute value.
    const EVEN: bool = false;

    /// The term of an element whose absolute value is x; of any element x if the term is even. Must be `#[inline(always)]`.
    fn of(self, x: f64) -> f64;

    /// The sum plus the term of x, which was widened from E. Must be `#[inline(always)]`.
    #[inline(always)]
    fn add_to<E: Element, S: Simd>(self, _simd: S, sum: f64, x: f64) -> f64 {
        sum + self.of(x)
    }
}

/// The lanes that are left when the sums of a group of rows are folded.
const WIDTH: usize = 8;

/// The state of a sum: f64 lanes for the last group of rows, pairs of f64 for all before it.
#[derive(Clone, Copy)]
pub struct Lanes {
    /// The folded sums of the last group of rows.
    fresh: [f64; WIDTH],
    /// The sums of all groups before it: `high + low`, unevaluated.
    high: [f64; WIDTH],
    low: [f64; WIDTH],
    groups: usize,
}

impl Lanes {
    pub(super) const EMPTY: Self = Self { fresh: [0.0; WIDTH], high: [0.0; WIDTH], low: [0.0; WIDTH], groups: 0 };

    /// Adds the sums of a group of rows, folded to [`WIDTH`] in a fixed tree.
    #[inline(always)]
    pub(super) fn put(&mut self, group: &[f64; LANES]) {
        if self.groups > 0 {
            self.carry();
        }
        self.fresh = array::from_fn(|i| (group[i] + group[i + 2 * WIDTH]) + (group[i + WIDTH] + group[i + 3 * WIDTH]));
        self.groups += 1;
    }

    /// Adds the last group to the pairs, without rounding error but in `low`.
    #[inline(always)]
    fn carry(&mut self) {
        for i in 0..WIDTH {
            let (high, error) = two_sum(self.high[i], self.fresh[i]);
            self.high[i] = high;
            self.low[i] += error;
        }
    }

    /// Adds up the lanes in a fixed tree: the upper half onto the lower half, until one is left.
    #[inline(always)]
    pub(super) fn fold(mut self) -> Sum {
        if self.groups <= 1 {
            // A small block: it has few roundings, so that plain sums keep the error bound.
            halve(&mut self.fresh, 4);
            halve(&mut self.fresh, 2);
            return Sum::of(self.fresh[0] + self.fresh[1]);
        }
        self.carry();
        let Self { mut high, mut low, .. } = self;
        for width in [4, 2, 1] {
            for i in 0..width {
                let (sum, error) = two_sum(high[i], high[i + width]);
                (high[i], low[i]) = (sum, low[i] + low[i + width] + error);
            }
        }
        Sum::new(high[0], low[0])
    }
}

/// Adds the second half of the first `2 * width` lanes onto the first.
#[inline(always)]
fn halve(lanes: &mut [f64], width: usize) {
    for i in 0..width {
        lanes[i] += lanes[i + width];
    }
}

/// The sum of a term.
#[derive(Clone, Copy)]
pub struct SumOf<T>(pub T);

impl<T: Term> Kernel for SumOf<T> {
    type Total = Sum;
    type State<E: Element> = Lanes;

    #[inline(always)]
    fn start<E: Element>(self) -> Lanes {
        Lanes::EMPTY
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, simd: S, lanes: &mut Lanes, elements: &[E]) {
        let Self(term) = self;
        let (rows, tail) = elements.as_chunks::<LANES>();
        for group in rows.chunks(E::ROWS) {
            let mut sums = [0.0; LANES];
            for row in group {
                fetch_ahead(row);
                let row = *row;
                let row = if T::EVEN { row } else { E::magnitudes(row) };
                for (sum, x) in sums.iter_mut().zip(E::widen(simd, row)) {
                    *sum = term.add_to::<E, S>(simd, *sum, x);
                }
            }
            // `black_box` forces the lanes into memory, which makes the compiler vectorize the loop above over all of them. Without it, it
            // vectorizes by the shape of the fold, with vectors that are far too short.
            lanes.put(&black_box(sums));
        }
        if !tail.is_empty() {
            let mut sums = [0.0; LANES];
            for (sum, x) in sums.iter_mut().zip(tail) {
                *sum = term.of(x.wide().abs());
            }
            lanes.put(&sums);
        }
    }

    #[inline(always)]
    fn finish<E: Element>(self, lanes: Lanes) -> Sum {
        lanes.fold()
    }
}

/// |x|.
#[derive(Clone, Copy)]
pub struct Abs;

impl Term for Abs {
    #[inline(always)]
    fn of(self, x: f64) -> f64 {
        x
    }
}
