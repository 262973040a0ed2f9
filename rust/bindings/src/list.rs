//! `TensorList`: a list of tensors, taken once, then measured and changed without the interpreter.

use std::sync::Arc;

use normclip_core::kernels::{Clamp, Map, MaxAbs, Scale};
use normclip_core::{Access, Team, Tensors, View, apply, nonfinite, norm, reduce};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::extract::Extractor;
use crate::names::Names;
use crate::threads::team;

/// The memory of some tensors. Everything about them is checked when it is made, so that no operation fails halfway.
#[pyclass(frozen, module = "normclip._core")]
pub(crate) struct TensorList {
    names: Names,
    /// What was passed, and with `owners` what keeps the memory alive.
    objects: Vec<Py<PyAny>>,
    #[expect(dead_code, reason = "held for its references")]
    owners: Vec<Py<PyAny>>,
    read: Arc<Tensors>,
    /// None where the tensors may only be read.
    write: Option<Arc<Tensors>>,
    /// The first sparse tensor with repeated indices.
    uncoalesced: Option<usize>,
    torch: Vec<bool>,
}

#[pymethods]
impl TensorList {
    /// The tensors themselves.
    #[new]
    #[pyo3(signature = (tensors, *, writable = false))]
    fn new(tensors: &Bound<'_, PyList>, writable: bool) -> PyResult<Self> {
        Self::take(tensors.py(), Names::Tensors, tensors.iter().collect(), writable)
    }

    /// The gradients of those parameters that have one.
    #[staticmethod]
    #[pyo3(signature = (parameters, *, writable = false))]
    fn grads(parameters: &Bound<'_, PyList>, writable: bool) -> PyResult<Self> {
        let py = parameters.py();
        let mut grads = Vec::with_capacity(parameters.len());
        let mut positions = Vec::with_capacity(parameters.len());
        for (position, parameter) in parameters.iter().enumerate() {
            let Some(grad) = parameter.getattr_opt(intern!(py, "grad"))? else {
                let kind = parameter.get_type();
                return Err(PyTypeError::new_err(format!(
                    "parameters[{position}] is a {}, without .grad: pass model.parameters()",
                    kind.name()?
                )));
            };
            if !grad.is_none() {
                grads.push(grad);
                positions.push(position);
            }
        }
        Self::take(py, Names::Grads(positions), grads, writable)
    }

    /// Whether some of them are torch tensors.
    #[getter]
    fn is_torch(&self) -> bool {
        self.torch.contains(&true)
    }

    /// Whether some of them are float64 or complex128.
    #[getter]
    fn is_double(&self) -> bool {
        self.read.views().iter().any(|view| view.dtype().is_double())
    }

    /// The norm of all elements as one vector.
    fn norm(&self, py: Python<'_>, order: f64) -> PyResult<f64> {
        let team = team(py)?;
        Ok(py.detach(|| norm(&self.read, order, team)))
    }

    /// Name, number of NaN and number of infinities of each tensor that has some.
    fn nonfinite(&self, py: Python<'_>) -> PyResult<Vec<(String, u64, u64)>> {
        let team = team(py)?;
        let found = py.detach(|| nonfinite(&self.read, team));
        Ok(found.into_iter().map(|(index, counts)| (self.names.of(index), counts.nans, counts.infs)).collect())
    }

    /// Reads all bytes with the lightest kernel there is, for benchmarks to compare with. Returns their number.
    fn read(&self, py: Python<'_>) -> PyResult<usize> {
        let team = team(py)?;
        py.detach(|| reduce(&self.read, MaxAbs, team));
        Ok(self.read.bytes())
    }

    /// Multiplies all elements. Returns the torch tensors that were written.
    fn scale_<'py>(&self, py: Python<'py>, factor: f64) -> PyResult<Bound<'py, PyList>> {
        self.change(py, Scale { coefficient: factor })
    }

    /// Clamps all elements to [-limit, limit]. Returns the torch tensors that were written.
    fn clamp_<'py>(&self, py: Python<'py>, limit: f64) -> PyResult<Bound<'py, PyList>> {
        if let Some(index) = self.uncoalesced {
            let name = self.names.describe(index, self.objects[index].bind(py));
            return Err(PyValueError::new_err(format!(
                "{name} is sparse with repeated indices and cannot be clamped term by term: coalesce() it first"
            )));
        }
        self.read.check_real().map_err(|error| self.names.fault(error, self.objects[error.index].bind(py)))?;
        self.change(py, Clamp { limit })
    }

    fn __len__(&self) -> usize {
        self.objects.len()
    }
}

impl TensorList {
    fn take(py: Python<'_>, names: Names, objects: Vec<Bound<'_, PyAny>>, writable: bool) -> PyResult<Self> {
        let mut extractor = Extractor::new(py, &names, writable)?;
        let (mut reads, mut writes) = (Vec::with_capacity(objects.len()), Vec::<(usize, View)>::new());
        let mut owners = Vec::new();
        let mut torch = Vec::with_capacity(objects.len());
        for (index, object) in objects.iter().enumerate() {
            let extracted = extractor.extract(index, object)?;
            reads.push(extracted.read);
            writes.extend(extracted.write.map(|view| (index, view)));
            owners.extend(extracted.owners);
            torch.push(extracted.is_torch);
        }
        let uncoalesced = writes.first().map(|(index, _)| *index);
        let cut = |views, access| Tensors::new(views, access).map(Arc::new).map_err(|error| names.fault(error, &objects[error.index]));
        let (read, write) = if !writable {
            (cut(reads, Access::Read)?, None)
        } else if writes.is_empty() {
            let both = cut(reads, Access::Write)?;
            (Arc::clone(&both), Some(both))
        } else {
            let mut targets = reads.clone();
            for (index, view) in writes {
                targets[index] = view;
            }
            (cut(reads, Access::Read)?, Some(cut(targets, Access::Write)?))
        };
        let objects = objects.into_iter().map(Bound::unbind).collect();
        Ok(Self { names, objects, owners, read, write, uncoalesced, torch })
    }

    fn change<'py, M: Map>(&self, py: Python<'py>, map: M) -> PyResult<Bound<'py, PyList>> {
        let Some(write) = &self.write else {
            return Err(PyRuntimeError::new_err("this TensorList was made for reading: make it with writable=True"));
        };
        let team: Team = team(py)?;
        // SAFETY: `write` was made for writing. That nobody else uses the memory meanwhile is up to the caller in Python, as with every in-place
        // operation of NumPy and torch.
        let changed = py.detach(|| unsafe { apply(write, map, team) });
        PyList::new(py, changed.into_iter().filter(|&index| self.torch[index]).map(|index| &self.objects[index]))
    }
}
