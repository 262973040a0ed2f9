//! Σ|x|^p for any real p but 0.
//!
//! Input f16, bf16, f32, f64 → f64 lanes → a [`PowerSum`] for each block. NaN passes through; for negative p, 0^p is infinite and inf^p is 0.
//! A power is within 2 · (2 + |p·log₂x|) · 2⁻⁵² of the true one, so the norm, which is a p-th root, is within 1e-13 for sums in plain range.
//! A block whose sum comes close to overflow or underflow is read again relative to its largest (for negative p: smallest) element, whose
//! power is then 1.

use super::sum::Lanes;
use super::{Elements, Kernel, MaxAbs, MinAbs, SumOf, Term};
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

/// Σ `terms[k]` · x^k for an even number of terms. Even and odd powers are summed apart: two chains of half the length run side by side.
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

/// log₂x for finite x > 0, within 2⁻⁵¹ relative or absolute.
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

/// 2^y within 2⁻⁵¹ relative; infinite from 2¹⁰²³·⁵ on, and 0 below 2⁻¹⁰²². A sum for which such a power counts is taken at another scale.
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
    const EMPTY: Self = Self { exponent: 0.0, scale: 1.0, sum: Sum::EMPTY };

    fn merge(&mut self, other: &Self) {
        // The total of no elements has no exponent. A sum of 0 with an exponent is one of infinities to a negative power.
        if other.exponent == 0.0 || (other.sum == Sum::EMPTY && self.exponent != 0.0) {
            return;
        }
        if self.sum == Sum::EMPTY {
            *self = *other;
            return;
        }
        // The scale of the larger terms is kept, so that nothing overflows.
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
    type State<E: Element> = Lanes;

    #[inline(always)]
    fn start<E: Element>(self) -> Lanes {
        SumOf(self.0).start::<E>()
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, simd: S, state: &mut Lanes, elements: &[E]) {
        SumOf(self.0).add(simd, state, elements);
    }

    #[inline(always)]
    fn finish<E: Element>(self, state: Lanes) -> PowerSum {
        PowerSum { exponent: self.0.exponent(), scale: 1.0, sum: SumOf(self.0).finish::<E>(state) }
    }

    fn block<E: Element>(self, elements: &Elements<'_, E>) -> PowerSum {
        let plain = elements.pass(self);
        let sum = plain.sum.value();
        if sum.is_nan() || Squares::SAFE.contains(&sum) {
            return plain;
        }
        let scale = if plain.exponent > 0.0 { elements.pass(MaxAbs).0 } else { elements.pass(MinAbs).0 };
        if scale == 0.0 || scale == f64::INFINITY {
            return plain;
        }
        PowerSum { scale, sum: elements.pass(SumOf(Relative { power: self.0, scale })), ..plain }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Positive numbers of all magnitudes, subnormal ones too, and as many around 1, where the logarithm changes its sign.
    fn numbers() -> impl Iterator<Item = f64> {
        let spread = |first: u64, last: u64| (0..50_000).map(move |i| f64::from_bits(first + (last - first) / 50_000 * i));
        let subnormal = spread(1, f64::MIN_POSITIVE.to_bits()).step_by(20);
        spread(1, f64::MAX.to_bits()).chain(spread(0.4f64.to_bits(), 2.5f64.to_bits())).chain(subnormal)
    }

    #[test]
    fn logarithms() {
        for k in -1074..=1023 {
            let power = if k < -1022 { f64::from_bits(1 << (k + 1074)) } else { f64::from_bits(((k + 1023) as u64) << 52) };
            assert_eq!(log2(power), f64::from(k));
        }
        for x in numbers() {
            let (found, exact) = (log2(x), x.log2());
            // Next to 1 the logarithm is small, and as exact relative to itself.
            let bound = (2.0 * exact.abs().max(1.0)).min(4.0 * exact.abs()) * f64::EPSILON;
            assert!((found - exact).abs() <= bound, "{x:e}: {found}, not {exact}");
        }
    }

    #[test]
    fn exponentials() {
        for k in -1022..=1023 {
            assert_eq!(exp2(f64::from(k)), f64::from_bits(((k + 1023) as u64) << 52));
        }
        for y in (0..200_000).map(|i| f64::from(i) * 0.010_227 - 1022.0) {
            let (found, exact) = (exp2(y), y.exp2());
            assert!((found - exact).abs() <= 3.0 * f64::EPSILON * exact, "{y}: {found:e}, not {exact:e}");
        }
        for y in [-1022.5, -1023.5, -1e300, f64::NEG_INFINITY] {
            assert_eq!(exp2(y), 0.0);
        }
        for y in [1024.0, 1025.5, 1e300, f64::INFINITY] {
            assert_eq!(exp2(y), f64::INFINITY);
        }
    }

    #[test]
    fn powers() {
        for p in [0.5, 1.5, 2.5, 10.0, 1000.0, -0.5, -1.0, -2.0] {
            for x in numbers() {
                let (found, exact) = (Real(p).of(x), x.powf(p));
                // Beyond these, 0 and infinity are right: the sum is taken again at another scale.
                if (1e-300..1e307).contains(&exact) {
                    let bound = (4.0 + 2.0 * (p * x.log2()).abs()) * f64::EPSILON;
                    assert!((found - exact).abs() <= bound * exact, "{x:e}^{p}: {found:e}, not {exact:e}");
                }
            }
            let (at_zero, at_infinity) = if p > 0.0 { (0.0, f64::INFINITY) } else { (f64::INFINITY, 0.0) };
            assert_eq!([Real(p).of(0.0), Real(p).of(f64::INFINITY), Real(p).of(1.0)], [at_zero, at_infinity, 1.0]);
            assert!(Real(p).of(f64::NAN).is_nan());
        }
        assert_eq!([Integer::<3>.of(1.5), Integer::<4>.of(1.5), Integer::<3>.of(f64::INFINITY)], [3.375, 5.0625, f64::INFINITY]);
        assert!(Integer::<3>.of(f64::NAN).is_nan());
    }

    #[test]
    fn sums_merge_at_any_scale() {
        let part = |scale: f64, sum: f64| PowerSum { exponent: 3.0, scale, sum: Sum::of(sum) };
        // (8 + 27 + 1)·10³⁰⁰ in all orders, and a tiny one that vanishes.
        let parts = [part(1e100, 8.0), part(3e100, 1.0), part(0.5e100, 8.0), part(1e-300, 5.0)];
        for first in 0..parts.len() {
            let mut rotated = parts;
            rotated.rotate_left(first);
            let total = crate::moments::merged(rotated);
            assert!((total.norm() / (36f64.cbrt() * 1e100) - 1.0).abs() < 1e-15, "{total:?}");
        }
        assert!(crate::moments::merged([part(1e100, 1.0), part(1.0, f64::INFINITY)]).norm().is_infinite());
        assert!(crate::moments::merged([part(1.0, f64::NAN), part(1e100, 1.0)]).norm().is_nan());
    }
}
