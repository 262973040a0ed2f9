//! How many threads, on which instruction set, and what they do without the interpreter.

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use normclip_core::{Isa, OutOfMemory, Team};
use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::lent::Lent;
use crate::process;

const VARIABLE: &str = "NORMCLIP_NUM_THREADS";

/// More threads than this are a mistake.
pub(crate) const MOST: usize = 1024;

/// What `set_num_threads` or the environment said; 0 for nothing.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// Who computes when nothing else is said.
pub(crate) fn team(py: Python<'_>) -> PyResult<Team> {
    let isa = Isa::active().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    let lent = Lent::by_torch(py)?;
    let threads = threads(lent.as_ref());
    // torch lends no more threads than it has.
    let lender = lent.filter(|lent| threads <= lent.threads).and_then(|lent| lent.lender);
    Ok(Team { threads, isa, lender, watch: Some(look_for_signals) })
}

/// What was chosen; else torch's own number, as who sets that means all of the process; else the CPUs.
fn threads(lent: Option<&Lent>) -> NonZero<usize> {
    NonZero::new(CHOSEN.load(Ordering::Relaxed)).or(lent.map(|lent| lent.threads)).unwrap_or_else(process::cpus)
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

fn sensible(threads: i64) -> Option<NonZero<usize>> {
    usize::try_from(threads).ok().filter(|threads| *threads <= MOST).and_then(NonZero::new)
}

/// The number that the environment asks for.
fn environment() -> PyResult<Option<NonZero<usize>>> {
    let Some(text) = std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) else { return Ok(None) };
    let number = text.to_str().and_then(|text| text.trim().parse().ok()).and_then(sensible);
    let refusal = || format!("{VARIABLE}={} is not a number from 1 to {MOST}: unset or correct it", text.display());
    number.map(Some).ok_or_else(|| PyValueError::new_err(refusal()))
}

/// Use this many threads from now on, 1 for the calling thread alone; None for as many as when normclip was imported: what the environment
/// says, else as many as torch, else the CPUs that the process may use, which are counted again.
#[pyfunction]
pub(crate) fn set_num_threads(threads: Option<i64>) -> PyResult<()> {
    let number = match threads {
        Some(threads) => {
            let refusal = || format!("the number of threads is {threads}: pass one from 1 to {MOST}, or None");
            Some(sensible(threads).ok_or_else(|| PyValueError::new_err(refusal()))?)
        }
        None => environment()?,
    };
    CHOSEN.store(number.map_or(0, NonZero::get), Ordering::Relaxed);
    process::forget_cpus();
    Ok(())
}

/// The number of threads that the next call uses.
#[pyfunction]
pub(crate) fn get_num_threads(py: Python<'_>) -> PyResult<usize> {
    Ok(threads(Lent::by_torch(py)?.as_ref()).get())
}

/// The instruction set in use: "baseline", "avx2" or "avx512".
#[pyfunction]
pub(crate) fn isa() -> PyResult<&'static str> {
    Isa::active().map(Isa::name).map_err(|error| PyRuntimeError::new_err(error.to_string()))
}
