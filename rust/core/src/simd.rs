//! What a kernel may use beyond plain Rust: one conversion that the hardware does in one instruction and plain Rust in eight.
//!
//! A capability is a type whose existence proves that the CPU has it; [`crate::Isa::run`] hands one to every computation.

/// The conversion, in plain Rust unless the instruction set has better.
pub trait Simd: Copy {
    /// Widens 32 half-precision numbers, given by their bits, to f32. Exact.
    #[inline(always)]
    fn widen_halves(self, halves: [u16; 32]) -> [f32; 32] {
        halves.map(widen_half)
    }
}

/// What every CPU has.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {}

/// Widens a half-precision number, given by its bits, to f32. Exact.
#[inline(always)]
pub(crate) fn widen_half(half: u16) -> f32 {
    // Put exponent and mantissa where f32 has them and multiply by 2^112 to correct the exponent's bias. The product is exact, also
    // for subnormal halves, which arrive as subnormal f32. Infinity and NaN, whose exponent is all ones, need all of f32's.
    let magnitude = u32::from(half & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | (u32::from(half & 0x8000) << 16))
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128i, __m256i, _mm256_cvtph_ps, _mm512_cvtph_ps};
    use std::mem::transmute;

    use super::Simd;

    /// AVX2 and F16C.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());

    /// AVX-512 F.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(());

    impl Avx2 {
        /// # Safety
        /// The CPU must have AVX2 and F16C.
        #[inline(always)]
        pub(crate) unsafe fn assume() -> Self {
            Self(())
        }
    }

    impl Avx512 {
        /// # Safety
        /// The CPU must have AVX-512 F.
        #[inline(always)]
        pub(crate) unsafe fn assume() -> Self {
            Self(())
        }
    }

    impl Simd for Avx2 {
        #[inline(always)]
        fn widen_halves(self, halves: [u16; 32]) -> [f32; 32] {
            // SAFETY: plain bits of the same size; `self` proves F16C.
            unsafe {
                let halves: [__m128i; 4] = transmute(halves);
                transmute(halves.map(|eight| _mm256_cvtph_ps(eight)))
            }
        }
    }

    impl Simd for Avx512 {
        #[inline(always)]
        fn widen_halves(self, halves: [u16; 32]) -> [f32; 32] {
            // SAFETY: plain bits of the same size; `self` proves AVX-512 F.
            unsafe {
                let [low, high]: [__m256i; 2] = transmute(halves);
                transmute([_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)])
            }
        }
    }
}
