//! A tensor in memory: pointer, element type, layout.
//!
//! A [`View`] is made from the shape and strides that a framework reports and keeps only what a kernel needs: dimensions of one
//! element gone, negative strides turned round, neighbours merged, the widest stride first. So every dense tensor, transposed or
//! not, becomes one contiguous run, and equal memory makes equal views. The order of elements within a tensor is not kept, as no
//! norm depends on it; where two tensors are read in step, both are described together.

use std::array;
use std::cmp::Reverse;
use std::ops::Range;
use std::ptr;

use crate::dtype::Dtype;
use crate::error::Problem;

/// One tensor's memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    start: *mut u8,
    dtype: Dtype,
    len: usize,
    layout: Layout,
}

/// How the elements lie.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Layout {
    /// One after the other.
    #[default]
    Contiguous,
    /// In nested loops, the widest stride first. Strides are in bytes, and not negative where the tensor was described alone.
    Strided(Box<[Dim]>),
}

/// One loop of a strided layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Dim {
    size: usize,
    stride: isize,
}

// SAFETY: a View is an address with a description, and whoever makes one promises (see `View::new`) that any thread may use the memory
// while a function of this crate does.
unsafe impl Send for View {}
// SAFETY: as for Send; a shared View gives no access that an owned one does not.
unsafe impl Sync for View {}

impl View {
    /// Describes the memory of one tensor; `strides`, in elements, may be left out for row-major order. All later arithmetic on sizes is
    /// safe, for sizes that could overflow are refused here.
    ///
    /// # Errors
    /// [`Problem::Malformed`], [`Problem::TooLarge`], or [`Problem::NullData`] for elements without memory.
    ///
    /// # Safety
    /// The view promises nothing about its memory while nobody uses it: it may be made of any address, compared, and put into lists, which
    /// looks at addresses alone. But whenever a function of this crate runs that reads or writes the elements of a list with this view or
    /// a clone of it in it,
    ///
    /// - the memory of every element that `shape` and `strides` (in elements of `dtype`) reach from `data` must be allocated, initialized
    ///   and valid for reads by any thread; it need not be aligned;
    /// - for the functions that write ([`apply()`](crate::apply()), [`apply_each()`](crate::apply_each()) and [`update()`](crate::update())),
    ///   memory that they write must be valid for writes by any thread too, and nobody else may read or write it until they return;
    /// - for all functions, nobody else may write memory that they read until they return. Others may read it meanwhile.
    pub unsafe fn new(data: *mut u8, dtype: Dtype, shape: &[i64], strides: Option<&[i64]>) -> Result<Self, Problem> {
        // SAFETY: the caller's promise.
        match unsafe { Self::together([data], [dtype], shape, [strides]) } {
            Ok([view]) => Ok(view),
            Err((_, problem)) => Err(problem),
        }
    }

    /// Describes tensors of the same shape so that their elements are met in the same order: that of the first one's memory.
    ///
    /// # Errors
    /// As for [`View::new`], and which of the tensors.
    ///
    /// # Safety
    /// As for [`View::new`], for all of them.
    pub unsafe fn together<const K: usize>(
        data: [*mut u8; K],
        dtype: [Dtype; K],
        shape: &[i64],
        strides: [Option<&[i64]>; K],
    ) -> Result<[Self; K], (usize, Problem)> {
        let mut len = 0;
        for k in 0..K {
            len = checked(data[k], dtype[k].size(), shape, strides[k]).map_err(|problem| (k, problem))?;
        }
        let mut views = array::from_fn(|k| Self { start: data[k], dtype: dtype[k], len, layout: Layout::Contiguous });
        if len > 1 && !strides.iter().flatten().all(|strides| is_row_major(shape, strides)) {
            let row_major = row_major_strides(shape);
            let (offsets, layouts) = normalize(dtype.map(Dtype::size), shape, strides.map(|strides| strides.unwrap_or(&row_major)));
            for (view, (offset, layout)) in views.iter_mut().zip(offsets.into_iter().zip(layouts)) {
                (view.start, view.layout) = (view.start.wrapping_offset(offset), layout);
            }
        }
        Ok(views)
    }

    /// A tensor without elements, to stand where there is none.
    pub fn none(dtype: Dtype) -> Self {
        Self { start: ptr::null_mut(), dtype, len: 0, layout: Layout::Contiguous }
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes of its elements.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// The address of the first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// The addresses of the lowest byte and after the highest.
    pub(crate) fn range(&self) -> Range<usize> {
        let start = self.start as usize;
        let (below, above) = match &self.layout {
            Layout::Contiguous => (0, self.len.saturating_sub(1) * self.dtype.size()),
            Layout::Strided(dims) => dims.iter().fold((0, 0), |(below, above), dim| {
                let reach = (dim.size - 1) * dim.stride.unsigned_abs();
                if dim.stride < 0 { (below + reach, above) } else { (below, above + reach) }
            }),
        };
        if self.len == 0 { start..start } else { start - below..start + above + self.dtype.size() }
    }

    /// Whether the elements lie one after the other, in whatever order.
    pub fn is_contiguous(&self) -> bool {
        self.layout == Layout::Contiguous
    }

    /// The loops as (stride, size), in bytes; none where all lies in one run.
    pub(crate) fn loops(&self) -> impl Iterator<Item = (isize, usize)> + '_ {
        let dims = match &self.layout {
            Layout::Contiguous => &[],
            Layout::Strided(dims) => &**dims,
        };
        dims.iter().map(|dim| (dim.stride, dim.size))
    }

