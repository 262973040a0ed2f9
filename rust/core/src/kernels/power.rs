//! Σ|x|^p for any real p but 0.
//!
//! Input f16, bf16, f32, f64 → f64 lanes → a [`PowerSum`] a block. NaN passes through; 0^p is infinite for negative p and inf^p is 0. A
//! power is within (2 + |p·log₂x|) · 2⁻⁵² of the true one, so the norm, which is a p-th root, is within 1e-13 for sums in plain range. A
//! block whose sum comes close to overflow or underflow is read again relative to its largest (for negative p: smallest) element, whose
//! power is then 1.

use super::sum::LANES;
use super::{Block, Kernel, MaxAbs, MinAbs, SumOf, Term};
use crate::dtype::Element;
use crate::moments::{Merge, Squares, Sum};
use crate::simd::Simd;

/// A power of absolute values.
pub trait Power: Term {
    /// The exponent.
    fn exponent(self) -> f64;
}

/// A small whole exponent: a product.
#[derive(Clone, Copy)]
pub struct Integer<const N: u32>;

impl<const N: u32> Power for Integer<N> {
    fn exponent(self) -> f64 {
        f64::from(N)
    }
}

impl<const N: u32> Term for Integer<N> {
    #[inline(always)]
    fn of(self, x: f64) -> f64 {
        let x = x.abs();
        let mut product = x;
        for _ in 1..N {
            product *= x;
        }
        product
    }
}

/// Any exponent.
#[derive(Clone, Copy)]
pub struct Real(pub f64);

impl Power for Real {
    fn exponent(self) -> f64 {
        self.0
    }
}

impl Term for Real {
    #[inline(always)]
    fn of(self, x: f64) -> f64 {
        let x = x.abs();
        let power = exp2(self.0 * log2(x));
        let (at_zero, at_infinity) = if self.0 > 0.0 { (0.0, f64::INFINITY) } else { (f64::INFINITY, 0.0) };
        let power = if x == 0.0 { at_zero } else { power };
        let power = if x == f64::INFINITY { at_infinity } else { power };
        if x.is_nan() { x } else { power }
    }
}

/// The series of artanh(t) / t in t²: 1 / (2k + 1). 12 terms are enough for |t| < 0.172.
const ARTANH: [f64; 12] = {
    let mut terms = [1.0; 12];
    let mut k = 1;
    while k < 12 {
        terms[k] = 1.0 / (2 * k + 1) as f64;
        k += 1;
    }
    terms
};

/// The series of 2^f: (ln 2)^k / k!. 14 terms are enough for |f| ≤ ½.
const EXP2: [f64; 14] = {
    let mut terms = [1.0; 14];
    let mut k = 1;
    while k < 14 {
        terms[k] = terms[k - 1] * std::f64::consts::LN_2 / k as f64;
        k += 1;
    }
    terms
};

/// Σ `terms[k]` · x^k for an even number of terms. Even and odd powers apart: two chains of operations, half as long to wait for.
#[inline(always)]
fn polynomial<const N: usize>(x: f64, terms: [f64; N]) -> f64 {
    let square = x * x;
    let (mut even, mut odd) = (0.0, 0.0);
    for k in (0..N).step_by(2).rev() {
        even = even * square + terms[k];
        odd = odd * square + terms[k + 1];
    }
    even + x * odd
}

/// Adding this to a small f64 leaves its nearest integer in the low bits.
const TO_INTEGER: f64 = 1.5 * (1u64 << 52) as f64;

