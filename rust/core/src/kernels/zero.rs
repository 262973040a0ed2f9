//! x ← 0 where x is NaN or infinite.
//!
//! All other elements keep their bits. A block is read first, and written only if it has something to replace.

use super::{Elements, Map, MaxAbs};
use crate::dtype::Element;
use crate::isa::{Isa, Op};
use crate::simd::Simd;

/// Replaces NaN and infinities by 0.
#[derive(Clone, Copy)]
pub struct ZeroNonfinite;

impl Map for ZeroNonfinite {
    fn apply<E: Element>(self, isa: Isa, elements: &mut [E]) -> bool {
        let found = !Elements::slice(isa, elements).pass(MaxAbs).0.is_finite();
        if found {
            isa.run(Replace { elements });
        }
        found
    }
}

struct Replace<'a, E> {
    elements: &'a mut [E],
}

impl<E: Element> Op for Replace<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, _simd: S) {
        let infinity = E::narrow(f64::INFINITY).abs_bits();
        for x in self.elements {
            *x = if x.abs_bits() < infinity { *x } else { E::default() };
        }
    }
}
