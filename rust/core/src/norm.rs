//! Norms of a list of tensors, as one vector.
//!
//! NaN anywhere makes any norm NaN. Otherwise an infinity makes norms of positive order infinite, counts as one element in order 0, and
//! adds nothing to a negative order. No elements: 0.

use crate::blocks::Tensors;
use crate::kernels::{Abs, Count, Counts, Integer, MaxAbs, MinAbs, Real, SumOf, SumPowers, SumSquares};
use crate::pool::Team;
use crate::reduce::{reduce, total};
use crate::strict::StrictFloats;

/// ‖x‖ of the given order: (Σ|x|^p)^(1/p), max|x| for ∞, min|x| for −∞, the number of elements that are not 0 for 0.
///
/// An order that is NaN gives NaN.
pub fn norm(tensors: &Tensors, order: f64, team: Team) -> f64 {
    if tensors.is_empty() {
        return 0.0;
    }
    let _strict = StrictFloats::enter();
    if order == 2.0 {
        total(tensors, SumSquares, team).norm()
    } else if order == 1.0 {
        total(tensors, SumOf(Abs), team).value()
    } else if order == f64::INFINITY {
        total(tensors, MaxAbs, team).0
    } else if order == f64::NEG_INFINITY {
        total(tensors, MinAbs, team).0
    } else if order == 0.0 {
        let counts = total(tensors, Count, team);
        if counts.nans > 0 { f64::NAN } else { (tensors.len() as u64 - counts.zeros) as f64 }
    } else if order == 3.0 {
        total(tensors, SumPowers(Integer::<3>), team).norm()
    } else if order == 4.0 {
        total(tensors, SumPowers(Integer::<4>), team).norm()
    } else {
        total(tensors, SumPowers(Real(order)), team).norm()
    }
}

/// The tensors with NaN or infinite elements: index and counts.
pub fn nonfinite(tensors: &Tensors, team: Team) -> Vec<(usize, Counts)> {
    let counts = reduce(tensors, Count, team);
    counts.into_iter().enumerate().filter(|(_, counts)| counts.nans + counts.infs > 0).collect()
}
