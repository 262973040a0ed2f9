//! A tensor in memory: pointer, element type, layout.
//!
//! A [`View`] is made from the shape and strides that a framework reports, and keeps only what a kernel needs: dimensions of size 1 are
//! dropped, negative strides are turned round, dimensions that lie in one run are merged, and the widest stride comes first. So every dense
//! tensor, transposed or not, is one contiguous run, and views of the same memory are equal. The order of elements within a tensor is lost,
//! as no norm depends on it. Where several tensors are read element by element, the others follow the order of the first, see
//! [`View::in_order_of`].

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
    /// In nested loops, the outermost first. Without an order to follow, strides are not negative and descend.
    Strided(Box<[Dim]>),
}

/// One loop of a strided layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Dim {
    size: usize,
    /// In bytes.
    stride: isize,
}

// SAFETY: a View is an address with a description, and whoever makes one promises (see `View::new`) that any thread may use the memory
// while a function of this crate does.
unsafe impl Send for View {}
// SAFETY: as for Send; a shared View gives no access that an owned one does not.
unsafe impl Sync for View {}

impl View {
    /// Describes the memory of one tensor. `strides` count elements, and may be left out for row-major order. Numbers that could overflow
    /// are refused here, so that later arithmetic on sizes and addresses needs no checks.
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
    #[inline(always)]
    pub unsafe fn new(data: *mut u8, dtype: Dtype, shape: &[i64], strides: Option<&[i64]>) -> Result<Self, Problem> {
        let (len, row_major) = checked(data, dtype.size(), shape, strides)?;
        match strides {
            Some(strides) if !row_major => Ok(Self::strided(data, dtype, len, shape, strides, strides)),
            _ => Ok(Self { start: data, dtype, len, layout: Layout::Contiguous }),
        }
    }

    /// Describes a tensor so that its elements come in the order in which those of another tensor, of the same shape and with strides
    /// `leader`, lie in memory. Views in the order of the same leader, its own included, have equal elements of all tensors at equal
    /// positions.
    ///
    /// # Errors
    /// As for [`View::new`].
    ///
    /// # Safety
    /// As for [`View::new`].
    pub unsafe fn in_order_of(
        leader: Option<&[i64]>,
        data: *mut u8,
        dtype: Dtype,
        shape: &[i64],
        strides: Option<&[i64]>,
    ) -> Result<Self, Problem> {
        let (len, row_major) = checked(data, dtype.size(), shape, strides)?;
        if leader.is_some_and(|leader| leader.len() < shape.len()) {
            return Err(Problem::Malformed);
        }
        if row_major && leader.is_none_or(|leader| len < 2 || is_row_major(shape, leader)) {
            return Ok(Self { start: data, dtype, len, layout: Layout::Contiguous });
        }
        let plain = row_major_strides(shape);
        Ok(Self::strided(data, dtype, len, shape, strides.unwrap_or(&plain), leader.unwrap_or(&plain)))
    }

    fn strided(data: *mut u8, dtype: Dtype, len: usize, shape: &[i64], strides: &[i64], leader: &[i64]) -> Self {
        let (offset, layout) = normalize(dtype.size(), shape, strides, leader);
        Self { start: data.wrapping_offset(offset), dtype, len, layout }
    }

    /// A tensor without elements, for one that has no memory in this process.
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

    /// The addresses from the lowest byte to the one after the highest.
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

    /// Whether the elements lie one after the other in one run of memory.
    pub fn is_contiguous(&self) -> bool {
        self.layout == Layout::Contiguous
    }

    /// The loops as stride in bytes and size, the outermost first; none for contiguous elements.
    pub(crate) fn loops(&self) -> impl Iterator<Item = (isize, usize)> + '_ {
        let dims = match &self.layout {
            Layout::Contiguous => &[],
            Layout::Strided(dims) => &**dims,
        };
        dims.iter().map(|dim| (dim.stride, dim.size))
    }

    /// Calls `visit(offset, count, stride)` for each run of evenly spaced elements that together are the elements `first .. first + count` in
    /// the view's order. Offset (from the first element) and stride are in bytes.
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

/// More bytes than any machine's memory holds: a tensor with as many is expanded, or its numbers are wrong.
const MOST_BYTES: usize = if usize::BITS < 64 { isize::MAX as usize } else { 1 << 47 };

