//! The numbers that everything is derived from, and how they merge.
//!
//! A block of a tensor, a tensor, a list of tensors: each yields the same kind of total, and [`Merge`] makes the next level up. Sums
//! are kept as an unevaluated pair of f64 (about 106 bits), so merging adds no error worth naming, however many blocks there are: the
//! error bound of a norm is that of one block.

use std::ops::RangeInclusive;

/// A total that absorbs another of its kind.
pub trait Merge: Copy + Send + Sync + 'static {
    /// The total of nothing.
    const EMPTY: Self;

    /// Adds `other` to `self`.
    fn merge(&mut self, other: &Self);
}

/// The total of all.
pub fn merged<T: Merge>(totals: impl IntoIterator<Item = T>) -> T {
    totals.into_iter().fold(T::EMPTY, |mut total, part| {
        total.merge(&part);
        total
    })
}

impl Merge for u64 {
    const EMPTY: Self = 0;

    fn merge(&mut self, other: &Self) {
        *self += other;
    }
}

/// A sum of non-negative numbers, as the unevaluated sum of two f64.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sum {
    high: f64,
    low: f64,
}

impl Sum {
    /// The sum of this one number.
    pub fn of(value: f64) -> Self {
        Self { high: value, low: 0.0 }
    }

    /// The nearest f64.
    pub fn value(self) -> f64 {
        // `low` is at most half a unit of `high`, so `high` is the rounded sum already. It is NaN or inf when the sum is.
        self.high
    }

    /// The sum of all terms times a positive factor. A sum that is infinite or NaN stays so, even where the factor underflowed to 0.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        if self.high.is_finite() { Self { high: self.high * factor, low: self.low * factor } } else { self }
    }
}

impl Merge for Sum {
    const EMPTY: Self = Self { high: 0.0, low: 0.0 };

    fn merge(&mut self, other: &Self) {
        if other.high == 0.0 {
            return;
        }
        if self.high == 0.0 {
            *self = *other;
            return;
        }
        // Knuth's exact sum of the high parts; its error joins the low parts, and the result is normalized.
        let high = self.high + other.high;
        let shadow = high - self.high;
        let error = (self.high - (high - shadow)) + (other.high - shadow);
        let low = error + (self.low + other.low);
        let normalized = high + low;
        *self = if normalized.is_finite() {
            Self { high: normalized, low: low - (normalized - high) }
        } else {
            // inf − inf in the error terms must not make NaN of an infinite sum.
            Self::of(high)
        };
    }
}

/// Σx², safe from overflow and underflow: blocks whose sum leaves f64's safe range are summed at another scale (after Blue, 1978).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Squares {
    /// Σ(x·2⁵³⁸)² of the blocks of tiny numbers.
    pub(crate) small: Sum,
    /// Σx² of ordinary blocks.
    pub(crate) medium: Sum,
    /// Σ(x·2⁻⁵³⁸)² of the blocks with huge numbers.
    pub(crate) large: Sum,
}

impl Squares {
    /// The factor that brings tiny numbers into range; its inverse does it for huge ones.
    pub(crate) const UP: f64 = f64::from_bits((1023 + 538) << 52);
    /// See [`Squares::UP`].
    pub(crate) const DOWN: f64 = f64::from_bits((1023 - 538) << 52);
    /// Sums in this range are safe: squares that underflow to less than 2⁻¹⁰⁷⁴ do not matter in them, and no number of them overflows.
    pub(crate) const SAFE: RangeInclusive<f64> = f64::from_bits((1023 - 900) << 52)..=f64::from_bits((1023 + 900) << 52);

    /// √Σx².
    pub fn norm(&self) -> f64 {
        let [small, medium, large] = [self.small, self.medium, self.large].map(Sum::value);
        // The smaller scale matters only just below the border, where it can be brought to the larger one's.
        if large != 0.0 {
            (large + medium * Self::DOWN * Self::DOWN).sqrt() * Self::UP
        } else if medium != 0.0 {
            (medium + small * Self::DOWN * Self::DOWN).sqrt()
        } else {
            small.sqrt() * Self::DOWN
        }
    }
}

impl Merge for Squares {
    const EMPTY: Self = Self { small: Sum::EMPTY, medium: Sum::EMPTY, large: Sum::EMPTY };

    fn merge(&mut self, other: &Self) {
        self.small.merge(&other.small);
        self.medium.merge(&other.medium);
        self.large.merge(&other.large);
    }
}

/// The larger of absolute values; NaN beats infinity, which beats all numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Largest(pub f64);

impl Merge for Largest {
    const EMPTY: Self = Self(0.0);

    fn merge(&mut self, other: &Self) {
        if other.0 > self.0 || other.0.is_nan() {
            *self = *other;
        }
    }
}

/// The smaller of absolute values; NaN beats all numbers. Infinity where there are none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Smallest(pub f64);

impl Merge for Smallest {
    const EMPTY: Self = Self(f64::INFINITY);

    fn merge(&mut self, other: &Self) {
        if other.0 < self.0 || other.0.is_nan() {
            *self = *other;
        }
    }
}