    /// Calls `visit(offset, count, stride)` for the runs, all in bytes but the count, that hold the elements `first .. first + count` in
    /// the view's order.
    pub(crate) fn for_each_run(&self, first: usize, count: usize, mut visit: impl FnMut(isize, usize, isize)) {
        let size = self.dtype.size();
        let Layout::Strided(dims) = &self.layout else {
            return visit((first * size) as isize, count, size as isize);
        };
        let Some((inner, outer)) = dims.split_last() else { return };
        let (mut position, end) = (first, first + count);
        while position < end {
            let (mut row, column) = (position / inner.size, position % inner.size);
            let mut offset = column as isize * inner.stride;
            for dim in outer.iter().rev() {
                offset += (row % dim.size) as isize * dim.stride;
                row /= dim.size;
            }
            let run = (inner.size - column).min(end - position);
            visit(offset, run, inner.stride);
            position += run;
        }
    }
}

/// No machine's memory holds more bytes. What claims to is expanded, or a mistake.
const MOST_BYTES: usize = if usize::BITS < 64 { isize::MAX as usize } else { 1 << 47 };

/// The number of elements of a tensor whose numbers make sense: it has that many in less than [`MOST_BYTES`], and they lie less than that
/// apart and in the address space.
fn checked(data: *mut u8, item: usize, shape: &[i64], strides: Option<&[i64]>) -> Result<usize, Problem> {
    if strides.is_some_and(|strides| strides.len() < shape.len()) {
        return Err(Problem::Malformed);
    }
    let (mut len, mut empty) = (1_usize, false);
    for &size in shape {
        match usize::try_from(size) {
            Ok(0) => empty = true,
            Ok(size) => len = len.saturating_mul(size),
            Err(_) => return Err(Problem::Malformed),
        }
    }
    if empty {
        return Ok(0);
    }
    if data.is_null() {
        return Err(Problem::NullData);
    }
    let bytes = len.saturating_mul(item);
    if bytes > MOST_BYTES {
        return Err(Problem::TooLarge);
    }
    // How far elements reach below and above the beginning of the first.
    let (below, above) = match strides {
        Some(strides) if !is_row_major(shape, strides) => reach(item, shape, strides).ok_or(Problem::Malformed)?,
        _ => (0, bytes),
    };
    let start = data as usize;
    if below <= start && start.checked_add(above).is_some() { Ok(len) } else { Err(Problem::Malformed) }
}

/// The bytes from the lowest to the beginning of the first element, and from there to the end of the highest, if neither is too many.
fn reach(item: usize, shape: &[i64], strides: &[i64]) -> Option<(usize, usize)> {
    let (mut below, mut above) = (0_usize, item);
    for (&size, &stride) in shape.iter().zip(strides).filter(|(size, _)| **size > 1) {
        let step = usize::try_from(stride.unsigned_abs()).ok()?.checked_mul(item)?;
        let reach = usize::try_from(size - 1).ok()?.checked_mul(step)?;
        let side = if stride < 0 { &mut below } else { &mut above };
        *side = side.checked_add(reach).filter(|bytes| *bytes <= MOST_BYTES + item)?;
    }
    Some((below, above))
}

fn is_row_major(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected *= size;
        fits
    })
}

