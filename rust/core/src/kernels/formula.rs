//! What the formulas of optimizers have in common: rows of elements, the step, and what it would do.
//!
//! A [`Formula`] says what becomes of one element. Elements are widened exactly to its type, every operation is rounded there, and parameters
//! and states are rounded once when they are stored, to nearest even. NaN and infinity follow IEEE arithmetic; every NaN is stored as the same.
//! Sums are of f64, products of f32 being exact there; they overflow where Σ|u·g| or Σu² does.
//!
//! A step whose learning rate depends on these sums takes two reads. [`Measure`] and then [`Step`] compute everything twice. [`Begin`] and
//! [`Finish`] read and write less, with the same bits: new states do not depend on the learning rate, so the first stores them, and the
//! second needs no gradient. That takes states which are stored with all digits that they were computed with.

use std::hint::black_box;
use std::marker::PhantomData;

use super::sum::{LANES, Lanes};
use crate::dtype::{Element, Float};
use crate::isa::{Isa, Op};
use crate::moments::{Merge, Sum};
use crate::simd::{Simd, fetch_ahead};

/// An optimizer. All its functions must be `#[inline(always)]`, and those of its formulas too.
pub trait Update: Copy + Send + Sync + 'static {
    /// The type in which it is computed for parameters of E.
    type Work<E: Element>: Float;

    /// The numbers of a step, rounded to that type.
    type Factors<W: Float>: Copy;

    /// These numbers.
    fn factors<W: Float>(self) -> Self::Factors<W>;

    /// The element x after a step in direction u.
    fn moved<W: Float>(factors: Self::Factors<W>, x: W, u: W) -> W;

    /// Runs a computation with the formula for so many states.
    fn with<R: Run>(self, states: usize, run: R) -> R::Output;
}

/// The formula of an optimizer for parameters with N states each.
pub trait Formula<const N: usize>: Update {
    /// The new states of an element x with gradient g.
    fn states<W: Float>(factors: Self::Factors<W>, x: W, states: [W; N], g: W) -> [W; N];

    /// The direction u of its step, by its new states.
    fn direction<W: Float>(factors: Self::Factors<W>, x: W, states: [W; N], g: W) -> W;
}

/// A computation by a formula.
pub trait Run {
    /// What it returns.
    type Output;

    /// The computation.
    fn by<const N: usize, F: Formula<N>>(self, formula: F) -> Self::Output;
}

/// A part of a parameter, of its states and of its gradient, all of the same length. States are of the parameter's type, or f32.
pub struct Part<'a, E, T> {
    /// Elements of the parameter.
    pub parameter: &'a mut [E],
    /// The states in the order in which [`Parameters`](crate::Parameters) has them.
    pub states: &'a mut [&'a mut [T]],
    /// The gradient.
    pub gradient: &'a [E],
}

/// What is done with a part by a formula.
pub trait Purpose: Copy + Send + Sync + 'static {
    /// Whether the states are those from before the step, and become new ones.
    const ADVANCES: bool;

    /// Whether new states are stored.
    const STORES: bool;

    /// Whether the parameter moves.
    const MOVES: bool;

    /// Whether the step is measured.
    const MEASURES: bool;

    /// What is done instead where states are stored with fewer digits than they are computed with.
    type Rounded: Purpose;
}

/// Takes the step.
#[derive(Clone, Copy)]
pub struct Step;

impl Purpose for Step {
    const ADVANCES: bool = true;
    const STORES: bool = true;
    const MOVES: bool = true;
    const MEASURES: bool = false;
    type Rounded = Self;
}

/// Measures the step that would be taken.
#[derive(Clone, Copy)]
pub struct Measure;

impl Purpose for Measure {
    const ADVANCES: bool = true;
    const STORES: bool = false;
    const MOVES: bool = false;
    const MEASURES: bool = true;
    type Rounded = Self;
}

/// Measures the step, and stores the new states.
#[derive(Clone, Copy)]
pub struct Begin;

