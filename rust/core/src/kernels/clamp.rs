//! x ← min(max(x, −limit), limit).
//!
//! The limit is rounded to the element's type, as torch does it; elements within it, and NaN, keep their bits. A block is read first and
//! written only where something in it exceeds the limit.

use super::{Block, Map, MaxAbs};
use crate::dtype::Element;
use crate::isa::{Isa, Op};
use crate::simd::Simd;

/// Clamps to [−limit, limit].
#[derive(Clone, Copy)]
pub struct Clamp {
    /// Not negative, not NaN.
    pub limit: f64,
}

impl Map for Clamp {
    fn apply<E: Element>(self, isa: Isa, elements: &mut [E]) -> bool {
        let limit = E::narrow(self.limit);
        let largest = Block::slice(isa, elements).pass(MaxAbs).0;
        // NaN hides what else the block holds.
        let exceeds = largest > limit.wide() || largest.is_nan();
        if exceeds {
            isa.run(Bound { limit: limit.abs_bits(), elements });
        }
        exceeds
    }
}

struct Bound<'a, E: Element> {
    limit: E::Bits,
    elements: &'a mut [E],
}

impl<E: Element> Op for Bound<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, _simd: S) {
        let infinity = E::narrow(f64::INFINITY).abs_bits();
        for x in self.elements {
            let bits = x.abs_bits();
            let bounded = bits.min(self.limit);
            *x = x.with_abs_bits(if bits > infinity { bits } else { bounded });
        }
    }
}
