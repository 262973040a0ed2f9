//! The only place where the memory of tensors is read or written. Callers pass blocks and positions within the view.

use std::ptr;

use crate::blocks::Block;
use crate::dtype::Element;
use crate::view::View;

/// The real numbers of a block in place, if they are contiguous and aligned; a complex element is two.
pub(crate) fn slice<E: Element>(view: &View, block: Block) -> Option<&[E]> {
    // SAFETY: `contiguous` has checked layout and alignment, and the block is within the view. Its maker vouches that the memory is valid and
    // nobody writes it while functions of this crate read it (see `View::new`).
    contiguous(view, block).map(|numbers| unsafe { &*numbers })
}

/// As [`slice()`], as a pointer for callers that have the block to themselves and may change it.
pub(crate) fn contiguous<E: Element>(view: &View, block: Block) -> Option<*mut [E]> {
    let size = view.dtype().size();
    let start = view.start().wrapping_add(block.first * size).cast::<E>();
    (view.is_contiguous() && start.is_aligned()).then(|| ptr::slice_from_raw_parts_mut(start, block.count * size / size_of::<E>()))
}

/// Fills the buffer with the elements from `first` on, in the view's order.
pub(crate) fn load<E: Element>(view: &View, first: usize, buffer: &mut [E]) {
    let size = view.dtype().size();
    let mut target = buffer.as_mut_ptr().cast::<u8>();
    copy_runs(view, first, size_of_val(buffer) / size, |source, count, stride| {
        // SAFETY: the runs hold exactly as many elements as the buffer, so `target` advances to its end and no further. Sources are elements
        // of the view, which its maker vouches for. Bytes are copied, so neither side needs alignment, and every bit pattern is an element.
        unsafe {
            if stride == size as isize {
                target.copy_from_nonoverlapping(source, count * size);
            } else {
                for i in 0..count {
                    copy_element(source.offset(i as isize * stride), target.add(i * size), size);
                }
            }
            target = target.add(count * size);
        }
    });
}

/// Writes the buffer over the elements from `first` on.
///
/// # Safety
/// The view may be written, and nobody else may read or write these elements meanwhile.
pub(crate) unsafe fn store<E: Element>(view: &View, first: usize, buffer: &[E]) {
    let size = view.dtype().size();
    let mut source = buffer.as_ptr().cast::<u8>();
    copy_runs(view, first, size_of_val(buffer) / size, |target, count, stride| {
        // SAFETY: as in `load` with the sides exchanged; the caller vouches that the elements may be written and for exclusive use.
        unsafe {
            for i in 0..count {
                copy_element(source.add(i * size), target.offset(i as isize * stride), size);
            }
            source = source.add(count * size);
        }
    });
}

/// Copies one element. With constant sizes the compiler makes a plain move of each case.
///
/// # Safety
/// Both sides must be valid for `size` bytes.
#[inline(always)]
unsafe fn copy_element(source: *const u8, target: *mut u8, size: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            2 => target.copy_from_nonoverlapping(source, 2),
            4 => target.copy_from_nonoverlapping(source, 4),
            8 => target.copy_from_nonoverlapping(source, 8),
            _ => target.copy_from_nonoverlapping(source, size),
        }
    }
}

fn copy_runs(view: &View, first: usize, count: usize, mut copy: impl FnMut(*mut u8, usize, isize)) {
    view.for_each_run(first, count, |offset, count, stride| copy(view.start().wrapping_offset(offset), count, stride));
}
