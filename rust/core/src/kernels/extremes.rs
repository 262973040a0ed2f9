//! The largest and the smallest absolute value.
//!
//! Input f16, bf16, f32, f64 → the element's own bits → f64. Exact. The bits of absolute values, as integers, are ordered like the numbers, with
//! infinity above them and NaN above infinity, so that an integer maximum finds all three. The minimum takes the maximum too, to find NaN. An
//! empty block gives 0 and infinity.

use super::Kernel;
use crate::dtype::Element;
use crate::moments::{Largest, Smallest};
use crate::simd::Simd;

/// max|x|.
#[derive(Clone, Copy)]
pub struct MaxAbs;

impl Kernel for MaxAbs {
    type Total = Largest;
    type State<E: Element> = E::Bits;

    #[inline(always)]
    fn start<E: Element>(self) -> E::Bits {
        E::Bits::default()
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, _simd: S, largest: &mut E::Bits, elements: &[E]) {
        *largest = elements.iter().fold(*largest, |largest, x| largest.max(x.abs_bits()));
    }

    #[inline(always)]
    fn finish<E: Element>(self, largest: E::Bits) -> Largest {
        Largest(E::default().with_abs_bits(largest).wide())
    }
}

/// min|x|.
#[derive(Clone, Copy)]
pub struct MinAbs;

impl Kernel for MinAbs {
    type Total = Smallest;
    type State<E: Element> = (E::Bits, E::Bits);

    #[inline(always)]
    fn start<E: Element>(self) -> (E::Bits, E::Bits) {
        (E::narrow(f64::INFINITY).abs_bits(), MaxAbs.start::<E>())
    }

    #[inline(always)]
    fn add<E: Element, S: Simd>(self, _simd: S, (smallest, largest): &mut (E::Bits, E::Bits), elements: &[E]) {
        let reduced = elements.iter().fold((*smallest, *largest), |(least, most), x| (least.min(x.abs_bits()), most.max(x.abs_bits())));
        (*smallest, *largest) = reduced;
    }

    #[inline(always)]
    fn finish<E: Element>(self, (smallest, largest): (E::Bits, E::Bits)) -> Smallest {
        let largest = MaxAbs.finish::<E>(largest).0;
        Smallest(if largest.is_nan() { largest } else { E::default().with_abs_bits(smallest).wide() })
    }
}
