//! How many threads, on which instruction set, and what they do without the interpreter.

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use normclip_core::{Isa, OutOfMemory, Team};
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;

use crate::torch::torch;

const VARIABLE: &str = "NORMCLIP_NUM_THREADS";

/// More threads than this are a mistake.
const MOST: usize = 1024;

/// What `set_num_threads` said; 0 for nothing.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// Who computes when nothing else is said.
pub(crate) fn team(py: Python<'_>) -> PyResult<Team> {
    let isa = Isa::active().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    Ok(Team { threads: threads(py)?, isa, watch: Some(look_for_signals) })
}

/// Runs what needs no interpreter, so that other Python threads run meanwhile.
///
/// A panic comes out as one, which PyO3 makes a Python exception, when no helper works any more; but for what unwinds on purpose: the
/// exception of a signal handler, such as `KeyboardInterrupt`, and `MemoryError`.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work))).map_err(|panic| match panic.downcast::<Interrupt>() {
        Ok(interrupt) => interrupt.0,
        Err(panic) if panic.is::<OutOfMemory>() => no_memory(),
        Err(panic) => resume_unwind(panic),
    })
}

/// The exception that a signal handler has raised.
struct Interrupt(PyErr);

/// Runs Python's signal handlers if there is something for them, which concerns the main thread alone. Unwinds if one of them raises.
fn look_for_signals() {
    if let Some(Err(error)) = Python::try_attach(|py| py.check_signals()) {
        resume_unwind(Box::new(Interrupt(error)));
    }
}

/// An empty vector with room for so many.
pub(crate) fn reserved<T>(len: usize) -> PyResult<Vec<T>> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).map_err(|_| no_memory())?;
    Ok(vec)
}

fn no_memory() -> PyErr {
    PyMemoryError::new_err("there is no memory for a list of so many tensors: pass fewer at a time")
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
    if let Some(torch) = torch(py)?
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