/// The number of elements of a tensor, if they take less than [`MOST_BYTES`], and lie less than that apart and in the address space; and
/// whether they lie in row-major order.
#[inline(always)]
fn checked(data: *mut u8, item: usize, shape: &[i64], strides: Option<&[i64]>) -> Result<(usize, bool), Problem> {
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
        return Ok((0, true));
    }
    if data.is_null() {
        return Err(Problem::NullData);
    }
    let bytes = len.saturating_mul(item);
    if bytes > MOST_BYTES {
        return Err(Problem::TooLarge);
    }
    // How far elements reach below and above the element at index 0.
    let (below, above, row_major) = match strides {
        Some(strides) if !is_row_major(shape, strides) => {
            let (below, above) = reach(item, shape, strides).ok_or(Problem::Malformed)?;
            (below, above, false)
        }
        _ => (0, bytes, true),
    };
    let start = data as usize;
    if below <= start && start.checked_add(above).is_some() { Ok((len, row_major)) } else { Err(Problem::Malformed) }
}

/// The bytes from the lowest element to the beginning of the one at index 0, and from there to the end of the highest; None if either is
/// more than [`MOST_BYTES`].
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

#[inline(always)]
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

/// The layout of a tensor of elements of `item` bytes whose loops are nested as the leader's memory lies, and the offset of its first
/// element from the one at index 0, both in bytes.
fn normalize(item: usize, shape: &[i64], strides: &[i64], leader: &[i64]) -> (isize, Layout) {
    let mut offset = 0;
    let mut loops: Vec<(i64, Dim)> = Vec::with_capacity(shape.len());
    for ((&size, &stride), &lead) in shape.iter().zip(strides).zip(leader).filter(|((size, _), _)| **size != 1) {
        let mut stride = stride as isize * item as isize;
        if lead < 0 {
            offset += stride * (size as isize - 1);
            stride = -stride;
        }
        loops.push((lead.saturating_abs(), Dim { size: size as usize, stride }));
    }
    loops.sort_by_key(|(lead, _)| Reverse(*lead));
    let mut dims: Vec<Dim> = Vec::with_capacity(loops.len());
    for (_, dim) in loops {
        match dims.last_mut() {
            Some(outer) if outer.stride == dim.stride * dim.size as isize => *outer = Dim { size: outer.size * dim.size, ..dim },
            _ => dims.push(dim),
        }
    }
    let layout = match dims.as_slice() {
        [dim] if dim.stride == item as isize => Layout::Contiguous,
        _ => Layout::Strided(dims.into()),
    };
    (offset, layout)
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
    fn views_in_one_order_meet_the_same_elements() {
        let (mut base, shape) = ([0.0f32; 24], [2, 3, 4]);
        let start = base.as_mut_ptr().cast();
        let leader = [-1, 8, 2];
        // SAFETY: the views are only asked where their elements lie.
        let view = |strides: Option<&[i64]>| unsafe { View::in_order_of(Some(&leader), start, Dtype::F32, &shape, strides).unwrap() };
        let places = |strides: Option<&[i64]>| {
            let (view, mut places) = (view(strides), Vec::new());
            view.for_each_run(0, 24, |offset, count, stride| {
                places.extend((0..count as isize).map(|i| view.start().wrapping_offset(offset + i * stride) as usize - start as usize));
            });
            places
        };
        let of = |strides: [i64; 3], [i, j, k]: [i64; 3]| (4 * (strides[0] * i + strides[1] * j + strides[2] * k)) as usize;
        let row_major = [12, 4, 1];
        // The leader's memory has the second index outermost, then the third, then the first backwards.
        let indices = || (0..3).flat_map(|j| (0..4).flat_map(move |k| [1, 0].map(|i| [i, j, k])));
        assert!(places(None).into_iter().eq(indices().map(|index| of(row_major, index))));
        assert!(places(Some(&[1, 8, 2])).into_iter().eq(indices().map(|index| of([1, 8, 2], index))));
        // SAFETY: refused.
        let short = unsafe { View::in_order_of(Some(&[1]), start, Dtype::F32, &shape, None) };
        assert_eq!(short, Err(Problem::Malformed));
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