impl Purpose for Begin {
    const ADVANCES: bool = true;
    const STORES: bool = true;
    const MOVES: bool = false;
    const MEASURES: bool = true;
    type Rounded = Measure;
}

/// Takes the rest of a step that was begun.
#[derive(Clone, Copy)]
pub struct Finish;

impl Purpose for Finish {
    const ADVANCES: bool = false;
    const STORES: bool = false;
    const MOVES: bool = true;
    const MEASURES: bool = false;
    type Rounded = Step;
}

/// What a step would do: Σu·g and Σu² for its direction u, before the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Descent {
    /// Σu·g, for the gradient g as it is in memory.
    pub along: Sum,
    /// Σu².
    pub squares: Sum,
}

impl Merge for Descent {
    const EMPTY: Self = Self { along: Sum::EMPTY, squares: Sum::EMPTY };

    fn merge(&mut self, other: &Self) {
        self.along.merge(&other.along);
        self.squares.merge(&other.squares);
    }
}

/// Does with a part what it is for, and returns what was measured, if anything.
pub fn run<P: Purpose, E: Element, T: Element, U: Update>(isa: Isa, update: U, part: Part<'_, E, T>) -> Descent {
    update.with(part.states.len(), Running::<P, E, T> { isa, part, purpose: PhantomData })
}

struct Running<'a, P, E, T> {
    isa: Isa,
    part: Part<'a, E, T>,
    purpose: PhantomData<P>,
}

impl<P: Purpose, E: Element, T: Element> Run for Running<'_, P, E, T> {
    type Output = Descent;

    fn by<const N: usize, F: Formula<N>>(self, formula: F) -> Descent {
        let Self { isa, part, .. } = self;
        let rows = Rows::<E, T, F, N>::of(formula, part);
        // States of as many bits as what computes them keep all digits.
        if N == 0 || size_of::<T>() == size_of::<F::Work<E>>() {
            isa.run(RunRows::<P, E, T, F, N> { rows, purpose: PhantomData })
        } else {
            isa.run(RunRows::<P::Rounded, E, T, F, N> { rows, purpose: PhantomData })
        }
    }
}

/// A part in rows of 32. What is left of the last row is computed in a row of its own.
struct Rows<'a, E, T, F, const N: usize> {
    formula: F,
    xs: &'a mut [[E; LANES]],
    x_tail: &'a mut [E],
    states: [(&'a mut [[T; LANES]], &'a mut [T]); N],
    gs: &'a [[E; LANES]],
    g_tail: &'a [E],
}

impl<'a, E: Element, T: Element, F: Formula<N>, const N: usize> Rows<'a, E, T, F, N> {
    fn of(formula: F, part: Part<'a, E, T>) -> Self {
        assert_eq!(part.states.len(), N, "states of a parameter");
        let mut states = part.states.iter_mut();
        let (xs, x_tail) = part.parameter.as_chunks_mut();
        let (gs, g_tail) = part.gradient.as_chunks();
        let states = std::array::from_fn(|_| states.next().map(|state| state.as_chunks_mut()).unwrap_or_default());
        Self { formula, xs, x_tail, states, gs, g_tail }
    }

    /// Has the CPU fetch what will soon be read for this purpose.
    #[inline(always)]
    fn fetch_ahead<P: Purpose>(&self, row: usize) {
        if P::MOVES {
            fetch_ahead(&self.xs[row]);
        }
        for (rows, _) in &self.states {
            fetch_ahead(&rows[row]);
        }
        if P::ADVANCES {
            fetch_ahead(&self.gs[row]);
        }
    }

    /// The last elements, filled up with zeros.
    #[inline(always)]
    fn last(&self) -> ([E; LANES], [[T; LANES]; N], [E; LANES]) {
        (padded(self.x_tail), self.states.each_ref().map(|(_, tail)| padded(tail)), padded(self.g_tail))
    }
}

#[inline(always)]
fn padded<E: Element>(tail: &[E]) -> [E; LANES] {
    let mut row = [E::default(); LANES];
    row[..tail.len()].copy_from_slice(tail);
    row
}

