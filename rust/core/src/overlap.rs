//! Which tensors of a list are the same memory, and which share part of it.
//!
//! The same memory twice counts once. Memory that several tensors share in part may be read but not written, as the result would depend on
//! the order of the writes. Where some tensors are written and others only read, the latter may share memory among themselves.
//!
//! The answer is found from addresses, shapes and strides alone. Tensors are sorted by address, and only those whose ranges overlap
//! are compared further. Of these, column blocks of one matrix are compared by what each covers of a row, in the same way. For the pairs that
//! are left, [`crate::lattice`] decides. Where it gives up, the pair counts as overlapping.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::{Problem, TensorError, room};
use crate::lattice::reaches;
use crate::view::View;

/// The index of a tensor that repeats an earlier one, and the index of the first of its kind.
pub type Repetition = (usize, usize);

/// The tensors that repeat an earlier one, in the order of the list. Looks at addresses alone, so the memory may be on any device.
pub fn repetitions(views: &[View]) -> Vec<Repetition> {
    repetitions_among(views, &by_address(views))
}

/// As [`repetitions()`], of tensors that are to be written in place.
///
/// # Errors
/// The first tensor that cannot be: one that is expanded, or that shares memory with another without being the same.
pub fn writable_repetitions(views: &[View]) -> Result<Vec<Repetition>, TensorError> {
    let mut order = by_address(views);
    let repetitions = repetitions_among(views, &order);
    if !repetitions.is_empty() {
        order.retain(|(_, index)| repetitions.binary_search_by_key(index, |(index, _)| *index).is_err());
    }
    check_writable(views, &order, |_| true)?;
    Ok(repetitions)
}

fn repetitions_among(views: &[View], order: &[Place]) -> Vec<Repetition> {
    let mut found = Vec::new();
    for alike in order.chunk_by(|(a, _), (b, _)| a == b).filter(|alike| alike.len() > 1) {
        let mut firsts = HashMap::new();
        for &(_, index) in alike {
            let first = *firsts.entry(&views[index]).or_insert(index);
            if first != index {
                found.push((index, first));
            }
        }
    }
    found.sort_unstable();
    found
}

/// Checks that the tensors at the given places for which `written` holds can be written: that none is expanded, and that none shares memory
/// with another tensor at these places. The others are only read.
///
/// # Errors
/// The first fault found, with the tensor's index.
pub(crate) fn check_writable(views: &[View], order: &[Place], written: impl Fn(usize) -> bool) -> Result<(), TensorError> {
    if let Some(&(_, index)) = order.iter().find(|(_, index)| written(*index) && reaches_twice(&views[*index])) {
        return Err(TensorError { index, problem: Problem::Expanded });
    }
    let range = |&(start, index): &Place| (start as isize, views[index].range().end as isize);
    for cluster in clusters(order, range) {
        let footprints: Vec<Footprint> = order[cluster].iter().map(|&(_, index)| Footprint::of(&views[index], index)).collect();
        let parts = (0..footprints.len()).map(|at| Part { at, start: footprints[at].start, depth: 0 }).collect();
        check_parts(&footprints, parts, &|a, b| match (written(a.index), written(b.index)) {
            (false, false) => Ok(()),
            _ if !a.meets(b) => Ok(()),
            (true, false) => Err(TensorError { index: b.index, problem: Problem::Overlaps(a.index) }),
            (false, true) => Err(TensorError { index: a.index, problem: Problem::Overlaps(b.index) }),
            (true, true) => Err(TensorError { index: a.index.max(b.index), problem: Problem::Overlaps(a.index.min(b.index)) }),
        })?;
    }
    Ok(())
}

/// The lowest address of a tensor, and its index.
pub(crate) type Place = (usize, usize);

/// The places of the tensors that have elements, sorted by address and then by index.
pub(crate) fn by_address(views: &[View]) -> Vec<Place> {
    let mut order = room(views.len());
    order.extend(views.iter().enumerate().filter(|(_, view)| !view.is_empty()).map(|(index, view)| (view.range().start, index)));
    order.sort_unstable();
    order
}

