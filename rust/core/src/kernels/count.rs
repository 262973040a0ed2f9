//! How many elements are zero, NaN and infinite.
//!
//! Input f16, bf16, f32, f64 → 32-bit counters, enough for a block → u64. Exact; an empty block gives 0.

use super::Kernel;
use crate::dtype::Element;
use crate::moments::Merge;
use crate::simd::Simd;

/// Counts of special values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Elements equal to 0.
    pub zeros: u64,
    /// Elements that are NaN.
    pub nans: u64,
    /// Elements that are inf or −inf.
    pub infs: u64,
}

impl Merge for Counts {
    const EMPTY: Self = Self { zeros: 0, nans: 0, infs: 0 };

    fn merge(&mut self, other: &Self) {
        self.zeros += other.zeros;
        self.nans += other.nans;
        self.infs += other.infs;
    }
}

/// Counts zeros, NaN and infinities.
#[derive(Clone, Copy)]
pub struct Count;

impl Kernel for Count {
    type Total = Counts;
    type State<E: Element> = [u32; 3];

    #[inline(always)]
    fn start<E: Element>(self) -> [u32; 3] {
        [0; 3]
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, _simd: S, counters: &mut [u32; 3], elements: &[E]) {
        let infinity = E::narrow(f64::INFINITY).abs_bits();
        *counters = elements.iter().fold(*counters, |[zeros, nans, infs], x| {
            let bits = x.abs_bits();
            [zeros + u32::from(bits == E::Bits::default()), nans + u32::from(bits > infinity), infs + u32::from(bits == infinity)]
        });
    }

    #[inline(always)]
    fn finish<E: Element>(self, counters: [u32; 3]) -> Counts {
        let [zeros, nans, infs] = counters.map(u64::from);
        Counts { zeros, nans, infs }
    }
}
