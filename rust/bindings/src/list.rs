//! `TensorList`: tensors in CPU memory, found and checked once, then measured and changed without the interpreter.

use std::collections::HashSet;

use normclip_core::kernels::{Clamp, Map, MaxAbs, Scale, Statistics, ZeroNonfinite};
use normclip_core::{Merge, Moments as Totals, Tensors, WritableTensors, apply_each, nonfinite, norm, reduce, reduce_each};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::compute::{compute, hard_coefficient};
use crate::figures::Table;
use crate::intake::{Given, Memory, Sources};
use crate::moments::Moments;
use crate::scalar::as_tensor;
use crate::threads::detached;
use crate::torch::mark_written;

/// The memory of some tensors. Everything about them is checked when it is made, so that no operation fails halfway.
#[pyclass(frozen, module = "normclip._core")]
pub(crate) struct TensorList {
    sources: Sources,
    memory: Access,
}

/// The memory, by what may be done with it.
enum Access {
    Read(Tensors),
    Write(WritableTensors),
    /// Sparse tensors with repeated indices are measured by the sums of their terms, which are new memory, and changed by the terms.
    Apart {
        read: Tensors,
        write: WritableTensors,
    },
}

#[pymethods]
impl TensorList {
    /// The tensor itself, or the tensors of an iterable.
    #[new]
    #[pyo3(signature = (tensors, *, writable = false))]
    fn new(tensors: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let given = Given::tensors(tensors, "tensors")?;
        let memory = given.memory(tensors.py(), writable)?;
        Self::of(tensors.py(), given, memory, writable)
    }

    /// Whether some of them are torch tensors.
    #[getter]
    fn is_torch(&self) -> bool {
        self.sources.is_torch()
    }

    /// Whether some of them are float64 or complex128.
    #[getter]
    fn is_double(&self) -> bool {
        self.tensors().views().iter().any(|view| view.dtype().is_double())
    }

    /// The position of each in what was passed.
    #[getter]
    fn positions(&self) -> Vec<usize> {
        self.sources.positions()
    }

    /// The norm of all elements as one vector.
    fn norm(&self, py: Python<'_>, order: f64) -> PyResult<f64> {
        compute(py, |team| norm(self.tensors(), order, team))
    }

    /// The moments of all tensors; those of each group, for the group number of each tensor; and a table of float64, with a row for each tensor
    /// and a column for each of `FIGURES`, if asked for. All from one read.
    #[pyo3(signature = (groups = Vec::new(), *, finite_only = false, table = true))]
    fn statistics<'py>(
        &self,
        py: Python<'py>,
        groups: Vec<usize>,
        finite_only: bool,
        table: bool,
    ) -> PyResult<(Moments, Vec<Moments>, Bound<'py, PyBytes>)> {
        let (mut all, mut grouped) = (Totals::EMPTY, Vec::new());
        let table = PyBytes::new_with(py, if table { Table::size(self.sources.len()) } else { 0 }, |bytes| {
            (all, grouped) = compute(py, |team| {
                let mut table = Table::new(bytes, &groups);
                reduce_each(self.tensors(), Statistics { finite_only }, team, |index, moments| table.add(index, moments));
                table.finish(self.tensors().repetitions())
            })?;
            Ok(())
        })?;
        Ok((Moments(all), grouped.into_iter().map(Moments).collect(), table))
    }

    /// The moments of each tensor, as rows of float64 with the numbers of `MOMENTS`.
    #[pyo3(signature = (*, finite_only = false))]
    fn moments<'py>(&self, py: Python<'py>, finite_only: bool) -> PyResult<Bound<'py, PyBytes>> {
        let rows = compute(py, |team| {
            let each = reduce(self.tensors(), Statistics { finite_only }, team);
            each.iter().flat_map(Totals::to_array).flat_map(f64::to_ne_bytes).collect::<Vec<u8>>()
        })?;
        Ok(PyBytes::new(py, &rows))
    }

    /// Name, number of NaN and number of infinities of each tensor that has some.
    fn nonfinite(&self, py: Python<'_>) -> PyResult<Vec<(String, u64, u64)>> {
        let found = compute(py, |team| nonfinite(self.tensors(), team))?;
        Ok(found.into_iter().map(|(index, counts)| (self.sources.name(index), counts.nans, counts.infs)).collect())
    }

    /// Reads all bytes with the lightest kernel there is, for benchmarks to compare with. Returns their number.
    fn read(&self, py: Python<'_>) -> PyResult<usize> {
        compute(py, |team| reduce(self.tensors(), MaxAbs, team))?;
        Ok(self.tensors().bytes())
    }

    /// Scales a vector of this norm to the limit, by limit / (norm + epsilon), if that is below 1. Returns the torch tensors that were written.
    fn clip_<'py>(&self, py: Python<'py>, limit: f64, norm: f64, epsilon: f64) -> PyResult<Bound<'py, PyList>> {
        let coefficient = hard_coefficient(limit, norm, epsilon);
        if coefficient == 1.0 { Ok(PyList::empty(py)) } else { self.scale_(py, coefficient) }
    }

    /// Multiplies all elements. Returns the torch tensors that were written.
    fn scale_<'py>(&self, py: Python<'py>, factor: f64) -> PyResult<Bound<'py, PyList>> {
        self.change(py, move |_| Some(Scale { coefficient: factor }))
    }

    /// Multiplies the elements of each tensor by its own factor; None leaves it alone. Returns the torch tensors that were written.
    fn scale_each_<'py>(&self, py: Python<'py>, factors: Vec<Option<f64>>) -> PyResult<Bound<'py, PyList>> {
        let factor = move |index: usize| factors.get(index).copied().flatten();
        self.change(py, move |index| factor(index).map(|coefficient| Scale { coefficient }))
    }

    /// Clamps all elements to [-limit, limit]. Returns the torch tensors that were written.
    fn clamp_<'py>(&self, py: Python<'py>, limit: f64) -> PyResult<Bound<'py, PyList>> {
        self.check_elementwise(py)?;
        self.change(py, move |_| Some(Clamp { limit }))
    }

    /// Replaces NaN and infinities by 0 in the tensors at these indices. Returns the torch tensors that were written.
    fn zero_nonfinite_<'py>(&self, py: Python<'py>, indices: Vec<usize>) -> PyResult<Bound<'py, PyList>> {
        self.check_elementwise(py)?;
        let indices: HashSet<usize> = indices.into_iter().collect();
        self.change(py, move |index| indices.contains(&index).then_some(ZeroNonfinite))
    }

    /// Refuses what cannot be changed element by element: complex tensors, and sparse ones with repeated indices.
    fn check_elementwise(&self, py: Python<'_>) -> PyResult<()> {
        self.sources.check_elementwise(py, self.tensors().views())
    }

    /// Refuses tensors whose memory is no longer what it was when the list was made. To be called when Python code of others has run since
    /// then, and before anything is written.
    fn check_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        self.sources.check_unchanged(py, self.tensors().views())
    }

    /// Whether there are no elements.
    #[getter]
    fn is_empty(&self) -> bool {
        self.tensors().is_empty()
    }

    pub(crate) fn __len__(&self) -> usize {
        self.sources.len()
    }
}