/// Groups of two and more items with overlapping ranges, of items sorted by where their ranges begin.
fn clusters<T>(sorted: &[T], range: impl Fn(&T) -> (isize, isize)) -> impl Iterator<Item = Range<usize>> {
    let (mut begin, mut end) = (0, isize::MIN);
    (0..=sorted.len()).filter_map(move |position| {
        let next = sorted.get(position).map(&range);
        if let Some((start, its_end)) = next
            && (start < end || position == 0)
        {
            end = end.max(its_end);
            return None;
        }
        let cluster = begin..position;
        (begin, end) = (position, next.map_or(end, |(_, its_end)| its_end));
        (cluster.len() > 1).then_some(cluster)
    })
}

/// The bytes that a tensor covers: `solid` consecutive ones at each place that the loops reach from `start`.
struct Footprint {
    index: usize,
    start: isize,
    solid: usize,
    /// Stride and size, the widest stride first. Strides are positive; loops that only extend the solid bytes are left out.
    loops: Vec<(usize, usize)>,
}

impl Footprint {
    fn of(view: &View, index: usize) -> Self {
        let mut loops: Vec<(usize, usize)> =
            view.loops().map(|(stride, size)| (stride.unsigned_abs(), size)).filter(|(stride, _)| *stride > 0).collect();
        // In the order of another tensor, loops come in any order.
        loops.sort_unstable_by(|a, b| b.cmp(a));
        let mut solid = if view.is_contiguous() { view.bytes() } else { view.dtype().size() };
        while let Some((_, size)) = loops.pop_if(|(stride, _)| *stride == solid) {
            solid *= size;
        }
        Self { index, start: view.range().start as isize, solid, loops }
    }

    /// The bytes between the lowest and the highest place that the loops from `depth` on reach.
    fn reach(&self, depth: usize) -> usize {
        self.loops[depth..].iter().map(|(stride, size)| stride * (size - 1)).sum()
    }

    /// Whether the two share a byte. True also where that could not be decided.
    fn meets(&self, other: &Self) -> bool {
        // They do if start + Σ stride·x + u = start' + Σ stride'·x' + v for offsets u, v within the solid bytes. With x counted from the other
        // end, x → size − 1 − x, both sums have the same sign.
        let distance = (other.start - self.start + other.reach(0) as isize) as i128;
        let (low, high) = (distance - (self.solid as i128 - 1), distance + (other.solid as i128 - 1));
        let terms = self.loops.iter().chain(&other.loops).map(|&(stride, size)| (stride as i128, size as i128 - 1));
        reaches(terms, low, high).unwrap_or(true)
    }
}

/// Whether several indices of a tensor reach the same byte. True also where that could not be decided.
fn reaches_twice(view: &View) -> bool {
    if view.is_contiguous() {
        return false;
    }
    // A range smaller than its elements take, or a stride of 0, needs no search.
    if view.bytes() > view.range().len() || view.loops().any(|(stride, _)| stride == 0) {
        return true;
    }
    let Footprint { solid, loops, .. } = Footprint::of(view, 0);
    let near = solid as i128 - 1;
    // Two indices first differ in loop `first`, by 1 or more, and in the loops after it by −(size − 1) to size − 1. Terms count from 0, so
    // each difference is counted from its smallest value, and `least` is the sum of these.
    (0..loops.len()).any(|first| {
        let (stride, size) = (loops[first].0 as i128, loops[first].1 as i128);
        let after = loops[first + 1..].iter().map(|&(stride, size)| (stride as i128, 2 * (size as i128 - 1)));
        let least: i128 = stride - after.clone().map(|(stride, twice)| stride * twice / 2).sum::<i128>();
        reaches(after.chain([(stride, size - 2)]), -near - least, near - least).unwrap_or(true)
    })
}

/// What a tensor covers without its first `depth` loops, whose strides it shares with all tensors that it is compared with.
struct Part {
    at: usize,
    start: isize,
    depth: usize,
}

