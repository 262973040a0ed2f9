//! Lists of tensors: what is measured, and what may be changed too.
//!
//! The same memory twice counts once, and is changed once. Whether a list may be changed in place is checked when the list is made; a
//! [`WritableTensors`] is the proof that it was.

use std::ops::Deref;

use crate::blocks::Cut;
use crate::error::{Problem, TensorError};
use crate::overlap::{Repetition, repetitions, writable_repetitions};
use crate::view::View;

/// A list of tensors to be measured.
#[derive(Debug)]
pub struct Tensors {
    views: Vec<View>,
    repetitions: Vec<Repetition>,
    cut: Cut,
    bytes: usize,
}

impl Tensors {
    /// The list of these tensors. Looks at addresses alone, and touches no memory of theirs.
    ///
    /// # Panics
    /// Unwinds with [`OutOfMemory`](crate::OutOfMemory) if there is none for the bookkeeping.
    pub fn new(views: Vec<View>) -> Self {
        let repetitions = repetitions(&views);
        Self::of(views, repetitions)
    }

    fn of(views: Vec<View>, repetitions: Vec<Repetition>) -> Self {
        let mut repeated = repetitions.iter().map(|(index, _)| *index).peekable();
        let mut bytes = 0_usize;
        let cut = Cut::new(views.iter().enumerate().map(|(index, view)| {
            if repeated.next_if_eq(&index).is_some() {
                return 0;
            }
            bytes = bytes.saturating_add(view.bytes());
            view.len()
        }));
        Self { views, repetitions, cut, bytes }
    }

    /// The tensors as they were given.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// All elements, each once.
    pub fn len(&self) -> usize {
        self.cut.elements()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements, each once.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The tensors that repeat earlier ones, in the order of the list.
    pub fn repetitions(&self) -> &[Repetition] {
        &self.repetitions
    }

    pub(crate) fn cut(&self) -> &Cut {
        &self.cut
    }
}

/// Refuses tensors that an operation on real numbers is not defined for.
///
/// # Errors
/// The first complex tensor.
pub fn check_real(views: &[View]) -> Result<(), TensorError> {
    match views.iter().position(|view| view.dtype().is_complex()) {
        Some(index) => Err(TensorError { index, problem: Problem::Complex }),
        None => Ok(()),
    }
}

/// A list of tensors that may be changed in place too: no element is reached twice, neither by one of the tensors nor by two.
#[derive(Debug)]
pub struct WritableTensors(Tensors);

impl WritableTensors {
    /// The list of these tensors, as [`Tensors::new`] makes it.
    ///
    /// # Errors
    /// The first tensor that cannot be written in place: one that is expanded, or that shares memory with another without being the same.
    ///
    /// # Panics
    /// As [`Tensors::new`].
    pub fn new(views: Vec<View>) -> Result<Self, TensorError> {
        let repetitions = writable_repetitions(&views)?;
        Ok(Self(Tensors::of(views, repetitions)))
    }
}

impl Deref for WritableTensors {
    type Target = Tensors;

    fn deref(&self) -> &Tensors {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::BLOCK;
    use crate::dtype::Dtype;

    #[test]
    fn repetitions_are_cut_once() {
        let mut memory = vec![0u16; 2 * BLOCK + 1];
        let lens = [2 * BLOCK + 1, 0, BLOCK, 2 * BLOCK + 1, BLOCK, 7];
        // SAFETY: all views lie in the memory, and are not read.
        let views = lens.map(|len| unsafe { View::new(memory.as_mut_ptr().cast(), Dtype::F16, &[len as i64], None).unwrap() });
        let tensors = Tensors::new(views.to_vec());
        assert_eq!(tensors.repetitions(), [(3, 0), (4, 2)]);
        assert_eq!((tensors.len(), tensors.bytes()), (3 * BLOCK + 8, 6 * BLOCK + 16));
    }
}
