//! `TensorList`: a list of tensors, taken once, then measured and changed without the interpreter.

use std::collections::HashSet;

use normclip_core::kernels::{Clamp, Map, MaxAbs, Scale, Statistics, ZeroNonfinite};
use normclip_core::{
    Merge, Moments as Totals, TensorError, Tensors, View, WritableTensors, apply_each, nonfinite, norm, reduce, reduce_each,
};
use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString};

use crate::compute::{compute, hard_coefficient};
use crate::dlpack::Device;
use crate::extract::Extractor;
use crate::moments::{Moments, Table};
use crate::names::Names;
use crate::threads::{detached, reserved};

/// The memory of some tensors. Everything about them is checked when it is made, so that no operation fails halfway.
#[pyclass(frozen, module = "normclip._core")]
pub(crate) struct TensorList {
    names: Names,
    /// What was passed, and with `owners` what keeps the memory alive.
    objects: Vec<Py<PyAny>>,
    #[expect(dead_code, reason = "held for its references")]
    owners: Vec<Py<PyAny>>,
    memory: Access,
    /// The first sparse tensor with repeated indices.
    uncoalesced: Option<usize>,
    torch: Vec<bool>,
    lent: Vec<bool>,
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
        Self::of(tensors, writable)
    }

    /// The gradients of a parameter, or of those parameters of an iterable that have one.
    #[staticmethod]
    #[pyo3(signature = (parameters, *, writable = false))]
    fn grads(parameters: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let (names, grads) = grads_of(parameters)?;
        Self::take(parameters.py(), names, grads, writable)
    }

    /// Whether some of them are torch tensors.
    #[getter]
    fn is_torch(&self) -> bool {
        self.torch.contains(&true)
    }

    /// Whether some of them are float64 or complex128.
    #[getter]
    fn is_double(&self) -> bool {
        self.tensors().views().iter().any(|view| view.dtype().is_double())
    }

    /// The place of each in what was passed.
    #[getter]
    fn positions(&self) -> Vec<usize> {
        (0..self.objects.len()).map(|index| self.names.position(index)).collect()
    }

    /// The norm of all elements as one vector.
    fn norm(&self, py: Python<'_>, order: f64) -> PyResult<f64> {
        compute(py, |team| norm(self.tensors(), order, team))
    }

    /// The moments of all; those of each group, for the group number of each tensor; and a table of float64, a row a tensor: count, zeros,
    /// NaN, infinities, l1, l2, linf, rms, mean_abs, sign_cosine, density. All from one read.
    #[pyo3(signature = (groups = Vec::new(), *, finite_only = false))]
    fn statistics<'py>(
        &self,
        py: Python<'py>,
        groups: Vec<usize>,
        finite_only: bool,
    ) -> PyResult<(Moments, Vec<Moments>, Bound<'py, PyBytes>)> {
        let (mut all, mut grouped) = (Moments(Totals::EMPTY), Vec::new());
        let table = PyBytes::new_with(py, Table::size(self.objects.len()), |bytes| {
            (all, grouped) = compute(py, |team| {
                let mut table = Table::new(bytes, &groups);
                reduce_each(self.tensors(), Statistics { finite_only }, team, |index, moments| table.take(index, moments));
                table.finish(self.tensors().repetitions())
            })?;
            Ok(())
        })?;
        Ok((all, grouped, table))
    }

    /// The moments of each tensor, as rows of 13 float64.
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
        Ok(found.into_iter().map(|(index, counts)| (self.names.of(index), counts.nans, counts.infs)).collect())
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
        if let Some(index) = self.uncoalesced {
            return Err(self.names.uncoalesced(index, self.objects[index].bind(py)));
        }
        self.tensors().check_real().map_err(|error| self.names.fault(error, self.objects[error.index].bind(py)))
    }

    /// Refuses tensors whose memory is no longer what it was when they were taken: to be called when code of others has run since then, and
    /// before anything is written.
    fn check_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        check_unchanged(py, &self.names, &self.objects, &self.lent, self.tensors().views())
    }

    /// Whether there are no elements.
    #[getter]
    fn is_empty(&self) -> bool {
        self.tensors().is_empty()
    }

    fn __len__(&self) -> usize {
        self.objects.len()
    }
}

impl TensorList {
    /// The tensor itself, or the tensors of an iterable.
    pub(crate) fn of(tensors: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let py = tensors.py();
        let tensors = listed(tensors, "tensors", intern!(py, "__dlpack__"))?;
        Self::take(py, Names::tensors("tensors"), tensors.iter().collect(), writable)
    }

    /// What is read.
    pub(crate) fn tensors(&self) -> &Tensors {
        match &self.memory {
            Access::Read(tensors) | Access::Apart { read: tensors, .. } => tensors,
            Access::Write(tensors) => tensors,
        }
    }

    fn take(py: Python<'_>, names: Names, objects: Vec<Bound<'_, PyAny>>, writable: bool) -> PyResult<Self> {
        let memory = Memory::of(Extractor::new(py, &names, writable)?, &objects)?;
        Self::checked(py, memory, names, objects, writable)
    }

