//! What is asked of torch itself, where it is imported.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyString};

/// A module, if it is imported.
pub(crate) fn module<'py>(py: Python<'py>, name: &Bound<'py, PyString>) -> PyResult<Option<Bound<'py, PyAny>>> {
    // The dictionary is looked up once: to import `sys` takes longer than the norm of a small list.
    static MODULES: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
    let modules = MODULES.get_or_try_init(py, || PyResult::Ok(py.import("sys")?.getattr("modules")?.cast_into()?.unbind()))?;
    modules.bind(py).get_item(name)
}

/// torch, if it is imported.
pub(crate) fn torch(py: Python<'_>) -> PyResult<Option<Bound<'_, PyAny>>> {
    module(py, intern!(py, "torch"))
}

/// `torch.Tensor`, if torch is imported.
pub(crate) fn tensor_type(py: Python<'_>) -> PyResult<Option<Bound<'_, PyAny>>> {
    match torch(py)? {
        Some(torch) => torch.getattr_opt(intern!(py, "Tensor")),
        None => Ok(None),
    }
}

/// Raises the version counters of torch tensors that were written, so that autograd notices the change.
#[pyfunction]
pub(crate) fn mark_written(tensors: &Bound<'_, PyList>) -> PyResult<()> {
    static INCREMENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if !tensors.is_empty() {
        INCREMENT.import(tensors.py(), "torch.autograd.graph", "increment_version")?.call1((tensors,))?;
    }
    Ok(())
}
