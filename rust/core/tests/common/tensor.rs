//! A tensor that owns its memory, read and written element by element.

use std::alloc::{self, Layout};

use half::{bf16, f16};
use normclip_core::{Dtype, View};

use super::random::{Magnitudes, Random};

/// Memory, and a tensor in it. The allocation ends with the tensor's last byte, so that tools which watch the heap see a read beyond it, and
/// everything that is not an element holds NaN, so that tests see the others.
pub(crate) struct Tensor {
    memory: *mut u8,
    heap: Layout,
    dtype: Dtype,
    shape: Vec<i64>,
    strides: Vec<i64>,
    /// The offset of the element whose indices are all 0.
    origin: usize,
}

impl Tensor {
    /// A tensor with strides in elements. Its memory begins `offset` bytes after an aligned address.
    pub(crate) fn strided(dtype: Dtype, shape: &[i64], strides: &[i64], offset: usize) -> Self {
        let reach = |sign: i64| -> i64 {
            shape.iter().zip(strides).map(|(size, stride)| (size - 1).max(0) * (sign * stride).max(0)).sum::<i64>() * dtype.size() as i64
        };
        let (before, after) = (reach(-1) as usize, reach(1) as usize + dtype.size());
        let heap = Layout::from_size_align(offset + before + after, 16).unwrap();
        // SAFETY: the size is not 0.
        let memory = unsafe { alloc::alloc(heap) };
        assert!(!memory.is_null());
        // SAFETY: just allocated, of this size.
        unsafe { memory.write_bytes(0xff, heap.size()) };
        Self { memory, heap, dtype, shape: shape.to_vec(), strides: strides.to_vec(), origin: offset + before }
    }

    /// A contiguous tensor.
    pub(crate) fn dense(dtype: Dtype, len: usize, offset: usize) -> Self {
        Self::strided(dtype, &[len as i64], &[1], offset)
    }

    pub(crate) fn filled(self, magnitudes: Magnitudes, random: &mut Random) -> Self {
        let parts: Vec<f64> = self.parts().iter().map(|_| magnitudes.draw(random)).collect();
        self.holding(&parts)
    }

    /// The same with these real numbers, two for each complex element.
    pub(crate) fn holding(self, parts: &[f64]) -> Self {
        let offsets = self.part_offsets();
        assert_eq!(offsets.len(), parts.len());
        for (&offset, &part) in offsets.iter().zip(parts) {
            // SAFETY: offsets of parts lie in the memory, which is ours.
            unsafe { self.write_part(offset, part) };
        }
        self
    }

