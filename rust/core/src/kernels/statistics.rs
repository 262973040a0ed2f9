//! All statistics in one read: Σ|x|, Σx², max|x|, the count and the special values.
//!
//! Input f16, bf16, f32, f64 → the accumulators of the single kernels → [`Moments`]. Every figure has the bits, and the error bound, of its own
//! kernel. Further passes over the block are made only where it has NaN or infinities, which are then counted, and where some |x| is so
//! large that Σ|x| could overflow, which is then taken in another unit. An empty block gives zeros.

use std::hint::black_box;
use std::ops::Add;

use super::squares::Square;
use super::sum::{LANES, Lanes};
use super::{Abs, Count, Counts, Elements, Kernel, MaxAbs, SumOf, SumSquares, Term};
use crate::dtype::Element;
use crate::moments::{Merge, Moments, Squares};
use crate::simd::{Simd, fetch_ahead};

/// Everything that [`Moments`] holds.
#[derive(Clone, Copy)]
pub struct Statistics {
    /// Measure as if NaN and infinities were 0. They are counted all the same.
    pub finite_only: bool,
}

/// The state of [`Statistics`].
#[derive(Clone, Copy)]
pub struct State<E: Element> {
    abs: Lanes,
    squares: Lanes,
    largest: E::Bits,
    nonzeros: u64,
    count: u64,
}

impl Kernel for Statistics {
    type Total = Moments;
    type State<E: Element> = State<E>;

    #[inline(always)]
    fn start<E: Element>(self) -> State<E> {
        State { abs: Lanes::EMPTY, squares: Lanes::EMPTY, largest: MaxAbs.start::<E>(), nonzeros: 0, count: 0 }
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, simd: S, state: &mut State<E>, elements: &[E]) {
        state.count += elements.len() as u64;
        let (rows, tail) = elements.as_chunks::<LANES>();
        for group in rows.chunks(E::ROWS) {
            if S::ROOMY {
                add_at_once(simd, state, group);
            } else {
                add_in_turn(simd, state, group.as_flattened());
            }
        }
        if !tail.is_empty() {
            add_in_turn(simd, state, tail);
        }
    }

    #[inline(always)]
    fn finish<E: Element>(self, state: State<E>) -> Moments {
        let State { abs, squares, largest, nonzeros, count } = state;
        Moments {
            count,
            zeros: count - nonzeros,
            sum_abs: abs.fold(),
            squares: Squares { medium: squares.fold(), ..Squares::EMPTY },
            largest: MaxAbs.finish::<E>(largest),
            ..Moments::EMPTY
        }
    }

    fn block<E: Element>(self, elements: &Elements<'_, E>) -> Moments {
        let mut moments = elements.pass(self);
        if !moments.largest.0.is_finite() {
            let Counts { nans, infs, .. } = elements.pass(Count);
            if self.finite_only {
                return Moments { nans, infs, ..self.block(&elements.finite()) };
            }
            (moments.nans, moments.infs) = (nans, infs);
        }
        if !E::EXACT_SQUARES {
            moments.squares = SumSquares.rescaled(moments.squares, elements);
            let unit = moments.largest.unit();
            if unit != 1.0 {
                moments.sum_abs = elements.pass(SumOf(Scaled(1.0 / unit)));
            }
        }
        moments
    }
}

/// |x| times a power of two.
#[derive(Clone, Copy)]
struct Scaled(f64);

impl Term for Scaled {
    #[inline(always)]
    fn of(self, x: f64) -> f64 {
        x * self.0
    }
}

/// All figures in one loop, for CPUs with enough registers.
#[inline(always)]
fn add_at_once<E: Element, S: Simd>(simd: S, state: &mut State<E>, group: &[[E; LANES]]) {
    let (mut abs, mut squares) = ([0.0; LANES], [0.0; LANES]);
    // Counters have the width of the elements, so that a register holds as many of both.
    let (mut largest, mut nonzeros) = ([state.largest; LANES], [E::Bits::default(); LANES]);
    // min(|x|'s bits, 1) is one instruction. If the compiler knew the 1, it would make a comparison of it, which takes two.
    let one = black_box(E::Bits::from(true));
    for row in group {
        fetch_ahead(row);
        let row = E::magnitudes(*row);
        let wide = E::widen(simd, row);
        for i in 0..LANES {
            largest[i] = largest[i].max(row[i].abs_bits());
            nonzeros[i] = nonzeros[i] + row[i].abs_bits().min(one);
            abs[i] = Abs.add_to::<E, S>(simd, abs[i], wide[i]);
            squares[i] = Square.add_to::<E, S>(simd, squares[i], wide[i]);
        }
    }
    // See `SumOf` for the reason.
    (abs, squares) = black_box((abs, squares));
    (largest, nonzeros) = black_box((largest, nonzeros));
    state.abs.put(&abs);
    state.squares.put(&squares);
    state.largest = largest.into_iter().fold(state.largest, Ord::max);
    state.nonzeros += nonzeros.into_iter().fold(E::Bits::default(), Add::add).into();
}

/// One figure after the other. The first pass leaves the elements in cache for the others.
#[inline(always)]
fn add_in_turn<E: Element, S: Simd>(simd: S, state: &mut State<E>, elements: &[E]) {
    SumOf(Abs).add(simd, &mut state.abs, elements);
    SumSquares.add(simd, &mut state.squares, elements);
    MaxAbs.add(simd, &mut state.largest, elements);
    let zero = E::Bits::default();
    state.nonzeros += elements.iter().fold(zero, |nonzeros, x| nonzeros + E::Bits::from(x.abs_bits() != zero)).into();
}
