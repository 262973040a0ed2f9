//! What the formulas of optimizers have in common: rows of elements, the step, and what it would do.
//!
//! A [`Formula`] says what becomes of one element. Elements are widened exactly to its type, every operation is rounded there, and parameters
//! and states are rounded once when they are stored, to nearest even. NaN and infinity follow IEEE arithmetic; every NaN is stored as the same.
//! [`Measure`] reads and stores nothing. Its sums are of f64, products of f32 being exact there; they overflow where Σ|u·g| or Σu² does.

use std::hint::black_box;

use super::sum::{LANES, Lanes};
use crate::dtype::{Element, Float};
use crate::isa::{Isa, Op};
use crate::moments::{Merge, Sum};
use crate::simd::Simd;

/// The formula of an optimizer for parameters with N states each.
pub trait Formula<const N: usize>: Copy + Send + Sync + 'static {
    /// The type in which it is computed for parameters of E.
    type Work<E: Element>: Float;

    /// The numbers of a step, rounded to that type. All functions must be `#[inline(always)]`.
    type Factors<W: Float>: Copy;

    /// These numbers.
    fn factors<W: Float>(self) -> Self::Factors<W>;

    /// The direction u of the step of an element x with gradient g, and its new states.
    fn direction<W: Float>(factors: Self::Factors<W>, x: W, states: [W; N], g: W) -> (W, [W; N]);

    /// The element after a step in direction u.
    fn moved<W: Float>(factors: Self::Factors<W>, x: W, u: W) -> W;
}

/// An optimizer: its formulas for each number of states that a parameter may have.
pub trait Update: Copy + Send + Sync + 'static {
    /// Runs a computation with the formula for so many states.
    fn with<R: Run>(self, states: usize, run: R) -> R::Output;
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
    /// What it yields.
    type Total: Merge;

    /// Whether parameters and states change.
    const WRITES: bool;

    /// Does it.
    fn run<E: Element, T: Element, U: Update>(isa: Isa, update: U, part: Part<'_, E, T>) -> Self::Total;
}

/// Takes the step.
#[derive(Clone, Copy)]
pub struct Step;

/// Measures the step that would be taken.
#[derive(Clone, Copy)]
pub struct Measure;

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

impl Merge for () {
    const EMPTY: Self = ();

    fn merge(&mut self, (): &Self) {}
}

impl Purpose for Step {
    type Total = ();
    const WRITES: bool = true;

    fn run<E: Element, T: Element, U: Update>(isa: Isa, update: U, part: Part<'_, E, T>) {
        update.with(part.states.len(), Stepping { isa, part });
    }
}

impl Purpose for Measure {
    type Total = Descent;
    const WRITES: bool = false;

    fn run<E: Element, T: Element, U: Update>(isa: Isa, update: U, part: Part<'_, E, T>) -> Descent {
        update.with(part.states.len(), Measuring { isa, part })
    }
}

struct Stepping<'a, E, T> {
    isa: Isa,
    part: Part<'a, E, T>,
}

impl<E: Element, T: Element> Run for Stepping<'_, E, T> {
    type Output = ();

    fn by<const N: usize, F: Formula<N>>(self, formula: F) {
        let isa = self.isa;
        isa.run(StepRows(Rows::<E, T, F, N>::of(formula, self.part)));
    }
}

struct Measuring<'a, E, T> {
    isa: Isa,
    part: Part<'a, E, T>,
}

impl<E: Element, T: Element> Run for Measuring<'_, E, T> {
    type Output = Descent;

    fn by<const N: usize, F: Formula<N>>(self, formula: F) -> Descent {
        let isa = self.isa;
        isa.run(MeasureRows(Rows::<E, T, F, N>::of(formula, self.part)))
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

struct StepRows<'a, E, T, F, const N: usize>(Rows<'a, E, T, F, N>);

