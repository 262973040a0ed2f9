//! Totals: the numbers that all results are derived from, and how they merge.
//!
//! A block, a tensor and a list of tensors yield totals of the same kind, and [`Merge`] makes those of a tensor from those of its blocks, and
//! so on. Sums are unevaluated pairs of f64 (about 106 bits), so that merging adds an error of some 2⁻¹⁰⁰ however many blocks there are, and
//! the error bound of a norm is that of one block.

use std::ops::RangeInclusive;

/// A total that absorbs another of its kind.
pub trait Merge: Copy + Send + Sync + 'static {
    /// The total of nothing.
    const EMPTY: Self;

    /// Adds `other` to `self`.
    fn merge(&mut self, other: &Self);
}

/// All totals merged, in order.
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

/// A sum, as the unevaluated sum of two f64.
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

    /// The sum of two numbers, the second of which is small beside the first.
    #[inline(always)]
    pub(crate) fn new(high: f64, low: f64) -> Self {
        let normalized = high + low;
        if normalized.is_finite() {
            Self { high: normalized, low: low - (normalized - high) }
        } else {
            // inf − inf in the error terms must not make NaN of an infinite sum.
            Self { high, low: 0.0 }
        }
    }

    /// The nearest f64; of the NaN values, which hardware makes in several forms, always the same.
    pub fn value(self) -> f64 {
        // `low` is at most half a unit in the last place of `high`, so `high` is the rounded sum, and NaN or infinite if the sum is.
        if self.high.is_nan() { f64::NAN } else { self.high }
    }

    /// √ of the sum.
    fn root(self) -> Self {
        let root = self.high.sqrt();
        let rest = (-root).mul_add(root, self.high) + self.low;
        if root > 0.0 { Self::new(root, rest / (2.0 * root)) } else { Self::of(root) }
    }

    /// The sum over another that is not 0.
    fn over(self, other: Self) -> Self {
        let quotient = self.high / other.high;
        let rest = (-quotient).mul_add(other.high, self.high) + (self.low - quotient * other.low);
        Self::new(quotient, rest / other.high)
    }

    fn square(self) -> Self {
        let square = self.high * self.high;
        Self::new(square, self.high.mul_add(self.high, -square) + 2.0 * self.high * self.low)
    }

    /// The sum times a factor that is not negative. An infinite sum stays so even where the factor has underflowed to 0.
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
        let (high, error) = two_sum(self.high, other.high);
        *self = Self::new(high, error + (self.low + other.low));
    }
}

/// Knuth's TwoSum: the rounded sum and its rounding error, exactly.
#[inline(always)]
pub(crate) fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let shadow = sum - a;
    (sum, (a - (sum - shadow)) + (b - shadow))
}

