//! The door to the core: without the interpreter, in IEEE arithmetic, by the team that is set.
//!
//! What computes with floats goes through here, whatever the calling thread was set to: `torch.set_flush_denormal(True)` holds for the
//! interpreter's thread, and so do rounding directions.

use normclip_core::{Team, strict};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::threads::{detached, team};

/// The result of work on tensors.
pub(crate) fn compute<T: Send>(py: Python<'_>, work: impl FnOnce(Team) -> T + Send) -> PyResult<T> {
    let team = team(py)?;
    detached(py, || strict(|| work(team)))
}

/// What hard clipping multiplies a vector of this norm by: min(1, limit / (norm + epsilon)).
#[pyfunction]
#[pyo3(signature = (limit, norm, epsilon = 0.0))]
pub(crate) fn hard_coefficient(limit: f64, norm: f64, epsilon: f64) -> f64 {
    strict(|| normclip_core::hard_coefficient(limit, norm, epsilon))
}

/// What a Python function of these arguments returns, called in IEEE arithmetic.
#[pyfunction]
#[pyo3(signature = (function, /, *args, **kwargs))]
pub(crate) fn strictly<'py>(
    function: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    strict(|| function.call(args, kwargs))
}
