//! `DeviceList`: a list of tensors on any devices, described for kernels that are not ours.
//!
//! Everything about the list is checked here, by the rules of `TensorList`. What leaves is numbers: addresses, lengths, element types.

use normclip_core::{Dtype, Moments as Totals, Problem, Repetition, TensorError, View, repetitions, strict, writable_repetitions};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::dlpack::Device;
use crate::extract::{Extractor, NotOnCPU};
use crate::list::{Memory, TensorList, check_unchanged, grads_of, listed};
use crate::moments::{Moments, Table};
use crate::names::Names;
use crate::threads::detached;

/// The tensor itself, or the tensors of an iterable: a `TensorList` if all are in CPU memory, else a `DeviceList`.
#[pyfunction]
#[pyo3(signature = (tensors, *, writable = false))]
pub(crate) fn collect<'py>(tensors: &Bound<'py, PyAny>, writable: bool) -> PyResult<Bound<'py, PyAny>> {
    let py = tensors.py();
    either(py, Names::tensors("tensors"), listed(tensors, "tensors", intern!(py, "__dlpack__"))?.iter().collect(), writable)
}

/// The gradients of a parameter, or of those parameters of an iterable that have one, as `collect` gives tensors.
#[pyfunction]
#[pyo3(signature = (parameters, *, writable = false))]
pub(crate) fn collect_grads<'py>(parameters: &Bound<'py, PyAny>, writable: bool) -> PyResult<Bound<'py, PyAny>> {
    let (names, grads) = grads_of(parameters)?;
    either(parameters.py(), names, grads, writable)
}

fn either<'py>(py: Python<'py>, names: Names, objects: Vec<Bound<'py, PyAny>>, writable: bool) -> PyResult<Bound<'py, PyAny>> {
    match Extractor::new(py, &names, writable).and_then(|extractor| Memory::of(extractor, &objects)) {
        Ok(memory) => Ok(Bound::new(py, TensorList::checked(py, memory, names, objects, writable)?)?.into_any()),
        Err(error) if error.is_instance_of::<NotOnCPU>(py) => {
            Ok(Bound::new(py, DeviceList::take(py, names, objects, writable)?)?.into_any())
        }
        Err(error) => Err(error),
    }
}

/// Where the memory of some tensors is.
#[pyclass(frozen, module = "normclip._core")]
pub(crate) struct DeviceList {
    names: Names,
    objects: Vec<Py<PyAny>>,
    #[expect(dead_code, reason = "held for its references")]
    owners: Vec<Py<PyAny>>,
    devices: Vec<Device>,
    read: Vec<View>,
    /// The same as `read`, but for sparse tensors with repeated indices: their terms.
    write: Vec<View>,
    uncoalesced: Option<usize>,
    repetitions: Vec<Repetition>,
    torch: Vec<bool>,
    lent: Vec<bool>,
}

#[pymethods]
impl DeviceList {
    /// The tensor itself, or the tensors of an iterable, which errors call by this name.
    #[new]
    #[pyo3(signature = (tensors, *, writable = false, name = "tensors"))]
    fn new(tensors: &Bound<'_, PyAny>, writable: bool, name: &str) -> PyResult<Self> {
        let py = tensors.py();
        let listed = listed(tensors, name, intern!(py, "__dlpack__"))?;
        Self::take(py, Names::tensors(name.to_owned()), listed.iter().collect(), writable)
    }

    /// The gradients of a parameter, or of those parameters of an iterable that have one.
    #[staticmethod]
    #[pyo3(signature = (parameters, *, writable = false))]
    fn grads(parameters: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let (names, grads) = grads_of(parameters)?;
        Self::take(parameters.py(), names, grads, writable)
    }

    /// Those that are torch's.
    #[getter]
    fn torch_tensors(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        self.objects.iter().zip(&self.torch).filter(|(_, is_torch)| **is_torch).map(|(object, _)| object.clone_ref(py)).collect()
    }

    /// The tensors.
    #[getter]
    fn objects(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        self.objects.iter().map(|object| object.clone_ref(py)).collect()
    }

    /// Whether some of them are float64 or complex128.
    #[getter]
    fn is_double(&self) -> bool {
        self.read.iter().any(|view| view.dtype().is_double())
    }

    /// The place of each in what was passed.
    #[getter]
    fn positions(&self) -> Vec<usize> {
        (0..self.objects.len()).map(|index| self.names.position(index)).collect()
    }

    /// The name of each, as errors give it.
    #[getter]
    fn names(&self) -> Vec<String> {
        (0..self.objects.len()).map(|index| self.names.of(index)).collect()
    }

    /// For each tensor that repeats an earlier one, the index of that.
    #[getter]
    fn first_of(&self) -> Vec<Option<usize>> {
        let mut first_of = vec![None; self.objects.len()];
        self.repetitions.iter().for_each(|&(index, first)| first_of[index] = Some(first));
        first_of
    }