    /// The same with real numbers of these bits, drawn in the order of the elements.
    pub(crate) fn of_patterns(self, mut draw: impl FnMut() -> u64) -> Self {
        let size = self.dtype.size() / self.dtype.parts();
        for offset in self.part_offsets() {
            // SAFETY: offsets of parts lie in the memory, which is ours, with room for a part.
            unsafe { self.memory.add(offset).copy_from_nonoverlapping(draw().to_le_bytes().as_ptr(), size) };
        }
        self
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    pub(crate) fn view(&self) -> View {
        // SAFETY: every element lies in the memory, which lives as long as the tensor; tests keep the tensor while they use the view.
        unsafe { View::new(self.memory.add(self.origin), self.dtype, &self.shape, Some(&self.strides)).unwrap() }
    }

    /// The same elements described by other strides: dimensions in opposite order, each of them backwards.
    pub(crate) fn view_reversed(&self) -> View {
        let last: i64 = self.shape.iter().zip(&self.strides).map(|(size, stride)| (size - 1).max(0) * stride).sum();
        let origin = self.origin as i64 + last * self.dtype.size() as i64;
        let shape: Vec<i64> = self.shape.iter().rev().copied().collect();
        let strides: Vec<i64> = self.strides.iter().rev().map(|stride| -stride).collect();
        // SAFETY: as in `view`; these are the same elements.
        unsafe { View::new(self.memory.add(origin as usize), self.dtype, &shape, Some(&strides)).unwrap() }
    }

    /// Both tensors, which have the same shape, in the order of this one.
    pub(crate) fn view_with(&self, other: &Self) -> [View; 2] {
        Self::views_of([self, other])
    }

    /// Tensors of the same shape, in the order of the first.
    pub(crate) fn views_of<const K: usize>(tensors: [&Self; K]) -> [View; K] {
        assert!(tensors.iter().all(|tensor| tensor.shape == tensors[0].shape));
        // SAFETY: as in `view`, for all of them.
        unsafe {
            let leader = Some(tensors[0].strides.as_slice());
            let view = |tensor: &Self| {
                let start = tensor.memory.add(tensor.origin);
                View::in_order_of(leader, start, tensor.dtype, &tensor.shape, Some(&tensor.strides)).unwrap()
            };
            tensors.map(view)
        }
    }

    /// The offset of each element.
    pub(crate) fn offsets(&self) -> Vec<usize> {
        offsets(self.dtype, &self.shape, &self.strides, self.origin as i64)
    }

    /// The real numbers, two for each complex element, exactly.
    pub(crate) fn parts(&self) -> Vec<f64> {
        let read = |offset: usize| {
            // SAFETY: offsets of parts lie in the memory, whose bytes are all initialized.
            unsafe {
                let part = self.memory.add(offset);
                match self.dtype {
                    Dtype::F16 => f16::from_bits(part.cast::<u16>().read_unaligned()).to_f64(),
                    Dtype::Bf16 => bf16::from_bits(part.cast::<u16>().read_unaligned()).to_f64(),
                    Dtype::F32 | Dtype::C64 => f64::from(part.cast::<f32>().read_unaligned()),
                    Dtype::F64 | Dtype::C128 => part.cast::<f64>().read_unaligned(),
                }
            }
        };
        self.part_offsets().into_iter().map(read).collect()
    }

    /// All bytes of the memory.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        // SAFETY: all of the allocation, initialized; the tests that call this have no writer running.
        unsafe { std::slice::from_raw_parts(self.memory, self.heap.size()) }.to_vec()
    }

    /// The bytes that belong to no element.
    pub(crate) fn gaps(&self) -> Vec<u8> {
        let mut bytes = self.bytes().into_iter().map(Some).collect::<Vec<_>>();
        for offset in self.offsets() {
            bytes[offset..offset + self.dtype.size()].fill(None);
        }
        bytes.into_iter().flatten().collect()
    }

    fn part_offsets(&self) -> Vec<usize> {
        let (size, part) = (self.dtype.size(), self.dtype.size() / self.dtype.parts());
        self.offsets().into_iter().flat_map(|offset| (offset..offset + size).step_by(part)).collect()
    }

    /// # Safety
    /// A part of this tensor's type must fit at the offset.
    unsafe fn write_part(&self, offset: usize, value: f64) {
        // SAFETY: the caller's promise.
        unsafe {
            let part = self.memory.add(offset);
            match self.dtype {
                Dtype::F16 => part.cast::<u16>().write_unaligned(f16::from_f64(value).to_bits()),
                Dtype::Bf16 => part.cast::<u16>().write_unaligned(bf16::from_f64(value).to_bits()),
                Dtype::F32 | Dtype::C64 => part.cast::<f32>().write_unaligned(value as f32),
                Dtype::F64 | Dtype::C128 => part.cast::<f64>().write_unaligned(value),
            }
        }
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: allocated in `strided` with this layout.
        unsafe { alloc::dealloc(self.memory, self.heap) };
    }
}

// SAFETY: the memory is the tensor's own.
unsafe impl Send for Tensor {}
// SAFETY: it is only written through views, by tests that let nobody else read meanwhile.
unsafe impl Sync for Tensor {}

/// The offset of each element in bytes, computed index by index.
pub(crate) fn offsets(dtype: Dtype, shape: &[i64], strides: &[i64], origin: i64) -> Vec<usize> {
    let size = dtype.size() as i64;
    let mut offsets = vec![origin];
    for (&count, &stride) in shape.iter().zip(strides) {
        offsets = offsets.iter().flat_map(|offset| (0..count).map(move |index| offset + index * stride * size)).collect();
    }
    offsets.into_iter().map(|offset| usize::try_from(offset).unwrap()).collect()
}
