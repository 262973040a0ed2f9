//! How a tensor is called in an error: by its place in what the user passed.

use std::borrow::Cow;

use normclip_core::{Problem, TensorError};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Where the tensors of a list come from.
pub(crate) enum Names {
    /// They were passed themselves, under this name.
    Tensors(Cow<'static, str>),
    /// They are pairs, of which one was passed in `xs` and one in `ys`, one after the other.
    Pairs,
    /// They are the gradients of the parameters at these positions.
    Grads(Vec<usize>),
    /// They are parameters of an optimizer, by group and place there, and what belongs to them.
    Members(Vec<(usize, usize, Role)>),
}

/// What a tensor is to an optimizer.
#[derive(Clone, Copy)]
pub(crate) enum Role {
    Parameter,
    /// What the optimizer keeps for the parameter from step to step, by this name.
    State(&'static str),
    Gradient,
}

impl Names {
    /// Of tensors that were passed under this name.
    pub(crate) fn tensors(name: impl Into<Cow<'static, str>>) -> Self {
        Self::Tensors(name.into())
    }

    /// The name of a tensor, as in `parameters[3].grad`.
    pub(crate) fn of(&self, index: usize) -> String {
        match self {
            Self::Tensors(name) => format!("{name}[{index}]"),
            Self::Pairs => format!("{}[{}]", if index.is_multiple_of(2) { "xs" } else { "ys" }, index / 2),
            Self::Grads(positions) => match positions.get(index) {
                Some(position) => format!("parameters[{position}].grad"),
                None => format!("gradient {index}"),
            },
            Self::Members(roles) => match roles.get(index) {
                Some((group, place, role)) => {
                    let parameter = format!("param_groups[{group}]['params'][{place}]");
                    match role {
                        Role::Parameter => parameter,
                        Role::State(name) => format!("the {name} of {parameter}"),
                        Role::Gradient => format!("{parameter}.grad"),
                    }
                }
                None => format!("tensor {index}"),
            },
        }
    }

    /// The place of a tensor in what was passed.
    pub(crate) fn position(&self, index: usize) -> usize {
        match self {
            Self::Tensors(_) | Self::Pairs | Self::Members(_) => index,
            Self::Grads(positions) => positions.get(index).copied().unwrap_or(index),
        }
    }

    /// The name with element type and shape, as far as the object tells them.
    pub(crate) fn describe(&self, index: usize, object: &Bound<'_, PyAny>) -> String {
        let text = |attribute: &str| object.getattr(attribute).and_then(|value| value.str()).map(|text| text.to_string());
        let shape =
            object.getattr("shape").and_then(|shape| shape.try_iter()?.map(|size| size?.extract::<i64>()).collect::<PyResult<Vec<_>>>());
        match (text("dtype"), shape) {
            (Ok(dtype), Ok(shape)) => format!("{} ({dtype}, shape {shape:?})", self.of(index)),
            _ => self.of(index),
        }
    }

    /// The Python error for a sparse tensor whose elements are sums of several terms.
    pub(crate) fn uncoalesced(&self, index: usize, object: &Bound<'_, PyAny>) -> PyErr {
        PyValueError::new_err(format!(
            "{} is sparse with repeated indices, so its terms are not its elements: coalesce() it first",
            self.describe(index, object)
        ))
    }

    /// The Python error for a tensor that code of others has changed while it was in use.
    pub(crate) fn changed(&self, index: usize, object: &Bound<'_, PyAny>) -> PyErr {
        PyRuntimeError::new_err(format!(
            "{} has got other memory since it was taken: a rule, or the __dlpack__ of another tensor, may not change it",
            self.describe(index, object)
        ))
    }

    /// The Python error for a fault that the core has found.
    pub(crate) fn fault(&self, error: TensorError, object: &Bound<'_, PyAny>) -> PyErr {
        let problem = match error.problem {
            // The core counts in the list that it was given.
            Problem::Overlaps(other) => error.problem.to_string().replace(&format!("tensor {other}"), &self.of(other)),
            problem => problem.to_string(),
        };
        let message = format!("{} {problem}", self.describe(error.index, object));
        if error.problem == Problem::Complex { PyTypeError::new_err(message) } else { PyValueError::new_err(message) }
    }
}
