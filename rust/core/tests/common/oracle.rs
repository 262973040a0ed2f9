//! Norms by slow, simple and exact arithmetic.

use normclip_core::Dtype;

/// The norm of a tensor's real numbers (two for each complex element), within a few units in the last place for orders of moderate size.
pub(crate) fn norm(dtype: Dtype, parts: &[f64], order: f64) -> f64 {
    let moduli: Vec<f64> = match dtype.is_complex() {
        true => parts.chunks(2).map(|pair| if pair[0].is_nan() { pair[0] } else { pair[0].hypot(pair[1]) }).collect(),
        false => parts.iter().map(|x| x.abs()).collect(),
    };
    if moduli.is_empty() {
        0.0
    } else if parts.iter().any(|x| x.is_nan()) {
        f64::NAN
    } else if order == 0.0 {
        moduli.iter().filter(|x| **x != 0.0).count() as f64
    } else if order > 0.0 && moduli.contains(&f64::INFINITY) {
        f64::INFINITY
    } else if order == f64::INFINITY {
        largest(&moduli)
    } else if order == f64::NEG_INFINITY {
        smallest(&moduli)
    } else if order == 2.0 {
        let mut squares = Exact::default();
        parts.iter().for_each(|x| squares.add_square(*x));
        squares.root()
    } else if order == 1.0 {
        let mut sum = Exact::default();
        moduli.iter().for_each(|x| sum.add(*x));
        sum.value()
    } else {
        power_norm(&moduli, order)
    }
}

/// (Σx^p)^(1/p), with all terms divided by the largest.
fn power_norm(moduli: &[f64], order: f64) -> f64 {
    let scale = if order > 0.0 { largest(moduli) } else { smallest(moduli) };
    if scale == 0.0 || scale == f64::INFINITY {
        return scale;
    }
    let (mut sum, mut error) = (0.0f64, 0.0);
    for x in moduli {
        // Neumaier's compensated sum.
        let power = (x / scale).powf(order);
        let next = sum + power;
        error += if sum >= power { (sum - next) + power } else { (power - next) + sum };
        sum = next;
    }
    scale * (sum + error).powf(1.0 / order)
}

fn largest(moduli: &[f64]) -> f64 {
    moduli.iter().copied().fold(0.0, f64::max)
}

fn smallest(moduli: &[f64]) -> f64 {
    moduli.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Whether a result is within the relative tolerance of the exact value, or within the smallest subnormal number of it, or infinite or NaN
/// as it is.
pub(crate) fn is_close(found: f64, exact: f64, tolerance: f64) -> bool {
    let smallest_subnormal = f64::from_bits(1);
    found == exact || (found.is_nan() && exact.is_nan()) || (found - exact).abs() <= tolerance * exact.abs() + smallest_subnormal
}

/// A sum without any rounding: a fixed-point number that holds every finite f64, and the square of every one.
pub(crate) struct Exact {
    /// The lowest word first, in units of 2^−2148: the square of the smallest subnormal number.
    words: [u64; 70],
}

impl Default for Exact {
    fn default() -> Self {
        Self { words: [0; 70] }
    }
}

impl Exact {
    const UNIT: i32 = -2148;

    /// Adds |x|.
    pub(crate) fn add(&mut self, x: f64) {
        let (mantissa, exponent) = decompose(x);
        self.add_at(u128::from(mantissa), exponent);
    }

    /// Adds x².
    pub(crate) fn add_square(&mut self, x: f64) {
        let (mantissa, exponent) = decompose(x);
        self.add_at(u128::from(mantissa) * u128::from(mantissa), 2 * exponent);
    }

    /// Adds |xy|.
    pub(crate) fn add_product(&mut self, x: f64, y: f64) {
        let ((x, x_exponent), (y, y_exponent)) = (decompose(x), decompose(y));
        self.add_at(u128::from(x) * u128::from(y), x_exponent + y_exponent);
    }

    /// This sum minus the other, which is not larger.
    fn minus(&self, other: &Self) -> Self {
        let mut words = self.words;
        let mut borrow = false;
        for (word, other) in words.iter_mut().zip(other.words) {
            let (once, first) = word.overflowing_sub(other);
            let (twice, second) = once.overflowing_sub(borrow.into());
            (*word, borrow) = (twice, first || second);
        }
        assert!(!borrow);
        Self { words }
    }

    fn add_at(&mut self, mantissa: u128, exponent: i32) {
        let shift = usize::try_from(exponent - Self::UNIT).unwrap();
        for (place, word) in [mantissa as u64, (mantissa >> 64) as u64].into_iter().enumerate() {
            let shifted = u128::from(word) << (shift % 64);
            self.add_word(shift / 64 + place, shifted as u64);
            self.add_word(shift / 64 + place + 1, (shifted >> 64) as u64);
        }
    }

    fn add_word(&mut self, mut place: usize, word: u64) {
        let mut carry;
        (self.words[place], carry) = self.words[place].overflowing_add(word);
        while carry {
            place += 1;
            (self.words[place], carry) = self.words[place].overflowing_add(1);
        }
    }

    /// The value as an f64, within one unit in the last place.
    pub(crate) fn value(&self) -> f64 {
        let (mantissa, exponent) = self.leading();
        times_power_of_two(mantissa, exponent)
    }

    /// The square root as an f64, within one unit in the last place.
    pub(crate) fn root(&self) -> f64 {
        let (mantissa, exponent) = self.leading();
        // The exponent is even, as words have 64 bits and the lowest unit is an even power of 2.
        times_power_of_two(mantissa.sqrt(), exponent / 2)
    }

    /// The highest words as mantissa · 2^exponent.
    fn leading(&self) -> (f64, i32) {
        let top = self.words.iter().rposition(|word| *word != 0).unwrap_or(0).max(2);
        let mantissa = self.words[top - 2..=top].iter().rev().fold(0.0, |high, word| high * 2f64.powi(64) + *word as f64);
        (mantissa, (top as i32 - 2) * 64 + Self::UNIT)
    }
}

/// Σxy and Σ|xy|, each within a few units in the last place.
pub(crate) fn dot(xs: &[f64], ys: &[f64]) -> (f64, f64) {
    let (mut up, mut down, mut all) = (Exact::default(), Exact::default(), Exact::default());
    for (&x, &y) in xs.iter().zip(ys) {
        if (x < 0.0) == (y < 0.0) { &mut up } else { &mut down }.add_product(x, y);
        all.add_product(x, y);
    }
    // Words from the highest on decide which is larger.
    let negative = up.words.iter().rev().lt(down.words.iter().rev());
    (if negative { -down.minus(&up).value() } else { up.minus(&down).value() }, all.value())
}

/// A finite |x| as mantissa · 2^exponent.
fn decompose(x: f64) -> (u64, i32) {
    assert!(x.is_finite());
    let (biased, fraction) = ((x.abs().to_bits() >> 52) as i32, x.to_bits() & ((1 << 52) - 1));
    if biased == 0 { (fraction, -1074) } else { (fraction | (1 << 52), biased - 1075) }
}

/// x · 2^exponent, also where 2^exponent is no f64.
pub(crate) fn times_power_of_two(x: f64, exponent: i32) -> f64 {
    let step = exponent / 4;
    x * 2f64.powi(step) * 2f64.powi(step) * 2f64.powi(step) * 2f64.powi(exponent - 3 * step)
}
