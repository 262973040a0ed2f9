//! Element types: how each is widened, compared by its bits, and rounded back.
//!
//! Contract: `wide` is exact for every type, as f16, bf16, f32 and f64 all fit into f64; roundings are to nearest even. Conversions are
//! branch-free integer and float operations, so that they vectorize on every instruction set and give the same bits on each, of NaN too:
//! `times` by a normal number keeps the sign and payload of a NaN and makes it quiet, as hardware does. Which of two NaN an operation
//! returns, and the sign of a NaN that it makes, depend on the instruction. So `narrow` and `store`, which end other computations, return
//! the positive quiet NaN without payload for every NaN.

use std::ops::{Add, Div, Mul, Sub};

use crate::simd::{Simd, narrow_single, widen_half};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// A pair of f32.
    C64,
    /// A pair of f64.
    C128,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 | Self::C64 => 8,
            Self::C128 => 16,
        }
    }

    /// Real numbers in one element: 2 for complex types.
    pub fn parts(self) -> usize {
        if self.is_complex() { 2 } else { 1 }
    }

    /// Whether an element is a pair of real numbers.
    pub fn is_complex(self) -> bool {
        matches!(self, Self::C64 | Self::C128)
    }

    /// Whether its numbers have more than f32's precision.
    pub fn is_double(self) -> bool {
        matches!(self, Self::F64 | Self::C128)
    }

    /// The name that NumPy and PyTorch use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::C64 => "complex64",
            Self::C128 => "complex128",
        }
    }
}

/// A type in which updates are computed. Its operations are those of IEEE 754, each rounded to nearest, on every instruction set.
pub trait Float:
    Copy + PartialEq + PartialOrd + Default + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// The one NaN for all.
    const NAN: Self;

    /// The nearest value of this type.
    fn of(value: f64) -> Self;

    /// The value of an f32, exactly.
    fn of_single(value: f32) -> Self;

    /// The nearest f32.
    fn single(self) -> f32;

    /// The value in f64, exactly.
    fn wide(self) -> f64;

    /// The square root.
    fn root(self) -> Self;

    /// Whether it is NaN.
    fn is_nan(self) -> bool;
}

impl Float for f32 {
    const NAN: Self = Self::NAN;

