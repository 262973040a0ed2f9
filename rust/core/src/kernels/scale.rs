//! x ← x · c.
//!
//! f16, bf16 and f32 are multiplied in f32 by the coefficient rounded to f32, f64 in f64; the product is rounded to the element's type, to
//! nearest even. NaN and infinity follow IEEE multiplication. A NaN keeps sign and payload, and becomes quiet; where the coefficient is no
//! normal number, every NaN is written as the positive quiet one without payload.

use super::Map;
use crate::dtype::Element;
use crate::isa::{Isa, Op};
use crate::simd::{Simd, fetch_ahead};

/// Multiplies by a coefficient.
#[derive(Clone, Copy)]
pub struct Scale {
    /// The coefficient.
    pub coefficient: f64,
}

impl Map for Scale {
    fn apply<E: Element>(self, isa: Isa, elements: &mut [E]) -> bool {
        let Self { coefficient } = self;
        if (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&coefficient.abs()) {
            isa.run(Multiply { factor: E::factor(coefficient), elements });
        } else {
            // Rounded to f32 the coefficient would be subnormal or infinite, where the product may be neither. And a coefficient of 0 or NaN
            // makes NaN of elements that are none.
            isa.run(MultiplyWide { coefficient, elements });
        }
        true
    }
}

struct Multiply<'a, E: Element> {
    factor: E::Native,
    elements: &'a mut [E],
}

impl<E: Element> Op for Multiply<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, simd: S) {
        let (rows, tail) = self.elements.as_chunks_mut::<32>();
        for row in rows {
            fetch_ahead(row);
            *row = E::scaled(simd, *row, self.factor);
        }
        for x in tail {
            *x = x.times(self.factor);
        }
    }
}

struct MultiplyWide<'a, E> {
    coefficient: f64,
    elements: &'a mut [E],
}

impl<E: Element> Op for MultiplyWide<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, _simd: S) {
        for x in self.elements {
            *x = E::narrow(x.wide() * self.coefficient);
        }
    }
}
