//! A tensor in memory: pointer, element type, layout.
//!
//! A [`View`] is made from the shape and strides that a framework reports and keeps only what a kernel needs: dimensions of one
//! element gone, negative strides turned round, neighbours merged, the widest stride first. So every dense tensor, transposed or
//! not, becomes one contiguous run, and equal memory makes equal views. The order of elements within a tensor is not kept: nothing
//! that is computed here depends on it.

use std::cmp::Reverse;

use crate::dtype::Dtype;
use crate::error::Problem;

/// One tensor's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    start: *mut u8,
    dtype: Dtype,
    len: usize,
    layout: Layout,
}

/// How the elements lie.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Layout {
    /// One after the other.
    Contiguous,
    /// In nested loops, the widest stride first. Strides are in bytes and not negative.
    Strided(Box<[Dim]>),
}

/// One loop of a strided layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dim {
    size: usize,
    stride: usize,
}

// SAFETY: a View is an address with a description. Whoever makes one promises (see `View::new`) that the memory may be used from any
// thread for as long as the view is passed to the functions of this crate.
unsafe impl Send for View {}
// SAFETY: as for Send; a shared View gives no access that an owned one does not.
unsafe impl Sync for View {}

impl View {
    /// Describes the memory of one tensor; `strides`, in elements, may be left out for row-major order.
    ///
    /// # Errors
    /// [`Problem::NullData`] for elements without memory.
    ///
    /// # Panics
    /// If there are fewer strides than dimensions.
    ///
    /// # Safety
    /// While the view is in use by this crate, every element that shape and strides reach from `data` must be valid for reads, and for writes
    /// where the view is passed to [`apply()`](crate::apply()), and nobody else may write it.
    pub unsafe fn new(data: *mut u8, dtype: Dtype, shape: &[i64], strides: Option<&[i64]>) -> Result<Self, Problem> {
        let len = shape.iter().map(|&size| size.max(0) as usize).product();
        if len > 0 && data.is_null() {
            return Err(Problem::NullData);
        }
        let mut view = Self { start: data, dtype, len, layout: Layout::Contiguous };
        if let Some(strides) = strides
            && len > 1
            && !is_row_major(shape, strides)
        {
            (view.start, view.layout) = normalize(data, dtype.size(), shape, strides);
        }
        Ok(view)
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
    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    /// The address after the last byte.
    pub(crate) fn end(&self) -> usize {
        let reach: usize = match &self.layout {
            Layout::Contiguous => self.len.saturating_sub(1) * self.dtype.size(),
            Layout::Strided(dims) => dims.iter().map(|dim| (dim.size - 1) * dim.stride).sum(),
        };
        self.start as usize + if self.len == 0 { 0 } else { reach + self.dtype.size() }
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        self.layout == Layout::Contiguous
    }

    /// Whether each loop steps over all that the loops inside it reach, so that no byte is reached twice.
    pub(crate) fn is_nested(&self) -> bool {
        let Layout::Strided(dims) = &self.layout else { return true };
        let mut reach = self.dtype.size();
        dims.iter().rev().all(|dim| {
            let fits = dim.stride >= reach;
            reach += (dim.size - 1) * dim.stride;
            fits
        })
    }

    /// Calls `visit(offset, count, stride)` for the runs, all in bytes but the count, that hold the elements `first .. first + count` in the view's order.
    pub(crate) fn for_each_run(&self, first: usize, count: usize, mut visit: impl FnMut(usize, usize, usize)) {
        let size = self.dtype.size();
        let Layout::Strided(dims) = &self.layout else {
            return visit(first * size, count, size);
        };
        let Some((inner, outer)) = dims.split_last() else { return };
        let (mut position, end) = (first, first + count);
        while position < end {
            let (mut row, column) = (position / inner.size, position % inner.size);
            let mut offset = column * inner.stride;
            for dim in outer.iter().rev() {
                offset += row % dim.size * dim.stride;
                row /= dim.size;
            }
            let run = (inner.size - column).min(end - position);
            visit(offset, run, inner.stride);
            position += run;
        }
    }
}

fn is_row_major(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected *= size;
        fits
    })
}

fn normalize(data: *mut u8, item: usize, shape: &[i64], strides: &[i64]) -> (*mut u8, Layout) {
    assert!(strides.len() >= shape.len(), "{} strides for {} dimensions", strides.len(), shape.len());
    let mut start = data;
    let mut dims: Vec<Dim> = Vec::with_capacity(shape.len());
    for (&size, &stride) in shape.iter().zip(strides).filter(|(size, _)| **size != 1) {
        let (size, stride) = (size as usize, stride as isize * item as isize);
        if stride < 0 {
            start = start.wrapping_offset(stride * (size as isize - 1));
        }
        dims.push(Dim { size, stride: stride.unsigned_abs() });
    }
    dims.sort_by_key(|dim| Reverse(dim.stride));
    let mut merged: Vec<Dim> = Vec::with_capacity(dims.len());
    for dim in dims {
        match merged.last_mut() {
            Some(outer) if outer.stride == dim.stride * dim.size => {
                *outer = Dim { size: outer.size * dim.size, stride: dim.stride };
            }
            _ => merged.push(dim),
        }
    }
    match merged.as_slice() {
        [dim] if dim.stride == item => (start, Layout::Contiguous),
        _ => (start, Layout::Strided(merged.into())),
    }
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
                seen.extend((0..count).map(|i| (offset + i * stride) / 4));
            });
        }
        seen.sort_unstable();
        let mut expected: Vec<_> = (0..3).flat_map(|i| (0..4).flat_map(move |j| (0..2).map(move |k| i * 20 + j * 5 + k * 2))).collect();
        expected.sort_unstable();
        assert_eq!(seen, expected);
    }

    #[test]
    fn nesting_and_null_are_noticed() {
        let mut base = [0.0; 4];
        assert!(!view(&mut base, 0, &[3, 4], &[0, 1]).is_nested());
        assert!(!view(&mut base, 0, &[2, 2], &[1, 1]).is_nested());
        assert!(view(&mut base, 0, &[1, 4], &[0, 1]).is_nested());
        assert!(view(&mut base, 0, &[2, 2], &[2, 1]).is_nested());
        // SAFETY: the view is refused, or has no elements.
        let null = |shape: &[i64]| unsafe { View::new(std::ptr::null_mut(), Dtype::F32, shape, None) };
        assert!(matches!(null(&[2]), Err(Problem::NullData)));
        assert!(null(&[0, 5]).unwrap().is_empty());
    }
}