fn row_major_strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// Shape and strides (in elements of `item` bytes) of K tensors of the same shape → for each the offset of its first byte and its loops,
/// which walk all of them in step.
fn normalize<const K: usize>(item: [usize; K], shape: &[i64], strides: [&[i64]; K]) -> ([isize; K], [Layout; K]) {
    let mut offsets = [0; K];
    let mut loops: Vec<(usize, [isize; K])> = Vec::with_capacity(shape.len());
    for (axis, &size) in shape.iter().enumerate().filter(|(_, size)| **size != 1) {
        let mut steps: [isize; K] = array::from_fn(|k| strides[k][axis] as isize * item[k] as isize);
        if steps[0] < 0 {
            for (offset, step) in offsets.iter_mut().zip(&mut steps) {
                *offset += *step * (size as isize - 1);
                *step = -*step;
            }
        }
        loops.push((size as usize, steps));
    }
    loops.sort_by_key(|(_, steps)| Reverse(steps[0]));
    let mut merged: Vec<(usize, [isize; K])> = Vec::with_capacity(loops.len());
    for (size, steps) in loops {
        match merged.last_mut() {
            Some((outer, outer_steps)) if *outer_steps == steps.map(|step| step * size as isize) => {
                (*outer, *outer_steps) = (*outer * size, steps);
            }
            _ => merged.push((size, steps)),
        }
    }
    let layout = |k: usize| match merged.as_slice() {
        [(_, steps)] if steps[k] == item[k] as isize => Layout::Contiguous,
        _ => Layout::Strided(merged.iter().map(|&(size, steps)| Dim { size, stride: steps[k] }).collect()),
    };
    (offsets, array::from_fn(layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(base: &mut [f32], offset: usize, shape: &[i64], strides: &[i64]) -> View {
        // SAFETY: the tests below stay within `base`, which outlives the view.
        unsafe { View::new(base.as_mut_ptr().add(offset).cast(), Dtype::F32, shape, Some(strides)).unwrap() }
    }

    #[test]
    fn dense_tensors_become_one_run() {
        let mut base = [0.0; 24];
        let whole = view(&mut base, 0, &[24], &[1]);
        assert_eq!(whole, view(&mut base, 0, &[2, 3, 4], &[12, 4, 1]));
        assert_eq!(whole, view(&mut base, 0, &[4, 3, 2], &[1, 4, 12]), "transposed");
        assert_eq!(whole, view(&mut base, 23, &[24], &[-1]), "reversed");
        assert_eq!(whole, view(&mut base, 20, &[1, 6, 1, 4], &[7, -4, 9, 1]), "rows reversed");
    }

    #[test]
    fn runs_cover_each_element_once() {
        let mut base = [0.0; 60];
        let strided = view(&mut base, 0, &[3, 4, 2], &[20, 5, 2]);
        let mut seen = Vec::new();
        for first in (0..24).step_by(7) {
            strided.for_each_run(first, 7.min(24 - first), |offset, count, stride| {
                seen.extend((0..count as isize).map(|i| ((offset + i * stride) / 4) as usize));
            });
        }
        seen.sort_unstable();
        let mut expected: Vec<_> = (0..3).flat_map(|i| (0..4).flat_map(move |j| (0..2).map(move |k| i * 20 + j * 5 + k * 2))).collect();
        expected.sort_unstable();
        assert_eq!(seen, expected);
    }

    #[test]
    fn null_is_noticed() {
        // SAFETY: the view is refused, or has no elements.
        let null = |shape: &[i64]| unsafe { View::new(std::ptr::null_mut(), Dtype::F32, shape, None) };
        assert!(matches!(null(&[2]), Err(Problem::NullData)));
        assert!(null(&[0, 5]).unwrap().is_empty());
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        let mut base = [0.0f32; 4];
        let data: *mut u8 = base.as_mut_ptr().cast();
        // SAFETY: nothing is read.
        let view = |shape: &[i64], strides: Option<&[i64]>| unsafe { View::new(data, Dtype::F32, shape, strides) };
        let most = MOST_BYTES as i64 / 4;
        assert_eq!(view(&[most], Some(&[0])).unwrap().len(), most as usize);
        for shape in [&[most + 1][..], &[1 << 24, 1 << 24], &[1 << 31, 1 << 31], &[1 << 32, 1 << 32], &[i64::MAX; 9]] {
            assert_eq!(view(shape, None), Err(Problem::TooLarge));
            assert_eq!(view(shape, Some(&[0; 9])), Err(Problem::TooLarge));
        }
        for (shape, strides) in [
            (&[-1][..], &[1][..]),
            (&[0, -1], &[1, 1]),
            (&[i64::MIN, 2], &[1, 1]),
            (&[2, 2], &[1]),
            (&[2], &[]),
            (&[2], &[i64::MAX]),
            (&[2], &[i64::MIN]),
            (&[3, 3], &[i64::MAX / 8, i64::MAX / 8]),
            (&[2, 2], &[1 << 45, 1 << 45]),
            (&[2, 2], &[-(1 << 46), 1 << 44]),
        ] {
            assert_eq!(view(shape, Some(strides)), Err(Problem::Malformed), "{shape:?} {strides:?}");
        }
        // Where nothing is reached, strides do not matter.
        assert!(view(&[1, 2], Some(&[i64::MIN, 1])).unwrap().is_contiguous());
        assert!(view(&[1 << 40, 0, 1 << 40], Some(&[i64::MAX, 1, 1])).unwrap().is_empty());
        // SAFETY: refused.
        let at =
            |address: usize, strides: &[i64]| unsafe { View::new(ptr::without_provenance_mut(address), Dtype::F32, &[5], Some(strides)) };
        assert_eq!(at(usize::MAX - 15, &[1]), Err(Problem::Malformed), "beyond the end of the address space");
        assert_eq!(at(15, &[-1]), Err(Problem::Malformed), "before its beginning");
        assert!(at(16, &[-1]).is_ok());
    }
}