impl TensorList {
    /// The list of tensors with this memory, if it may be used so.
    pub(crate) fn of(py: Python<'_>, given: Given<'_>, memory: Memory, writable: bool) -> PyResult<Self> {
        let writes = memory.writes();
        let (sources, reads, _) = Sources::of(given, memory);
        let memory = detached(py, || match (writable, writes) {
            (false, _) => Ok(Access::Read(Tensors::new(reads))),
            (true, None) => WritableTensors::new(reads).map(Access::Write),
            (true, Some(writes)) => Ok(Access::Apart { write: WritableTensors::new(writes)?, read: Tensors::new(reads) }),
        })?;
        Ok(Self { memory: memory.map_err(|error| sources.fault(py, error))?, sources })
    }

    /// Measures the norm, scales a vector of this norm to the limit as `clip_` does, and marks what was written. Returns the norm as torch
    /// has it, or None if it is not finite and has to be: then nothing has changed.
    pub(crate) fn clip_by_norm<'py>(
        &self,
        py: Python<'py>,
        limit: f64,
        order: f64,
        epsilon: f64,
        finite: bool,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let norm = self.norm(py, order)?;
        if finite && !norm.is_finite() {
            return Ok(None);
        }
        let tensor = as_tensor(py, norm, self.is_double())?;
        mark_written(&self.clip_(py, limit, norm, epsilon)?)?;
        Ok(Some(tensor))
    }

    /// What is measured.
    fn tensors(&self) -> &Tensors {
        match &self.memory {
            Access::Read(tensors) | Access::Apart { read: tensors, .. } => tensors,
            Access::Write(tensors) => tensors,
        }
    }

    fn change<'py, M: Map>(&self, py: Python<'py>, map_of: impl Fn(usize) -> Option<M> + Send + Sync) -> PyResult<Bound<'py, PyList>> {
        let (Access::Write(write) | Access::Apart { write, .. }) = &self.memory else {
            return Err(PyRuntimeError::new_err("this TensorList was made for reading: make it with writable=True"));
        };
        // SAFETY: that nobody else uses the memory meanwhile is up to the caller in Python, as with every in-place operation of NumPy and
        // torch.
        let changed = compute(py, |team| unsafe { apply_each(write, map_of, team) })?;
        // A repetition is written with the tensor that it repeats, and may have a version counter of its own.
        let repetitions = write.repetitions().iter().filter(|(_, first)| changed.binary_search(first).is_ok());
        let written = changed.iter().copied().chain(repetitions.map(|(index, _)| *index));
        PyList::new(py, self.sources.torch_tensors(written))
    }
}
