//! Norms of a list of tensors, as one vector.
//!
//! NaN anywhere makes any norm NaN. Otherwise an infinity makes norms of positive order infinite, counts as one element in order 0, and
//! adds nothing in negative orders. The norm of no elements is 0.

use crate::kernels::{Abs, Count, Counts, Integer, MaxAbs, MinAbs, Real, SumOf, SumPowers, SumSquares};
use crate::moments::canonical;
use crate::reduce::{reduce, reduce_all};
use crate::team::Team;
use crate::tensors::Tensors;

/// ‖x‖ of the given order: (Σ|x|^p)^(1/p), max|x| for ∞, min|x| for −∞, the number of elements that are not 0 for 0.
///
/// An order that is NaN gives NaN.
pub fn norm(tensors: &Tensors, order: f64, team: Team) -> f64 {
    if tensors.is_empty() {
        return 0.0;
    }
    canonical(if order == 2.0 {
        reduce_all(tensors, SumSquares, team).norm()
    } else if order == 1.0 {
        reduce_all(tensors, SumOf(Abs), team).value()
    } else if order == f64::INFINITY {
        reduce_all(tensors, MaxAbs, team).0
    } else if order == f64::NEG_INFINITY {
        reduce_all(tensors, MinAbs, team).0
    } else if order == 0.0 {
        let counts = reduce_all(tensors, Count, team);
        if counts.nans > 0 { f64::NAN } else { (tensors.len() as u64 - counts.zeros) as f64 }
    } else if order == 3.0 {
        reduce_all(tensors, SumPowers(Integer::<3>), team).norm()
    } else if order == 4.0 {
        reduce_all(tensors, SumPowers(Integer::<4>), team).norm()
    } else {
        reduce_all(tensors, SumPowers(Real(order)), team).norm()
    })
}

/// What hard clipping to a limit multiplies a vector of this norm by: min(1, limit / (norm + epsilon)). NaN for a norm of NaN, if there is a
/// limit; 0 for an infinite norm.
pub fn hard_coefficient(limit: f64, norm: f64, epsilon: f64) -> f64 {
    let size = norm + epsilon;
    // Sizes are compared, not the quotient with 1: 0/0 and inf/inf are NaN.
    if size <= limit || limit == f64::INFINITY { 1.0 } else { limit / size }
}

/// The tensors with NaN or infinite elements: index and counts.
pub fn nonfinite(tensors: &Tensors, team: Team) -> Vec<(usize, Counts)> {
    let counts = reduce(tensors, Count, team);
    counts.into_iter().enumerate().filter(|(_, counts)| counts.nans + counts.infs > 0).collect()
}
