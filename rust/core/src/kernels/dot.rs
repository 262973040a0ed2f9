//! Σxy, Σx² and Σy² of two vectors in one read of both.
//!
//! Two blocks of equal length → f64 lanes → [`Products`]. NaN and infinity pass through; empty blocks give 0.
//! Error bound: as for [`SumOf`](super::SumOf), so Σxy is within 3.7e-15 · Σ|xy|. Products of 16- and 32-bit types are exact. Those of f64 are
//! summed without scaling wherever that keeps the bound, however different the norms of the vectors are: no product and no partial sum
//! exceeds Σ|xy|, and a product that underflows loses less than 2⁻¹⁰⁷⁴. A block is read again at another scale only if its sum comes close to
//! overflow, or if ‖x‖‖y‖ is so small that products that underflow would count.

use std::hint::black_box;

use super::sum::{LANES, Lanes};
use super::{Elements, SumSquares};
use crate::dtype::Element;
use crate::isa::{Isa, Op};
use crate::moments::{Merge, Squares, Sum};
use crate::simd::{Simd, fetch_ahead};

/// The sums of products of two vectors with each other and themselves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Products {
    /// Σxy.
    pub xy: Squares,
    /// Σx².
    pub xx: Squares,
    /// Σy².
    pub yy: Squares,
}

impl Merge for Products {
    const EMPTY: Self = Self { xy: Squares::EMPTY, xx: Squares::EMPTY, yy: Squares::EMPTY };

    fn merge(&mut self, other: &Self) {
        self.xy.merge(&other.xy);
        self.xx.merge(&other.xx);
        self.yy.merge(&other.yy);
    }
}

impl Products {
    /// cos(x, y) = Σxy / (‖x‖‖y‖); NaN where a vector is zero or not finite.
    pub fn cosine(&self) -> f64 {
        let (x, y) = (self.xx.norm(), self.yy.norm());
        if x == 0.0 || y == 0.0 || !x.is_finite() || !y.is_finite() {
            return f64::NAN;
        }
        // Each part is divided by one norm after the other, at its own scale: the product of the norms may overflow.
        let part = |sum: Sum, scale: f64| if sum.value() == 0.0 { 0.0 } else { sum.value() / (x * scale) / (y * scale) };
        let Squares { small, medium, large } = self.xy;
        part(large, Squares::DOWN) + part(medium, 1.0) + part(small, Squares::UP)
    }
}

/// The products of two blocks.
pub fn dot<E: Element>(isa: Isa, x: &[E], y: &[E]) -> Products {
    let at_scale = |scale| isa.run(Rows { scale, x, y }).map(|sum| Squares { medium: sum, ..Squares::EMPTY });
    let [mut xy, xx, yy] = at_scale(1.0);
    if E::EXACT_SQUARES {
        return Products { xy, xx, yy };
    }
    let rescale = |plain, elements| SumSquares.rescaled(plain, &Elements::slice(isa, elements));
    let (xx, yy) = (rescale(xx, x), rescale(yy, y));
    let (x_norm, y_norm) = (xx.norm(), yy.norm());
    if x_norm > 0.0 && y_norm > 0.0 && x_norm * y_norm < *Squares::SAFE.start() {
        // No element times 2⁵³⁸ overflows: an element is at most ‖x‖, which is below 2⁻⁹⁰⁰ / ‖y‖, and ‖y‖ is at least 2⁻¹⁰⁷⁴.
        xy = Squares { small: at_scale(Squares::UP)[0].medium, ..Squares::EMPTY };
    } else if !(0.0..=*Squares::SAFE.end()).contains(&xy.medium.value().abs()) {
        // The sum is large, infinite or NaN. Products that underflow at this scale do not count beside it.
        xy = Squares { large: at_scale(Squares::DOWN)[0].medium, ..Squares::EMPTY };
    }
    Products { xy, xx, yy }
}

struct Rows<'a, E> {
    scale: f64,
    x: &'a [E],
    y: &'a [E],
}

impl<E: Element> Op for Rows<'_, E> {
    type Output = [Sum; 3];

    #[inline(always)]
    fn call<S: Simd>(self, simd: S) -> [Sum; 3] {
        // Where it is always 1, the compiler leaves out the products.
        let scale = if E::EXACT_SQUARES { 1.0 } else { self.scale };
        let (x_rows, x_tail) = self.x.as_chunks::<LANES>();
        let (y_rows, y_tail) = self.y.as_chunks::<LANES>();
        let mut lanes = [Lanes::EMPTY; 3];
        let mut put = |sums: [[f64; LANES]; 3]| (0..3).for_each(|n| lanes[n].put(&sums[n]));
        for (x_rows, y_rows) in x_rows.chunks(E::ROWS).zip(y_rows.chunks(E::ROWS)) {
            let mut sums = [[0.0; LANES]; 3];
            for (x, y) in x_rows.iter().zip(y_rows) {
                fetch_ahead(x);
                fetch_ahead(y);
                let (x, y) = (E::widen(simd, *x), E::widen(simd, *y));
                for i in 0..LANES {
                    let (x, y) = (x[i] * scale, y[i] * scale);
                    sums[0][i] += x * y;
                    sums[1][i] += x * x;
                    sums[2][i] += y * y;
                }
            }
            // See `SumOf` for the reason.
            put(black_box(sums));
        }
        if !x_tail.is_empty() {
            let mut sums = [[0.0; LANES]; 3];
            for (i, (x, y)) in x_tail.iter().zip(y_tail).enumerate() {
                let (x, y) = (x.wide() * scale, y.wide() * scale);
                (sums[0][i], sums[1][i], sums[2][i]) = (x * y, x * x, y * y);
            }
            put(sums);
        }
        lanes.map(Lanes::fold)
    }
}
