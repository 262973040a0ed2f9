//! What can be wrong with a list of tensors. The caller knows their names; here they have indices.

use std::fmt;

/// A fault of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
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