/// Σx² without overflow and underflow: blocks whose sum leaves f64's safe range are summed at another scale (after Blue, 1978).
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
    pub const UP: f64 = f64::from_bits((1023 + 538) << 52);
    /// See [`Squares::UP`].
    pub const DOWN: f64 = f64::from_bits((1023 - 538) << 52);
    /// Sums of a block in this range need no other scale: squares that underflow are below half a unit in their last place, and no number of
    /// such sums overflows.
    pub const SAFE: RangeInclusive<f64> = f64::from_bits((1023 - 900) << 52)..=f64::from_bits((1023 + 900) << 52);

    /// The sum itself. It may overflow; for products of two vectors, which need no root.
    pub fn value(&self) -> f64 {
        let [small, medium, large] = [self.small, self.medium, self.large].map(Sum::value);
        canonical(large * Self::UP * Self::UP + (medium + small * Self::DOWN * Self::DOWN))
    }

    /// √Σx².
    pub fn norm(&self) -> f64 {
        let (root, scale) = self.root();
        root.times(scale).value()
    }

    /// √Σx² as a number and the power of 2 that it is to be multiplied by.
    fn root(&self) -> (Sum, f64) {
        let Self { small, medium, large } = *self;
        // Beside blocks at one scale, those at the next smaller one count only near the border, where their sum fits the larger scale.
        let joined = |high: Sum, low: Sum| merged([high, low.times(Self::DOWN).times(Self::DOWN)]).root();
        if large.value() != 0.0 {
            (joined(large, medium), Self::UP)
        } else if medium.value() != 0.0 {
            (joined(medium, small), 1.0)
        } else {
            (small.root(), Self::DOWN)
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

/// The largest absolute value; NaN if there is one, else infinity if there is one.
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

impl Largest {
    /// From here on, a sum of absolute values could overflow.
    pub const HUGE: f64 = f64::from_bits((1023 + 960) << 52);
    /// The unit of such sums.
    pub const UNIT: f64 = f64::from_bits((1023 + 64) << 52);

    /// The unit in which absolute values up to this one are summed.
    pub fn unit(self) -> f64 {
        // NaN has the large unit too.
        if self.0 < Self::HUGE { 1.0 } else { Self::UNIT }
    }
}

/// The smallest absolute value; NaN if there is one, infinity for no elements.
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

/// The numbers that the statistics of a gradient are derived from. In whatever order they merge, derived figures have the same bits, but for
/// sums that lie within some 2⁻¹⁰⁰ of the midpoint between two f64.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments {
    /// Number of elements.
    pub count: u64,
    /// Elements equal to 0.
    pub zeros: u64,
    /// Elements that are NaN.
    pub nans: u64,
    /// Elements that are inf or −inf.
    pub infs: u64,
    /// Σ|x| in the unit that [`Largest::unit`] gives for `largest`.
    pub sum_abs: Sum,
    /// Σx².
    pub squares: Squares,
    /// max|x|.
    pub largest: Largest,
}

impl Merge for Moments {
    const EMPTY: Self =
        Self { count: 0, zeros: 0, nans: 0, infs: 0, sum_abs: Sum::EMPTY, squares: Squares::EMPTY, largest: Largest::EMPTY };

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.zeros += other.zeros;
        self.nans += other.nans;
        self.infs += other.infs;
        // Both sums are brought to the unit of the larger absolute value. A factor of 2⁻⁶⁴ loses only bits far below that unit's sum.
        let (unit, other_unit) = (self.largest.unit(), other.largest.unit());
        self.largest.merge(&other.largest);
        self.sum_abs = self.sum_abs.times(unit / self.largest.unit());
        self.sum_abs.merge(&other.sum_abs.times(other_unit / self.largest.unit()));
        self.squares.merge(&other.squares);
    }
}

impl Moments {
    /// Numbers in the array form.
    pub const LEN: usize = 13;

    /// What they are called, in the order of the array. A sum is two numbers, its value and a rest; Σx² is three sums, by scale.
    pub const NUMBERS: [&str; Self::LEN] = [
        "count",
        "zeros",
        "nans",
        "infs",
        "sum_abs",
        "sum_abs_rest",
        "small",
        "small_rest",
        "medium",
        "medium_rest",
        "large",
        "large_rest",
        "largest",
    ];

    /// Σ|x|.
    pub fn l1(&self) -> f64 {
        self.sum_abs.times(self.largest.unit()).value()
    }

    /// max|x|.
    pub fn linf(&self) -> f64 {
        canonical(self.largest.0)
    }

    /// Σ|x| / count; NaN for no elements.
    pub fn mean_abs(&self) -> f64 {
        self.sum_abs.over(number(self.count)).times(self.largest.unit()).value()
    }

    /// √Σx².
    pub fn l2(&self) -> f64 {
        self.roots().l2()
    }

    /// √Σx² and Σ|x| / √Σx², which figures are derived from.
    pub fn roots(&self) -> Roots {
        let (root, scale) = self.squares.root();
        let defined = root.times(scale).value().is_finite() && root.value() > 0.0;
        let ratio = if defined { self.sum_abs.times(1.0 / scale).over(root).times(self.largest.unit()) } else { Sum::of(f64::NAN) };
        Roots { moments: *self, root, scale, ratio }
    }

    /// The numbers of [`Moments::NUMBERS`]. Σ|x| is in its unit.
    pub fn to_array(&self) -> [f64; Self::LEN] {
        let Squares { small, medium, large } = self.squares;
        let [count, zeros, nans, infs] = [self.count, self.zeros, self.nans, self.infs].map(|count| count as f64);
        let sums = [self.sum_abs, small, medium, large];
        let [a, s, m, l] = sums;
        let array = [count, zeros, nans, infs, a.high, a.low, s.high, s.low, m.high, m.low, l.high, l.low, self.largest.0];
        array.map(canonical)
    }