    /// The list of tensors with this memory, if it may be used so.
    pub(crate) fn checked(py: Python<'_>, memory: Memory, names: Names, objects: Vec<Bound<'_, PyAny>>, writable: bool) -> PyResult<Self> {
        let uncoalesced = memory.uncoalesced();
        let writes = uncoalesced.map(|_| memory.writes());
        let Memory { reads, owners, torch, lent, .. } = memory;
        let list = detached(py, || match (writable, writes) {
            (false, _) => Ok(Access::Read(Tensors::new(reads))),
            (true, None) => WritableTensors::new(reads).map(Access::Write),
            (true, Some(writes)) => Ok(Access::Apart { write: WritableTensors::new(writes)?, read: Tensors::new(reads) }),
        })?;
        let memory = list.map_err(|error: TensorError| names.fault(error, &objects[error.index]))?;
        let objects = objects.into_iter().map(Bound::unbind).collect();
        Ok(Self { names, objects, owners, memory, uncoalesced, torch, lent })
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
        PyList::new(py, written.filter(|&index| self.torch[index]).map(|index| &self.objects[index]).collect::<Vec<_>>())
    }
}

/// One object that has the attribute by itself, else those of an iterable.
pub(crate) fn listed<'py>(given: &Bound<'py, PyAny>, name: &str, attribute: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
    if let Ok(list) = given.cast::<PyList>() {
        return Ok(list.clone());
    }
    if given.hasattr(attribute)? {
        return PyList::new(given.py(), [given]);
    }
    let Ok(items) = given.try_iter() else {
        let kind = given.get_type();
        return Err(PyTypeError::new_err(format!(
            "{name} is a {}: pass a tensor or an iterable of tensors, such as model.parameters()",
            kind.name()?
        )));
    };
    let list = PyList::empty(given.py());
    items.into_iter().try_for_each(|item| list.append(item?))?;
    Ok(list)
}

/// Where the memory of some tensors is.
pub(crate) struct Memory {
    pub(crate) reads: Vec<View>,
    /// Of sparse tensors with repeated indices the terms, which are written instead of what is read.
    terms: Vec<(usize, View)>,
    pub(crate) owners: Vec<Py<PyAny>>,
    pub(crate) devices: Vec<Device>,
    pub(crate) torch: Vec<bool>,
    /// Which are borrowed.
    pub(crate) lent: Vec<bool>,
}

impl Memory {
    pub(crate) fn of<'py>(mut extractor: Extractor<'_, 'py>, objects: &[Bound<'py, PyAny>]) -> PyResult<Self> {
        let (mut reads, mut terms) = (reserved::<View>(objects.len())?, Vec::<(usize, View)>::new());
        let mut owners = Vec::new();
        let (mut devices, mut torch) = (reserved(objects.len())?, reserved(objects.len())?);
        let mut lent = reserved(objects.len())?;
        for (index, object) in objects.iter().enumerate() {
            let extracted = extractor.extract(index, object)?;
            lent.push(extracted.lent);
            // Repeated indices are added up in new memory each time: by its terms the same tensor is known again.
            let earlier = terms.iter().find(|(_, known)| extracted.write.as_ref() == Some(known)).map(|(earlier, _)| *earlier);
            reads.push(earlier.map_or(extracted.read, |earlier| reads[earlier].clone()));
            terms.extend(extracted.write.map(|view| (index, view)));
            owners.extend(extracted.owners);
            devices.push(extracted.device);
            torch.push(extracted.is_torch);
        }
        if extractor.ran_python() {
            // Code of others may have freed what was borrowed before it ran. From here on none does.
            for (index, object) in objects.iter().enumerate().filter(|(index, _)| lent[*index]) {
                let Some((view, device)) = extractor.borrow(index, object)? else {
                    return Err(extractor.names().changed(index, object));
                };
                (reads[index], devices[index]) = (view, device);
            }
        }
        Ok(Self { reads, terms, owners, devices, torch, lent })
    }

    /// The first sparse tensor with repeated indices.
    pub(crate) fn uncoalesced(&self) -> Option<usize> {
        self.terms.first().map(|(index, _)| *index)
    }

    /// What is written.
    pub(crate) fn writes(&self) -> Vec<View> {
        let mut views = self.reads.clone();
        for (index, view) in &self.terms {
            views[*index] = view.clone();
        }
        views
    }
}

/// Refuses tensors that are lent and whose memory is no longer what it was, or has been freed.
pub(crate) fn check_unchanged(py: Python<'_>, names: &Names, objects: &[Py<PyAny>], lent: &[bool], views: &[View]) -> PyResult<()> {
    let mut extractor = Extractor::new(py, names, true)?.anywhere();
    for (index, object) in objects.iter().enumerate().filter(|(index, _)| lent[*index]) {
        let object = object.bind(py);
        if !matches!(extractor.borrow(index, object), Ok(Some((view, _))) if view == views[index]) {
            return Err(names.changed(index, object));
        }
    }
    Ok(())
}

/// The gradients of a parameter, or of those parameters of an iterable that have one, and how to call them.
pub(crate) fn grads_of<'py>(parameters: &Bound<'py, PyAny>) -> PyResult<(Names, Vec<Bound<'py, PyAny>>)> {
    let py = parameters.py();
    let parameters = listed(parameters, "parameters", intern!(py, "grad"))?;
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
    Ok((Names::Grads(positions), grads))
}
