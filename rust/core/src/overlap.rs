//! Which tensors of a list are the same memory, and which share part of it.
//!
//! The same memory twice counts once. Shared parts may be read, and must not be written: the result would depend on the order.
//! The answer is exact: where the address ranges of strided tensors cross (two column blocks of one matrix, say), the bytes are marked one
//! by one.

use crate::error::{Problem, TensorError};
use crate::view::View;

/// Marks the tensors that repeat an earlier one: `Some(index of the first)`.
pub(crate) fn duplicates(views: &[View], order: &[Place]) -> Vec<Option<usize>> {
    let mut first_of = vec![None; views.len()];
    for (position, &(start, index)) in order.iter().enumerate() {
        let starts_alike = order[..position].iter().rev().take_while(|(other, _)| *other == start);
        first_of[index] = starts_alike.map(|&(_, other)| other).filter(|&other| views[other] == views[index]).last();
    }
    first_of
}

/// Refuses tensors that cannot be written one after the other: expanded ones, and those that share memory without being the same.
///
/// # Errors
/// The first fault found, with the tensor's index.
pub(crate) fn check_writable(views: &[View], mut order: Vec<Place>, duplicates: &[Option<usize>]) -> Result<(), TensorError> {
    order.retain(|&(_, index)| duplicates[index].is_none());
    // A cluster is a run of tensors whose address ranges hang together.
    let mut cluster = 0..0;
    let mut end = 0;
    for (position, &(start, index)) in order.iter().enumerate() {
        if start >= end {
            check_cluster(views, &order[cluster])?;
            cluster = position..position;
        }
        cluster.end = position + 1;
        end = end.max(views[index].end());
    }
    check_cluster(views, &order[cluster])
}

/// Address and index of a tensor.
pub(crate) type Place = (usize, usize);

/// Where the tensors are that have elements, by address and then by index.
pub(crate) fn by_address(views: &[View]) -> Vec<Place> {
    let mut order: Vec<Place> =
        views.iter().enumerate().filter(|(_, view)| !view.is_empty()).map(|(index, view)| (view.start() as usize, index)).collect();
    order.sort_unstable();
    order
}

fn check_cluster(views: &[View], cluster: &[Place]) -> Result<(), TensorError> {
    let indices = || cluster.iter().map(|&(_, index)| index);
    // Without room for all its elements a tensor need not be looked at, and an expanded one can be too long to look at.
    let cramped = |index: &usize| views[*index].bytes() > views[*index].end() - views[*index].start() as usize;
    if let Some(index) = indices().find(cramped) {
        return Err(TensorError { index, problem: Problem::Expanded });
    }
    match cluster {
        [] => return Ok(()),
        [(_, only)] if views[*only].is_nested() => return Ok(()),
        _ => {}
    }
    let begin = cluster[0].0;
    let end = indices().map(|index| views[index].end()).max().unwrap_or(begin);
    let mut used = Bytes::new(begin, end);
    for index in indices() {
        if !used.mark(&views[index]) {
            let fits = |others: &[usize]| {
                let mut bytes = Bytes::new(begin, end);
                others.iter().chain([&index]).all(|&other| bytes.mark(&views[other]))
            };
            let other = indices().take_while(|&other| other != index).find(|&other| fits(&[]) && !fits(&[other]));
            return Err(TensorError { index, problem: other.map_or(Problem::Expanded, Problem::Overlaps) });
        }
    }
    Ok(())
}

/// A set of addresses, one bit each.
struct Bytes {
    begin: usize,
    words: Vec<u64>,
}

impl Bytes {
    fn new(begin: usize, end: usize) -> Self {
        Self { begin, words: vec![0; (end - begin).div_ceil(64)] }
    }

    /// Adds the bytes of a tensor; false if one was there already.
    fn mark(&mut self, view: &View) -> bool {
        let base = view.start() as usize - self.begin;
        let size = view.dtype().size();
        let mut fresh = true;
        view.for_each_run(0, view.len(), |offset, count, stride| {
            for element in (0..count as isize).map(|i| base.wrapping_add_signed(offset + i * stride)) {
                for byte in element..element + size {
                    let bit = 1 << (byte % 64);
                    fresh &= self.words[byte / 64] & bit == 0;
                    self.words[byte / 64] |= bit;
                }
            }
        });
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn views(base: &mut [f32], parts: &[(usize, &[i64], &[i64])]) -> Vec<View> {
        let start = base.as_mut_ptr();
        // SAFETY: the parts below stay within `base`, and the views are only compared.
        parts
            .iter()
            .map(|(at, shape, strides)| unsafe { View::new(start.add(*at).cast(), Dtype::F32, shape, Some(strides)).unwrap() })
            .collect()
    }

    fn check(parts: &[(usize, &[i64], &[i64])]) -> Result<(), (usize, Problem)> {
        let mut base = [0.0; 64];
        let views = views(&mut base, parts);
        {
            let order = by_address(&views);
            let duplicates = duplicates(&views, &order);
            check_writable(&views, order, &duplicates)
        }
        .map_err(|error| (error.index, error.problem))
    }

    #[test]
    fn separate_interleaved_and_repeated_tensors_pass() {
        assert_eq!(check(&[(8, &[8], &[1]), (0, &[8], &[1])]), Ok(()));
        assert_eq!(check(&[(0, &[8], &[2]), (1, &[8], &[2])]), Ok(()), "even and odd");
        assert_eq!(check(&[(0, &[8, 3], &[8, 1]), (3, &[8, 5], &[8, 1])]), Ok(()), "column blocks");
        assert_eq!(check(&[(0, &[4, 4], &[4, 1]), (0, &[4, 4], &[1, 4])]), Ok(()), "a matrix and its transpose");
    }

    #[test]
    fn shared_parts_are_refused() {
        assert_eq!(check(&[(0, &[8], &[1]), (7, &[8], &[1])]), Err((1, Problem::Overlaps(0))));
        assert_eq!(check(&[(0, &[32], &[1]), (40, &[2], &[1]), (3, &[2], &[1])]), Err((2, Problem::Overlaps(0))));
        assert_eq!(check(&[(0, &[8, 4], &[8, 1]), (3, &[8, 5], &[8, 1])]), Err((1, Problem::Overlaps(0))));
        assert_eq!(check(&[(0, &[4, 4], &[0, 1])]), Err((0, Problem::Expanded)));
        assert_eq!(check(&[(0, &[4, 4], &[2, 1])]), Err((0, Problem::Expanded)), "sliding windows");
    }

    #[test]
    fn duplicates_point_to_the_first() {
        let mut base = [0.0; 64];
        let views =
            views(&mut base, &[(9, &[4], &[1]), (0, &[4], &[1]), (9, &[2, 2], &[2, 1]), (9, &[3], &[1]), (9, &[4], &[1]), (9, &[0], &[1])]);
        assert_eq!(duplicates(&views, &by_address(&views)), [None, None, Some(0), None, Some(0), None]);
    }
}
