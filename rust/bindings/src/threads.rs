//! How many threads, and on which instruction set.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

use normclip_core::{Isa, Team};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

const VARIABLE: &str = "NORMCLIP_NUM_THREADS";

/// More threads than this are a mistake.
const MOST: usize = 1024;

/// What `set_num_threads` said; 0 for nothing.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// Who computes when nothing else is said.
pub(crate) fn team(py: Python<'_>) -> PyResult<Team> {
    let isa = Isa::active().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    Ok(Team { threads: threads(py)?, isa })
}

fn threads(py: Python<'_>) -> PyResult<NonZero<usize>> {
    if let Some(chosen) = NonZero::new(CHOSEN.load(Ordering::Relaxed)) {
        return Ok(chosen);
    }
    if let Some(text) = std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) {
        let number = text.to_str().and_then(|text| text.trim().parse().ok()).and_then(sensible);
        let refusal = || format!("{VARIABLE}={} is not a number from 1 to {MOST}: unset or correct it", text.display());
        return number.ok_or_else(|| PyValueError::new_err(refusal()));
    }
    // torch's own number, if torch is there: who sets that means all of the process.
    let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?.cast_into::<PyDict>()?;
    if let Some(torch) = modules.get_item(intern!(py, "torch"))?
        && let Some(number) = torch.getattr_opt(intern!(py, "get_num_threads"))?
    {
        return number.call0()?.extract();
    }
    Ok(std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
}

fn sensible(threads: i64) -> Option<NonZero<usize>> {
    usize::try_from(threads).ok().filter(|threads| *threads <= MOST).and_then(NonZero::new)
}

/// Use this many threads from now on, 1 for the calling thread alone.
#[pyfunction]
pub(crate) fn set_num_threads(threads: i64) -> PyResult<()> {
    let number =
        sensible(threads).ok_or_else(|| PyValueError::new_err(format!("the number of threads is {threads}: pass one from 1 to {MOST}")))?;
    CHOSEN.store(number.get(), Ordering::Relaxed);
    Ok(())
}

/// The number of threads that the next call uses.
#[pyfunction]
pub(crate) fn get_num_threads(py: Python<'_>) -> PyResult<usize> {
    threads(py).map(NonZero::get)
}

/// The instruction set in use: "baseline", "avx2" or "avx512".
#[pyfunction]
pub(crate) fn isa() -> PyResult<&'static str> {
    Isa::active().map(Isa::name).map_err(|error| PyRuntimeError::new_err(error.to_string()))
}