    #[inline(always)]
    fn of(value: f64) -> Self {
        value as Self
    }
    #[inline(always)]
    fn of_single(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn single(self) -> f32 {
        self
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

impl Float for f64 {
    const NAN: Self = Self::NAN;

    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn of_single(value: f32) -> Self {
        Self::from(value)
    }
    #[inline(always)]
    fn single(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
}

/// Whether there is a NaN. A row is looked at as a whole, since a choice for each number takes as long as to compute it.
#[inline(always)]
fn has_nan<W: Float>(row: &[W; 32]) -> bool {
    row.iter().fold(false, |found, x| found | x.is_nan())
}

/// Numbers with the one NaN for all.
#[inline(always)]
fn one_nan<W: Float>(row: [W; 32]) -> [W; 32] {
    if has_nan(&row) { row.map(|x| if x.is_nan() { W::NAN } else { x }) } else { row }
}

/// A real number in memory.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// An unsigned integer of the same size. For absolute values its order is the order of the numbers, with infinity above every
    /// finite number and NaN above infinity, so that an integer maximum finds all three.
    type Bits: Copy + Default + Ord + Into<u64> + From<bool> + Add<Output = Self::Bits>;

    /// The type in which it is multiplied, to be rounded once at the end: f32, or f64 for f64.
    type Native: Float;

    /// A type with digits to spare, in which nearly all roundings before the last are lost in it: f32 for the 16-bit types, else f64.
    type Work: Float;

    /// Whether the product of two values is exact in f64, and can neither overflow nor underflow there.
    const EXACT_SQUARES: bool;

    /// Rows that are summed in plain f64 before the sums are carried into pairs: fewer for f64, whose squares are rounded already.
    const ROWS: usize;

    /// The bits of the absolute value.
    fn abs_bits(self) -> Self::Bits;

    /// The number with this one's sign and an absolute value of these bits.
    fn with_abs_bits(self, bits: Self::Bits) -> Self;

    /// The value in f64, exactly.
    fn wide(self) -> f64;

    /// 32 values in f64, exactly, in an order that is fixed for the type.
    #[inline(always)]
    fn widen<S: Simd>(_simd: S, row: [Self; 32]) -> [f64; 32] {
        row.map(Self::wide)
    }

    /// The absolute values of 32.
    #[inline(always)]
    fn magnitudes(row: [Self; 32]) -> [Self; 32] {
        row.map(|x| Self::default().with_abs_bits(x.abs_bits()))
    }

    /// The nearest value of this type; for the 16-bit types by way of f32, as torch does it. One NaN for all.
    fn narrow(value: f64) -> Self;

    /// 32 values in a type that holds them: exact.
    fn load<W: Float, S: Simd>(simd: S, row: [Self; 32]) -> [W; 32];

    /// The values nearest to 32 numbers, ties to even. One NaN for all.
    fn store<W: Float, S: Simd>(simd: S, row: [W; 32]) -> [Self; 32];

    /// A coefficient in the precision in which this type is multiplied: f32, or f64 for f64.
    fn factor(coefficient: f64) -> Self::Native;

    /// The product with a normal number, computed in its precision and rounded to this type. NaN stays what it is, but quiet.
    fn times(self, factor: Self::Native) -> Self;

    /// The products of 32.
    #[inline(always)]
    fn scaled<S: Simd>(_simd: S, row: [Self; 32], factor: Self::Native) -> [Self; 32] {
        row.map(|x| x.times(factor))
    }
}

/// A half precision number by its bits.
#[derive(Clone, Copy, Default, Debug)]
#[repr(transparent)]
pub struct F16(pub u16);

/// A bfloat16 number by its bits.
#[derive(Clone, Copy, Default, Debug)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl F16 {
    /// The value in f32, exactly.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        widen_half(self.0)
    }

    /// The nearest half, ties to even. NaN stays what it is, cut and quiet.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        Self(narrow_single(value))
    }
}