struct RunRows<'a, P, E, T, F, const N: usize> {
    rows: Rows<'a, E, T, F, N>,
    purpose: PhantomData<P>,
}

impl<P: Purpose, E: Element, T: Element, F: Formula<N>, const N: usize> Op for RunRows<'_, P, E, T, F, N> {
    type Output = Descent;

    #[inline(always)]
    fn call<S: Simd>(self, simd: S) -> Descent {
        let Self { mut rows, .. } = self;
        let factors = rows.formula.factors();
        let mut lanes = [Lanes::EMPTY; 2];
        for begin in (0..rows.xs.len()).step_by(E::ROWS) {
            let mut sums = [[0.0; LANES]; 2];
            for i in begin..(begin + E::ROWS).min(rows.xs.len()) {
                rows.fetch_ahead::<P>(i);
                let states = rows.states.each_mut().map(|(rows, _)| &mut rows[i]);
                run_row::<P, E, T, F, S, N>(simd, factors, &mut rows.xs[i], states, &rows.gs[i], &mut sums);
            }
            if P::MEASURES {
                // See `SumOf` for the reason.
                let sums = black_box(sums);
                lanes[0].put(&sums[0]);
                lanes[1].put(&sums[1]);
            }
        }
        if !rows.x_tail.is_empty() {
            let (mut x, mut states, g) = rows.last();
            let mut sums = [[0.0; LANES]; 2];
            run_row::<P, E, T, F, S, N>(simd, factors, &mut x, states.each_mut(), &g, &mut sums);
            if P::MEASURES {
                for (lanes, sums) in lanes.iter_mut().zip(&mut sums) {
                    sums[rows.x_tail.len()..].fill(0.0); // what zeros would give, which may be NaN
                    lanes.put(sums);
                }
            }
            if P::MOVES {
                rows.x_tail.copy_from_slice(&x[..rows.x_tail.len()]);
            }
            if P::STORES {
                for ((_, tail), state) in rows.states.iter_mut().zip(&states) {
                    tail.copy_from_slice(&state[..tail.len()]);
                }
            }
        }
        let [along, squares] = lanes.map(Lanes::fold);
        Descent { along, squares }
    }
}

#[inline(always)]
fn run_row<P: Purpose, E: Element, T: Element, F: Formula<N>, S: Simd, const N: usize>(
    simd: S,
    factors: F::Factors<F::Work<E>>,
    parameters: &mut [E; LANES],
    states: [&mut [T; LANES]; N],
    gradients: &[E; LANES],
    sums: &mut [[f64; LANES]; 2],
) {
    let mut xs = E::load::<F::Work<E>, S>(simd, *parameters);
    let gs = E::load::<F::Work<E>, S>(simd, *gradients);
    let mut wide = states.each_ref().map(|state| T::load::<F::Work<E>, S>(simd, **state));
    for i in 0..LANES {
        let (x, g) = (xs[i], gs[i]);
        let mut its = wide.each_ref().map(|row| row[i]);
        if P::ADVANCES {
            its = F::states(factors, x, its, g);
        }
        let u = F::direction(factors, x, its, g);
        if P::MEASURES {
            let (u, g) = (u.wide(), g.wide());
            // Products of two f32 are exact in f64.
            let exact = size_of::<F::Work<E>>() == size_of::<f32>();
            for (sum, factor) in sums.iter_mut().zip([g, u]) {
                sum[i] = if exact { simd.add_exact_product(u, factor, sum[i]) } else { sum[i] + u * factor };
            }
        }
        if P::MOVES {
            xs[i] = F::moved(factors, x, u);
        }
        for (row, value) in wide.iter_mut().zip(its) {
            row[i] = value;
        }
    }
    if P::MOVES {
        *parameters = E::store(simd, xs);
    }
    if P::STORES {
        for (state, row) in states.into_iter().zip(wide) {
            *state = T::store(simd, row);
        }
    }
}
