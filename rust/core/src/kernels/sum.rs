//! Σ of a term of each element.
//!
//! Input f16, bf16, f32, f64, widened → f64 lanes → a [`Sum`] a block. NaN and infinity pass through; an empty block gives 0.
//! Error bound: a block of 2¹⁶ elements makes 2¹¹ additions a lane and 5 in the tree, so for terms that are not negative the sum is within
//! 2053 · 2⁻⁵³ ≈ 2.3e-13 relative of the sum of the terms, whatever the data; rounding errors that do not conspire leave about 1e-15.

use super::Kernel;
use crate::dtype::Element;
use crate::moments::Sum;
use crate::simd::Simd;

/// Accumulators. Each has a fixed share of a block's elements, so that the result does not depend on how many of them fit into a register.
pub(crate) const LANES: usize = 32;

/// What is summed for each element.
pub trait Term: Copy + Send + Sync + 'static {
    /// The term of the element x. Must be `#[inline(always)]`.
    fn of(self, x: f64) -> f64;
}

/// Several terms of each element, for several sums in one pass.
pub(super) trait Terms<const N: usize>: Copy {
    /// The terms of the element x. Must be `#[inline(always)]`.
    fn all(self, x: f64) -> [f64; N];
}

impl<T: Term> Terms<1> for T {
    #[inline(always)]
    fn all(self, x: f64) -> [f64; 1] {
        [self.of(x)]
    }
}

/// Adds the terms of each element to its lanes.
#[inline(always)]
pub(super) fn add_terms<const N: usize, E: Element, S: Simd>(simd: S, terms: impl Terms<N>, lanes: &mut [[f64; LANES]; N], elements: &[E]) {
    let (rows, tail) = elements.as_chunks::<LANES>();
    // Copies of fixed size, so that rows and lanes become vector registers.
    let mut registers = *lanes;
    for &row in rows {
        for (i, x) in E::widen(simd, row).into_iter().enumerate() {
            let terms = terms.all(x);
            for n in 0..N {
                registers[n][i] += terms[n];
            }
        }
    }
    *lanes = registers;
    for (i, x) in tail.iter().enumerate() {
        let terms = terms.all(x.wide());
        for n in 0..N {
            lanes[n][i] += terms[n];
        }
    }
}

/// Adds the lanes in a fixed tree: halves onto halves.
#[inline(always)]
pub(super) fn fold(mut lanes: [f64; LANES]) -> Sum {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    Sum::of(lanes[0])
}

/// The sum of a term.
#[derive(Clone, Copy)]
pub struct SumOf<T>(pub T);

impl<T: Term> Kernel for SumOf<T> {
    type Total = Sum;
    type State<E: Element> = [[f64; LANES]; 1];

    #[inline(always)]
    fn start<E: Element>(self) -> [[f64; LANES]; 1] {
        [[0.0; LANES]]
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, simd: S, lanes: &mut [[f64; LANES]; 1], elements: &[E]) {
        add_terms(simd, self.0, lanes, elements);
    }

    #[inline(always)]
    fn finish<E: Element>(self, [lanes]: [[f64; LANES]; 1]) -> Sum {
        fold(lanes)
    }
}

/// |x|.
#[derive(Clone, Copy)]
pub struct Abs;

impl Term for Abs {
    #[inline(always)]
    fn of(self, x: f64) -> f64 {
        x.abs()
    }
}