    /// Checks an array that may not come from [`Moments::to_array`].
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn check(array: &[f64; Self::LEN]) -> Result<(), &'static str> {
        let [count, zeros, nans, infs, sums @ .., largest] = *array;
        let most = (1u64 << 53) as f64;
        let is_count = |number: f64| (0.0..=most).contains(&number) && number.fract() == 0.0;
        // NaN and infinities that were measured as 0 are counted as zeros too, so there is no rule for the sum of the counts.
        let counts = [count, zeros, nans, infs].into_iter().all(is_count);
        let pairs = sums.as_chunks::<2>().0;
        let is_sum = |&[high, low]: &[f64; 2]| high.is_nan() || high == f64::INFINITY || (high >= 0.0 && low.abs() <= high);
        let rules = [
            (counts, "the first four are counts: whole, from 0 to 2^53"),
            (zeros <= count, "there are more zeros than elements"),
            (nans + infs <= count, "there are more NaN and infinities than elements"),
            (pairs.iter().all(is_sum), "sums of absolute values and squares are not negative, and the second number of each is small"),
            (largest.is_nan() || largest >= 0.0, "the largest absolute value is not negative"),
            (nans > 0.0 || !array.iter().any(|number| number.is_nan()), "there is NaN in what no NaN was counted for"),
            (infs > 0.0 || largest != f64::INFINITY, "the largest absolute value is infinite, and no infinity was counted"),
            ((largest == 0.0) == (zeros == count), "the largest absolute value is 0 where, and only where, all elements are"),
            (largest != 0.0 || sums.iter().all(|sum| *sum == 0.0), "sums are 0 where all elements are"),
        ];
        rules.into_iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, rule)| Err(rule))
    }

    /// The inverse of [`Moments::to_array`].
    pub fn from_array(array: [f64; Self::LEN]) -> Self {
        let [count, zeros, nans, infs, rest @ ..] = array;
        let [count, zeros, nans, infs] = [count, zeros, nans, infs].map(|count| count as u64);
        let [ah, al, sh, sl, mh, ml, lh, ll, largest] = rest;
        let sum = Sum::new;
        let squares = Squares { small: sum(sh, sl), medium: sum(mh, ml), large: sum(lh, ll) };
        Self { count, zeros, nans, infs, sum_abs: sum(ah, al), squares, largest: Largest(largest) }
    }
}

/// What several figures of [`Moments`] have in common, computed once: statistics of many small tensors take as long as their roots.
pub struct Roots {
    moments: Moments,
    /// √Σx², divided by the scale, a power of 2.
    root: Sum,
    scale: f64,
    /// Σ|x| / √Σx²; NaN for a zero or non-finite vector.
    ratio: Sum,
}

impl Roots {
    /// What they were taken of.
    pub fn moments(&self) -> &Moments {
        &self.moments
    }

    /// √Σx².
    pub fn l2(&self) -> f64 {
        self.root.times(self.scale).value()
    }

    /// √(Σx² / count); NaN for no elements.
    pub fn rms(&self) -> f64 {
        self.root.over(number(self.moments.count).root()).times(self.scale).value()
    }

    /// cos(sign x, x) = Σ|x| / (√(count − zeros) · √Σx²), with sign(0) = 0; NaN for a zero or non-finite vector.
    pub fn sign_cosine(&self) -> f64 {
        self.ratio.over(number(self.moments.count - self.moments.zeros).root()).value()
    }

    /// (Σ|x|)² / (count · Σx²); NaN for a zero or non-finite vector.
    pub fn density(&self) -> f64 {
        self.ratio.square().over(number(self.moments.count)).value()
    }
}

/// The number, with 0 for −0 and the same bits for every NaN.
pub(crate) fn canonical(number: f64) -> f64 {
    if number.is_nan() { f64::NAN } else { number + 0.0 }
}

fn number(count: u64) -> Sum {
    Sum::of(count as f64)
}