/// log₂x for finite x > 0, within 2⁻⁵² relative or absolute.
#[inline(always)]
fn log2(x: f64) -> f64 {
    let subnormal = x < f64::MIN_POSITIVE;
    let normal = if subnormal { x * (1u64 << 54) as f64 } else { x };
    // x = m · 2^k with m in [√½, √2), from the bits.
    let root_half = std::f64::consts::FRAC_1_SQRT_2.to_bits();
    let shifted = normal.to_bits().wrapping_sub(root_half).wrapping_add(1024 << 52);
    let biased = shifted >> 52;
    let m = f64::from_bits(normal.to_bits().wrapping_sub(biased << 52).wrapping_add(1024 << 52));
    let k = f64::from_bits(biased + TO_INTEGER.to_bits()) - TO_INTEGER - if subnormal { 1024.0 + 54.0 } else { 1024.0 };
    // ln m = 2 artanh t.
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    k + t * (2.0 * std::f64::consts::LOG2_E) * polynomial(t2, ARTANH)
}

/// 2^y, within 2⁻⁵² relative; 0 below 2⁻¹⁰²², which is lost on purpose: a sum where it would matter is taken again at another scale.
#[inline(always)]
fn exp2(y: f64) -> f64 {
    let bounded = y.clamp(-1023.0, 1024.0);
    let rounded = bounded + TO_INTEGER;
    let fraction = bounded - (rounded - TO_INTEGER);
    let series = polynomial(fraction, EXP2);
    let scale = f64::from_bits(rounded.to_bits().wrapping_add(1023) << 52);
    if y < -1022.0 { 0.0 } else { series * scale }
}

/// Σ|x|^p, relative to a scale: the value is `sum` · `scale`^p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerSum {
    exponent: f64,
    scale: f64,
    sum: Sum,
}

impl PowerSum {
    /// (Σ|x|^p)^(1/p).
    pub fn norm(&self) -> f64 {
        self.scale * self.sum.value().powf(self.exponent.recip())
    }
}

impl Merge for PowerSum {
    const EMPTY: Self = Self { exponent: 1.0, scale: 1.0, sum: Sum::EMPTY };

    fn merge(&mut self, other: &Self) {
        if other.sum == Sum::EMPTY {
            return;
        }
        if self.sum == Sum::EMPTY {
            *self = *other;
            return;
        }
        // The scale of the larger terms stays, so that nothing overflows.
        let mut small = *other;
        if (small.scale / self.scale).powf(self.exponent) > 1.0 {
            std::mem::swap(self, &mut small);
        }
        if small.scale != self.scale {
            small.sum = small.sum.times((small.scale / self.scale).powf(self.exponent));
        }
        self.sum.merge(&small.sum);
    }
}

/// Σ|x|^p.
#[derive(Clone, Copy)]
pub struct SumPowers<P>(pub P);

impl<P: Power> Kernel for SumPowers<P> {
    type Total = PowerSum;
    type State<E: Element> = [[f64; LANES]; 1];

    #[inline(always)]
    fn start<E: Element>(self) -> [[f64; LANES]; 1] {
        SumOf(self.0).start::<E>()
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, simd: S, state: &mut [[f64; LANES]; 1], elements: &[E]) {
        SumOf(self.0).add(simd, state, elements);
    }

    #[inline(always)]
    fn finish<E: Element>(self, state: [[f64; LANES]; 1]) -> PowerSum {
        PowerSum { exponent: self.0.exponent(), scale: 1.0, sum: SumOf(self.0).finish::<E>(state) }
    }

    fn block<E: Element>(self, block: &Block<'_, E>) -> PowerSum {
        let plain = block.pass(self);
        let sum = plain.sum.value();
        if sum.is_nan() || Squares::SAFE.contains(&sum) {
            return plain;
        }
        let scale = if plain.exponent > 0.0 { block.pass(MaxAbs).0 } else { block.pass(MinAbs).0 };
        if scale == 0.0 || scale == f64::INFINITY {
            return plain;
        }
        PowerSum { scale, sum: block.pass(SumOf(Relative { power: self.0, scale })), ..plain }
    }
}

/// (|x| / scale)^p.
#[derive(Clone, Copy)]
struct Relative<P> {
    power: P,
    scale: f64,
}

impl<P: Power> Term for Relative<P> {
    #[inline(always)]
    fn of(self, x: f64) -> f64 {
        self.power.of(x / self.scale)
    }
}
