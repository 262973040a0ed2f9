//! Norms as torch has them: 0-dim tensors.

use std::ptr;

use normclip_core::strict;
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;

use crate::dlpack::ManagedTensorVersioned;
use crate::producer::exchange_api;
use crate::torch::tensor_type;

/// A tensor with its number.
#[repr(C)]
struct Scalar {
    tensor: ManagedTensorVersioned,
    number: [u8; 8],
}

/// A number as a 0-dim torch tensor in CPU memory: of float64, or rounded to the nearest float32.
#[pyfunction]
pub(crate) fn as_tensor(py: Python<'_>, number: f64, double: bool) -> PyResult<Bound<'_, PyAny>> {
    let api = match tensor_type(py)? {
        Some(kind) => exchange_api(&kind)?,
        None => None,
    };
    let Some(adopt) = api.and_then(|api| api.adopt) else { return made_by_torch(py, number, double) };
    let mut bytes = number.to_ne_bytes();
    if !double {
        bytes[..4].copy_from_slice(&strict(|| number as f32).to_ne_bytes());
    }
    let scalar = Box::into_raw(Box::<Scalar>::new_uninit()).cast::<Scalar>();
    // SAFETY: the memory is allocated, and nobody else knows of it.
    unsafe {
        let number = &raw mut (*scalar).number;
        number.write(bytes);
        (&raw mut (*scalar).tensor).write(ManagedTensorVersioned::scalar(number.cast(), if double { 64 } else { 32 }, free));
    }
    let mut tensor = ptr::null_mut();
    // SAFETY: we are attached to the interpreter. The function takes the scalar over.
    if unsafe { adopt(scalar.cast(), &raw mut tensor) } != 0 {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: it has succeeded, so this is a new reference.
    unsafe { Bound::from_owned_ptr_or_err(py, tensor.cast()) }
}

/// Frees a [`Scalar`], for who has taken it over.
///
/// # Safety
/// The pointer is of a `Scalar` that `as_tensor` has made, and is not used after this.
unsafe extern "C" fn free(scalar: *mut ManagedTensorVersioned) {
    // SAFETY: the caller's promise: it comes from `Box::into_raw`.
    drop(unsafe { Box::from_raw(scalar.cast::<Scalar>()) });
}

/// What torch makes of the number itself, for torch before 2.10. It takes ten times as long.
fn made_by_torch(py: Python<'_>, number: f64, double: bool) -> PyResult<Bound<'_, PyAny>> {
    let torch = py.import("torch")?;
    let arguments = [("dtype", torch.getattr(if double { "float64" } else { "float32" })?)].into_py_dict(py)?;
    arguments.set_item("device", "cpu")?;
    strict(|| torch.call_method("tensor", (number,), Some(&arguments)))
}