/// Calls `check` for each pair of tensors whose parts have overlapping ranges.
fn check_parts<E>(
    footprints: &[Footprint],
    mut parts: Vec<Part>,
    check: &impl Fn(&Footprint, &Footprint) -> Result<(), E>,
) -> Result<(), E> {
    let end = |part: &Part| part.start + (footprints[part.at].reach(part.depth) + footprints[part.at].solid) as isize;
    parts.sort_unstable_by_key(|part| (part.start, part.at));
    for cluster in clusters(&parts, |part| (part.start, end(part))) {
        let cluster = &parts[cluster];
        if let Some(inner) = within_rows(footprints, cluster) {
            check_parts(footprints, inner, check)?;
            continue;
        }
        let mut open: Vec<&Part> = Vec::new();
        for part in cluster {
            open.retain(|other| end(other) > part.start);
            for other in open.iter().filter(|other| other.at != part.at) {
                check(&footprints[other.at], &footprints[part.at])?;
            }
            open.push(part);
        }
    }
    Ok(())
}

/// The parts by what they cover of a row, if all have the same widest stride, the length of the row, and none covers more than that in one
/// step. Two tensors meet if they do within a row.
fn within_rows(footprints: &[Footprint], parts: &[Part]) -> Option<Vec<Part>> {
    let outer = |part: &Part| footprints[part.at].loops.get(part.depth).map(|(stride, _)| *stride);
    let row = outer(parts.first()?)?;
    let mut inner = Vec::with_capacity(parts.len());
    for part in parts {
        let (footprint, depth) = (&footprints[part.at], part.depth + 1);
        if outer(part) != Some(row) || footprint.reach(depth) + footprint.solid > row {
            return None;
        }
        let start = part.start.rem_euclid(row as isize);
        inner.push(Part { at: part.at, start, depth });
        if start as usize + footprint.reach(depth) + footprint.solid > row {
            // Its end is in the next row, where others may begin.
            inner.push(Part { at: part.at, start: start - row as isize, depth });
        }
    }
    Some(inner)
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
        writable_repetitions(&views).map(drop).map_err(|error| (error.index, error.problem))
    }

    fn check_first_written(parts: &[(usize, &[i64], &[i64])]) -> Result<(), (usize, Problem)> {
        let mut base = [0.0; 64];
        let views = views(&mut base, parts);
        check_writable(&views, &by_address(&views), |index| index == 0).map_err(|error| (error.index, error.problem))
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
    fn what_is_only_read_may_share_memory_with_its_like() {
        assert_eq!(check_first_written(&[(0, &[8], &[1]), (8, &[8], &[1]), (9, &[4, 4], &[0, 1]), (8, &[8], &[1])]), Ok(()));
        assert_eq!(check_first_written(&[(0, &[8], &[2]), (1, &[8], &[2]), (3, &[2, 4], &[0, 2])]), Ok(()), "even and odd");
        assert_eq!(check_first_written(&[(8, &[8], &[1]), (0, &[4], &[1]), (7, &[4], &[1])]), Err((2, Problem::Overlaps(0))));
        assert_eq!(check_first_written(&[(8, &[8], &[1]), (8, &[8], &[1])]), Err((1, Problem::Overlaps(0))));
        assert_eq!(check_first_written(&[(8, &[8, 2], &[1, 0]), (0, &[4], &[1])]), Err((0, Problem::Expanded)));
        assert_eq!(check_first_written(&[(9, &[4], &[1]), (8, &[4, 4], &[0, 1])]), Err((1, Problem::Overlaps(0))), "and is expanded");
    }

    #[test]
    fn repetitions_point_to_the_first() {
        let mut base = [0.0; 64];
        let views =
            views(&mut base, &[(9, &[4], &[1]), (0, &[4], &[1]), (9, &[2, 2], &[2, 1]), (9, &[3], &[1]), (9, &[4], &[1]), (9, &[0], &[1])]);
        assert_eq!(repetitions(&views), [(2, 0), (4, 0)]);
    }
}