    /// The devices, by DLPack's kind and number, each with the indices of its tensors. In the order of their first tensors.
    #[getter]
    fn devices(&self) -> Vec<(i32, i32, Vec<usize>)> {
        let mut found: Vec<(Device, Vec<usize>)> = Vec::new();
        for (index, device) in self.devices.iter().enumerate() {
            match found.iter_mut().find(|(known, _)| known == device) {
                Some((_, indices)) => indices.push(index),
                None => found.push((*device, vec![index])),
            }
        }
        found.into_iter().map(|(device, indices)| (device.kind, device.id, indices)).collect()
    }

    /// The tensors that do not lie in one run of memory, or on no border of their element type.
    #[getter]
    fn scattered(&self) -> Vec<usize> {
        let part = |view: &View| view.dtype().size() / view.dtype().parts();
        let in_place = |view: &View| view.is_empty() || view.is_contiguous() && (view.start() as usize).is_multiple_of(part(view));
        (0..self.objects.len()).filter(|&index| !(in_place(&self.read[index]) && in_place(&self.write[index]))).collect()
    }

    /// The complex tensors.
    #[getter]
    fn complex(&self) -> Vec<usize> {
        (0..self.objects.len()).filter(|&index| self.read[index].dtype().is_complex()).collect()
    }

    /// The memory of the tensors of a device, as rows of four int64: address, number of elements, element type (0 to 3 for float16,
    /// bfloat16, float32, float64), index. Complex numbers are two elements each. Without empty tensors and, unless asked for, repetitions.
    #[pyo3(signature = (kind, id, *, write = false, repeated = false))]
    fn layout<'py>(&self, py: Python<'py>, kind: i32, id: i32, write: bool, repeated: bool) -> Bound<'py, PyBytes> {
        let device = Device { kind, id };
        let views = if write { &self.write } else { &self.read };
        let first_of = self.first_of();
        let mut rows = Vec::with_capacity(32 * views.len());
        for (index, view) in views.iter().enumerate() {
            if self.devices[index] != device || view.is_empty() || (first_of[index].is_some() && !repeated) {
                continue;
            }
            let code = match view.dtype() {
                Dtype::F16 => 0,
                Dtype::Bf16 => 1,
                Dtype::F32 | Dtype::C64 => 2,
                Dtype::F64 | Dtype::C128 => 3,
            };
            for number in [view.start() as usize, view.len() * view.dtype().parts(), code, index] {
                rows.extend_from_slice(&(number as u64).to_ne_bytes());
            }
        }
        PyBytes::new(py, &rows)
    }

    /// What `TensorList.statistics` gives, from the moments of each tensor as rows of 13 float64.
    fn statistics<'py>(
        &self,
        py: Python<'py>,
        moments: &[u8],
        groups: Vec<usize>,
    ) -> PyResult<(Moments, Vec<Moments>, Bound<'py, PyBytes>)> {
        let numbers: Vec<f64> = moments.as_chunks::<8>().0.iter().map(|bytes| f64::from_ne_bytes(*bytes)).collect();
        let rows = numbers.as_chunks::<{ Totals::LEN }>().0;
        let each: Vec<Totals> = strict(|| rows.iter().map(|row| Totals::from_array(*row)).collect());
        if each.len() != self.objects.len() {
            return Err(PyValueError::new_err(format!("moments of {} tensors, and there are {}", each.len(), self.objects.len())));
        }
        let mut bytes = vec![0; Table::size(each.len())];
        let (all, grouped) = strict(|| {
            let mut table = Table::new(&mut bytes, &groups);
            each.iter().enumerate().for_each(|(index, moments)| table.take(index, moments));
            table.finish(&self.repetitions)
        });
        Ok((all, grouped, PyBytes::new(py, &bytes)))
    }

    /// Refuses what cannot be changed element by element: complex tensors, and sparse ones with repeated indices.
    fn check_elementwise(&self, py: Python<'_>) -> PyResult<()> {
        if let Some(index) = self.uncoalesced {
            return Err(self.names.uncoalesced(index, self.objects[index].bind(py)));
        }
        match self.read.iter().position(|view| view.dtype().is_complex()) {
            Some(index) => Err(self.names.fault(TensorError { index, problem: Problem::Complex }, self.objects[index].bind(py))),
            None => Ok(()),
        }
    }

    /// As `TensorList.check_unchanged`.
    fn check_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        check_unchanged(py, &self.names, &self.objects, &self.lent, &self.read)
    }

    fn __len__(&self) -> usize {
        self.objects.len()
    }
}

impl DeviceList {
    fn take(py: Python<'_>, names: Names, objects: Vec<Bound<'_, PyAny>>, writable: bool) -> PyResult<Self> {
        let memory = Memory::of(Extractor::new(py, &names, writable)?.anywhere(), &objects)?;
        let (write, uncoalesced) = (memory.writes(), memory.uncoalesced());
        let found = detached(py, || if writable { writable_repetitions(&write) } else { Ok(repetitions(&write)) })?;
        let repetitions = found.map_err(|error| names.fault(error, &objects[error.index]))?;
        let objects = objects.into_iter().map(Bound::unbind).collect();
        let Memory { reads: read, owners, devices, torch, lent, .. } = memory;
        Ok(Self { names, objects, owners, devices, read, write, uncoalesced, repetitions, torch, lent })
    }
}
