//! Random numbers from a seed, and layouts and values made of them.

use normclip_core::Dtype;

/// A generator of random numbers: SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    pub(crate) fn within(&mut self, low: i32, high: i32) -> i32 {
        low + self.below((high - low + 1) as usize) as i32
    }

    /// A random number in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// Shape and strides of one to four dimensions and at most `most` elements.
    pub(crate) fn layout(&mut self, most: usize) -> (Vec<i64>, Vec<i64>) {
        let mut room = most;
        let shape: Vec<i64> = (0..=self.below(4))
            .map(|_| {
                let size = if self.below(50) == 0 { 0 } else { 1 + self.below(room.min(100)) };
                room /= size.max(1);
                size as i64
            })
            .collect();
        let strides = self.strides(&shape);
        (shape, strides)
    }

    /// Strides by which no two indices have the same address: dimensions in any order and direction, with gaps.
    pub(crate) fn strides(&mut self, shape: &[i64]) -> Vec<i64> {
        let mut axes: Vec<usize> = (0..shape.len()).collect();
        self.shuffle(&mut axes);
        let (mut strides, mut reach) = (vec![0; shape.len()], 1);
        for axis in axes {
            let stride = reach + [0, 0, 1, 2][self.below(4)];
            reach = stride * shape[axis].max(1);
            strides[axis] = if self.below(3) == 0 { -stride } else { stride };
        }
        strides
    }
}

/// The range of the magnitudes of random values, as exponents of 2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Magnitudes {
    pub(crate) low: i32,
    pub(crate) high: i32,
    /// Whether only the smallest and the largest exponent are drawn.
    pub(crate) ends: bool,
    /// One of so many values is zero; if 0, none is.
    pub(crate) zeros: usize,
}

impl Magnitudes {
    pub(crate) const ORDINARY: Self = Self { low: -4, high: 0, ends: false, zeros: 0 };

    /// Smallest and largest exponent that a test should draw: from the smallest subnormal number up, with room for sums of f64.
    pub(crate) fn limits(dtype: Dtype) -> (i32, i32) {
        match dtype {
            Dtype::F16 => (-24, 15),
            Dtype::Bf16 => (-133, 127),
            Dtype::F32 | Dtype::C64 => (-149, 127),
            Dtype::F64 => (-1074, 1000),
            // The absolute value of a complex number of subnormal parts is a subnormal f64, which has few significant bits.
            Dtype::C128 => (-1000, 1000),
        }
    }

    /// A random part of what the type can hold.
    pub(crate) fn any(dtype: Dtype, random: &mut Random) -> Self {
        let (least, most) = Self::limits(dtype);
        let center = random.within(least, most);
        let reach = [0, 3, 30, 3000][random.below(4)];
        Self {
            low: (center - reach).max(least),
            high: (center + reach).min(most),
            ends: random.below(4) == 0,
            zeros: [0, 2, 50][random.below(3)],
        }
    }

    /// A value. Rounding it to the element type moves it by a bit at most.
    pub(crate) fn draw(&self, random: &mut Random) -> f64 {
        if self.zeros > 0 && random.below(self.zeros) == 0 {
            return 0.0;
        }
        let exponent = match self.ends {
            true => [self.low, self.high][random.below(2)],
            false => random.within(self.low, self.high),
        };
        let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
        // Less than 2, as rounding could otherwise make the largest numbers infinite.
        let mantissa = sign * (1.0 + 0.99 * random.unit());
        super::oracle::times_power_of_two(mantissa, exponent)
    }
}