impl<E: Element, T: Element, F: Formula<N>, const N: usize> Op for StepRows<'_, E, T, F, N> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, simd: S) {
        let Self(mut rows) = self;
        let factors = rows.formula.factors();
        for (i, (x, g)) in rows.xs.iter_mut().zip(rows.gs).enumerate() {
            let states = rows.states.each_mut().map(|(rows, _)| &mut rows[i]);
            step_row::<E, T, F, S, N>(simd, factors, x, states, g);
        }
        if rows.x_tail.is_empty() {
            return;
        }
        let (mut x, mut states, g) = rows.last();
        step_row::<E, T, F, S, N>(simd, factors, &mut x, states.each_mut(), &g);
        rows.x_tail.copy_from_slice(&x[..rows.x_tail.len()]);
        for ((_, tail), state) in rows.states.iter_mut().zip(&states) {
            tail.copy_from_slice(&state[..tail.len()]);
        }
    }
}

#[inline(always)]
fn step_row<E: Element, T: Element, F: Formula<N>, S: Simd, const N: usize>(
    simd: S,
    factors: F::Factors<F::Work<E>>,
    parameters: &mut [E; LANES],
    states: [&mut [T; LANES]; N],
    gradients: &[E; LANES],
) {
    let mut xs = E::load::<F::Work<E>, S>(simd, *parameters);
    let gs = E::load::<F::Work<E>, S>(simd, *gradients);
    let mut wide = states.each_ref().map(|state| T::load::<F::Work<E>, S>(simd, **state));
    for i in 0..LANES {
        let (u, new) = F::direction(factors, xs[i], wide.each_ref().map(|row| row[i]), gs[i]);
        xs[i] = F::moved(factors, xs[i], u);
        for (row, value) in wide.iter_mut().zip(new) {
            row[i] = value;
        }
    }
    *parameters = E::store(simd, xs);
    for (state, row) in states.into_iter().zip(wide) {
        *state = T::store(simd, row);
    }
}

struct MeasureRows<'a, E, T, F, const N: usize>(Rows<'a, E, T, F, N>);

impl<E: Element, T: Element, F: Formula<N>, const N: usize> Op for MeasureRows<'_, E, T, F, N> {
    type Output = Descent;

    #[inline(always)]
    fn call<S: Simd>(self, simd: S) -> Descent {
        let Self(rows) = self;
        let factors = rows.formula.factors();
        let mut lanes = [Lanes::EMPTY; 2];
        for begin in (0..rows.xs.len()).step_by(E::ROWS) {
            let mut sums = [[0.0; LANES]; 2];
            for i in begin..(begin + E::ROWS).min(rows.xs.len()) {
                let states = rows.states.each_ref().map(|(rows, _)| &rows[i]);
                measure_row::<E, T, F, S, N>(simd, factors, &rows.xs[i], states, &rows.gs[i], &mut sums);
            }
            // See `SumOf` for the reason.
            let sums = black_box(sums);
            lanes[0].put(&sums[0]);
            lanes[1].put(&sums[1]);
        }
        if !rows.x_tail.is_empty() {
            let (x, states, g) = rows.last();
            let mut sums = [[0.0; LANES]; 2];
            measure_row::<E, T, F, S, N>(simd, factors, &x, states.each_ref(), &g, &mut sums);
            for (lanes, sums) in lanes.iter_mut().zip(&mut sums) {
                sums[rows.x_tail.len()..].fill(0.0); // what zeros would give, which may be NaN
                lanes.put(sums);
            }
        }
        let [along, squares] = lanes.map(Lanes::fold);
        Descent { along, squares }
    }
}

#[inline(always)]
fn measure_row<E: Element, T: Element, F: Formula<N>, S: Simd, const N: usize>(
    simd: S,
    factors: F::Factors<F::Work<E>>,
    parameters: &[E; LANES],
    states: [&[T; LANES]; N],
    gradients: &[E; LANES],
    sums: &mut [[f64; LANES]; 2],
) {
    let xs = E::load::<F::Work<E>, S>(simd, *parameters);
    let gs = E::load::<F::Work<E>, S>(simd, *gradients);
    let states = states.map(|state| T::load::<F::Work<E>, S>(simd, *state));
    for i in 0..LANES {
        let (u, _) = F::direction(factors, xs[i], states.each_ref().map(|row| row[i]), gs[i]);
        let (u, g) = (u.wide(), gs[i].wide());
        sums[0][i] += u * g;
        sums[1][i] += u * u;
    }
}
