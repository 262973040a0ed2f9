//! x ← min(max(x, −limit), limit).
//!
//! The limit is rounded to the element's type, as torch does it; elements within it, and NaN, keep their bits. A block is read first and
//! written only where something in it exceeds the limit.

use super::Map;
use crate::dtype::Element;
use crate::isa::{Isa, Op};
use crate::simd::Simd;

/// Clamps to [−limit, limit].
#[derive(Clone, Copy)]
pub struct Clamp {
    /// The limit: not negative, not NaN.
    pub limit: f64,
}

impl Map for Clamp {
    fn apply<E: Element>(self, isa: Isa, elements: &mut [E]) -> bool {
        let limit = E::narrow(self.limit).abs_bits();
        let exceeds = isa.run(Exceeds { limit, elements });
        if exceeds {
            isa.run(Bound { limit, elements });
        }
        exceeds
    }
}

struct Exceeds<'a, E: Element> {
    limit: E::Bits,
    elements: &'a [E],
}

impl<E: Element> Op for Exceeds<'_, E> {
    type Output = bool;

    #[inline(always)]
    fn call<S: Simd>(self, _simd: S) -> bool {
        let infinity = E::narrow(f64::INFINITY).abs_bits();
        let beyond = |x: &E| (x.abs_bits() > self.limit) & (x.abs_bits() <= infinity);
        self.elements.iter().fold(0_u32, |count, x| count + u32::from(beyond(x))) > 0
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
