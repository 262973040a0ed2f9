//! What can be wrong with a list of tensors, which are named by their indices.

use std::fmt;
use std::panic::resume_unwind;

/// A fault of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Its shape or strides describe no tensor: negative or missing numbers, addresses that no memory has.
    Malformed,
    /// It has more elements than any memory holds, as only expanded tensors have. Reading it would take days.
    TooLarge,
    /// It has elements but no memory, as meta and fake tensors do.
    NullData,
    /// Several of its indices reach the same memory.
    Expanded,
    /// It shares memory with the tensor at this index without being the same.
    Overlaps(usize),
    /// It is complex, and the operation is defined for real numbers only.
    Complex,
}

/// A fault, and the index of the tensor that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorError {
    /// Position in the list.
    pub index: usize,
    /// What is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed => f.write_str("has a shape or strides that no tensor in memory can have: pass a copy made by a library that you trust"),
            Self::TooLarge => {
                f.write_str("has more elements than memory can hold (expanded or broadcast): pass what it was expanded from, or a part of it")
            }
            Self::NullData => f.write_str("has elements but no memory (a meta, fake or wrapper tensor): materialize it first"),
            Self::Expanded => f.write_str(
                "reaches the same memory by several indices (expanded or broadcast) and cannot be written in place: pass a copy, such as .clone()",
            ),
            Self::Overlaps(other) => {
                write!(f, "shares part of its memory with tensor {other}: pass tensors that do not overlap, such as copies")
            }
            Self::Complex => f.write_str("is complex, and this is defined for real numbers only: pass a real view of it, such as torch.view_as_real"),
        }
    }
}

impl fmt::Display for TensorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor {} {}", self.index, self.problem)
    }
}

impl std::error::Error for TensorError {}

/// The payload of the unwinding that reports a lack of memory for a list. It prints no message, as a panic would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

impl OutOfMemory {
    /// Unwinds with this payload.
    pub(crate) fn unwind() -> ! {
        resume_unwind(Box::new(Self))
    }
}

/// An empty vector with capacity for `len` items, for what grows with the caller's list.
///
/// # Panics
/// Unwinds with [`OutOfMemory`] where the standard library would abort the process.
pub fn room<T>(len: usize) -> Vec<T> {
    let mut vec = Vec::new();
    if vec.try_reserve_exact(len).is_err() {
        OutOfMemory::unwind();
    }
    vec
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn what_does_not_fit_unwinds() {
        assert!(room::<u64>(10).capacity() >= 10);
        for len in [usize::MAX, usize::MAX / 16] {
            let outcome = catch_unwind(|| room::<u64>(len));
            assert_eq!(outcome.unwrap_err().downcast_ref(), Some(&OutOfMemory));
        }
    }
}