impl Bf16 {
    /// The value in f32, exactly.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    /// The nearest bfloat16, ties to even. NaN stays what it is, cut and quiet.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        // A NaN must not be rounded: the carry could make it zero.
        if bits & 0x7fff_ffff > 0x7f80_0000 { Self((bits >> 16 | 0x40) as u16) } else { Self::rounded(value) }
    }

    /// The nearest number to one that is not NaN, or that is [`f32::NAN`], whose carry stays within its payload.
    #[inline(always)]
    fn rounded(value: f32) -> Self {
        let bits = value.to_bits();
        Self((bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

/// The implementation of both 16-bit types: they differ in their conversions to and from f32, and in the items that are passed.
macro_rules! half_element {
    ($half:ty $(, $better:item)*) => {
        impl Element for $half {
            $($better)*

            type Bits = u16;
            type Native = f32;
            type Work = f32;
            const EXACT_SQUARES: bool = true;
            const ROWS: usize = 32;

            #[inline(always)]
            fn abs_bits(self) -> u16 {
                self.0 & 0x7fff
            }
            #[inline(always)]
            fn with_abs_bits(self, bits: u16) -> Self {
                Self((self.0 & 0x8000) | bits)
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self.to_f32())
            }
            #[inline(always)]
            fn narrow(value: f64) -> Self {
                Self::from_f32(if value.is_nan() { f32::NAN } else { value as f32 })
            }
            #[inline(always)]
            fn factor(coefficient: f64) -> f32 {
                coefficient as f32
            }
            #[inline(always)]
            fn times(self, factor: f32) -> Self {
                Self::from_f32(self.to_f32() * factor)
            }
        }
    };
}
half_element!(
    F16,
    #[inline(always)]
    fn widen<S: Simd>(simd: S, row: [Self; 32]) -> [f64; 32] {
        Self::load(simd, row)
    },
    #[inline(always)]
    fn load<W: Float, S: Simd>(simd: S, row: [Self; 32]) -> [W; 32] {
        simd.widen_halves(row.map(|half| half.0)).map(W::of_single)
    },
    #[inline(always)]
    fn store<W: Float, S: Simd>(simd: S, row: [W; 32]) -> [Self; 32] {
        simd.narrow_singles(one_nan(row.map(W::single))).map(Self)
    },
    #[inline(always)]
    fn scaled<S: Simd>(simd: S, row: [Self; 32], factor: f32) -> [Self; 32] {
        simd.narrow_singles(Self::load(simd, row).map(|x: f32| x * factor)).map(Self)
    }
);
half_element!(
    Bf16,
    // Two numbers are the halves of a 32-bit word, and a shift and a mask make each an f32 without moving bits between vector lanes. So the
    // first 16 results are those at even places, and the others those at odd ones.
    #[inline(always)]
    fn widen<S: Simd>(_simd: S, row: [Self; 32]) -> [f64; 32] {
        // SAFETY: both are 64 bytes of plain bits.
        let words: [u32; 16] = unsafe { std::mem::transmute(row) };
        let mut wide = [0.0; 32];
        for (i, word) in words.into_iter().enumerate() {
            wide[i] = f64::from(f32::from_bits(word << 16));
            wide[16 + i] = f64::from(f32::from_bits(word & 0xffff_0000));
        }
        wide
    },
    #[inline(always)]
    fn load<W: Float, S: Simd>(_simd: S, row: [Self; 32]) -> [W; 32] {
        row.map(|x| W::of_single(x.to_f32()))
    },
    #[inline(always)]
    fn store<W: Float, S: Simd>(_simd: S, row: [W; 32]) -> [Self; 32] {
        one_nan(row.map(W::single)).map(Self::rounded)
    },
    #[inline(always)]
    fn scaled<S: Simd>(_simd: S, row: [Self; 32], factor: f32) -> [Self; 32] {
        let products = row.map(|x| x.to_f32() * factor);
        if has_nan(&products) { products.map(Self::from_f32) } else { products.map(Self::rounded) }
    },
    // In words, as `widen` reads words.
    #[inline(always)]
    fn magnitudes(row: [Self; 32]) -> [Self; 32] {
        // SAFETY: both are 64 bytes of plain bits.
        unsafe {
            let words: [u32; 16] = std::mem::transmute(row);
            std::mem::transmute(words.map(|word| word & 0x7fff_7fff))
        }
    }
);

/// The implementation of f32 and f64.
macro_rules! float_element {
    ($float:ident, $bits:ty, exact_squares = $exact:literal, from = $from:ident, to = $to:ident) => {
        impl Element for $float {
            type Bits = $bits;
            type Native = $float;
            type Work = f64;
            const EXACT_SQUARES: bool = $exact;
            const ROWS: usize = if $exact { 32 } else { 8 };

            #[inline(always)]
            fn abs_bits(self) -> $bits {
                self.to_bits() & (<$bits>::MAX >> 1)
            }
            #[inline(always)]
            fn with_abs_bits(self, bits: $bits) -> Self {
                Self::from_bits((self.to_bits() & !(<$bits>::MAX >> 1)) | bits)
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn narrow(value: f64) -> Self {
                if value.is_nan() { Self::NAN } else { value as Self }
            }
            #[inline(always)]
            fn factor(coefficient: f64) -> Self {
                coefficient as Self
            }
            #[inline(always)]
            fn times(self, factor: Self) -> Self {
                self * factor
            }
            #[inline(always)]
            fn load<W: Float, S: Simd>(_simd: S, row: [Self; 32]) -> [W; 32] {
                row.map(W::$from)
            }
            #[inline(always)]
            fn store<W: Float, S: Simd>(_simd: S, row: [W; 32]) -> [Self; 32] {
                one_nan(row.map(W::$to))
            }
        }
    };
}
float_element!(f32, u32, exact_squares = true, from = of_single, to = single);
float_element!(f64, u64, exact_squares = false, from = of, to = wide);
