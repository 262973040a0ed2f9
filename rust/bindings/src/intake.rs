//! What a user passes → the objects in it → their memory.
//!
//! Every list of tensors begins here. [`Given`] lists the objects, [`Memory`] is where their elements are, and [`Sources`] is what a list
//! keeps of the objects as long as it uses that memory.

use normclip_core::{TensorError, View, check_real};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString};

use crate::dlpack::Device;
use crate::extract::{Extractor, NotOnCPU, put};
use crate::names::Names;
use crate::threads::reserved;
use crate::torch::module;

/// The tensors that a user has passed.
pub(crate) struct Given<'py> {
    names: Names,
    objects: Vec<Bound<'py, PyAny>>,
}

impl<'py> Given<'py> {
    /// A tensor, or the tensors of an iterable, which errors call by this name.
    pub(crate) fn tensors(given: &Bound<'py, PyAny>, name: &str) -> PyResult<Self> {
        let objects = objects_of(given, name, intern!(given.py(), "__dlpack__"))?;
        Ok(Self { names: Names::tensors(name.to_owned()), objects: objects.iter().collect() })
    }

    /// The gradients of a parameter, or of those parameters of an iterable that have one.
    pub(crate) fn grads(parameters: &Bound<'py, PyAny>) -> PyResult<Self> {
        let grad = intern!(parameters.py(), "grad");
        let parameters = objects_of(parameters, "parameters", grad)?;
        let mut objects = Vec::with_capacity(parameters.len());
        let mut positions = Vec::with_capacity(parameters.len());
        for (position, parameter) in parameters.iter().enumerate() {
            let Some(grad) = parameter.getattr_opt(grad)? else {
                let kind = parameter.get_type();
                return Err(PyTypeError::new_err(format!(
                    "parameters[{position}] is a {}, without .grad: pass model.parameters()",
                    kind.name()?
                )));
            };
            if !grad.is_none() {
                objects.push(grad);
                positions.push(position);
            } else if is_dtensor(&parameter)? {
                return Err(NotOnCPU::new_err(format!("parameters[{position}] is a DTensor, of which other ranks may have a gradient")));
            }
        }
        Ok(Self { names: Names::Grads(positions), objects })
    }

    /// Where the elements of the tensors are, in CPU memory. To be written, if so asked.
    pub(crate) fn memory(&self, py: Python<'py>, writable: bool) -> PyResult<Memory> {
        Memory::of(Extractor::new(py, &self.names, writable)?, &self.objects)
    }

    /// The same for torch tensors on any device.
    pub(crate) fn memory_anywhere(&self, py: Python<'py>, writable: bool) -> PyResult<Memory> {
        Memory::of(Extractor::new(py, &self.names, writable)?.anywhere(), &self.objects)
    }
}

/// Whether it is a DTensor, of which there are none before their module is imported.
fn is_dtensor(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    match module(object.py(), intern!(object.py(), "torch.distributed.tensor"))? {
        Some(module) => object.is_instance(&module.getattr(intern!(object.py(), "DTensor"))?),
        None => Ok(false),
    }
}

/// The objects of an iterable, or the one object, if it has this attribute itself. An error calls them by this name.
pub(crate) fn objects_of<'py>(given: &Bound<'py, PyAny>, name: &str, attribute: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
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

/// The tensors of an iterable, or a tensor alone; with `grads` the parameters of an iterable, or one alone. A list is returned as it is.
#[pyfunction]
#[pyo3(signature = (given, *, grads = false))]
pub(crate) fn listed<'py>(given: &Bound<'py, PyAny>, grads: bool) -> PyResult<Bound<'py, PyList>> {
    let py = given.py();
    if grads { objects_of(given, "parameters", intern!(py, "grad")) } else { objects_of(given, "tensors", intern!(py, "__dlpack__")) }
}

/// Where the elements of some tensors are.
pub(crate) struct Memory {
    /// What is measured.
    pub(crate) reads: Vec<View>,
    /// The terms of sparse tensors with repeated indices, by the index of the tensor. They are what is changed, instead of `reads`.
    terms: Vec<(usize, View)>,
    pub(crate) devices: Vec<Device>,
    owners: Vec<Py<PyAny>>,
    is_torch: Vec<bool>,
    is_borrowed: Vec<bool>,
}

impl Memory {
    fn of<'py>(mut extractor: Extractor<'_, 'py>, objects: &[Bound<'py, PyAny>]) -> PyResult<Self> {
        let (mut reads, mut terms, mut owners) = (reserved::<View>(objects.len())?, Vec::<(usize, View)>::new(), Vec::new());
        let (mut devices, mut is_torch) = (reserved(objects.len())?, reserved(objects.len())?);
        let is_borrowed = extractor.each(objects, |extractor, index, object| {
            let extracted = extractor.extract(index, object)?;
            // The sums of repeated indices are new memory each time they are asked for. A tensor that is listed twice is known by its terms.
            let earlier = terms.iter().find(|(_, known)| extracted.write.as_ref() == Some(known)).map(|(earlier, _)| *earlier);
            let read = earlier.map_or(extracted.read, |earlier| reads[earlier].clone());
            put(&mut reads, index, read);
            terms.extend(extracted.write.map(|view| (index, view)));
            owners.extend(extracted.owners);
            put(&mut devices, index, extracted.device);
            put(&mut is_torch, index, extracted.is_torch);
            Ok(extracted.is_borrowed)
        })?;
        Ok(Self { reads, terms, devices, owners, is_torch, is_borrowed })
    }

    /// What is changed, if that differs from what is measured.
    pub(crate) fn writes(&self) -> Option<Vec<View>> {
        if self.terms.is_empty() {
            return None;
        }
        let mut views = self.reads.clone();
        for (index, view) in &self.terms {
            views[*index] = view.clone();
        }
        Some(views)
    }
}

/// The objects whose memory a list uses. Holds what keeps the memory alive, and knows what errors call the objects.
pub(crate) struct Sources {
    names: Names,
    objects: Vec<Py<PyAny>>,
    #[expect(dead_code, reason = "held for its references")]
    owners: Vec<Py<PyAny>>,
    /// The first sparse tensor with repeated indices.
    uncoalesced: Option<usize>,
    is_torch: Vec<bool>,
    is_borrowed: Vec<bool>,
}

impl Sources {
    /// What is to be kept of these objects, and what was measured and is on which device.
    pub(crate) fn of(given: Given<'_>, memory: Memory) -> (Self, Vec<View>, Vec<Device>) {
        let Memory { reads, terms, devices, owners, is_torch, is_borrowed } = memory;
        let objects = given.objects.into_iter().map(Bound::unbind).collect();
        let uncoalesced = terms.first().map(|(index, _)| *index);
        (Self { names: given.names, objects, owners, uncoalesced, is_torch, is_borrowed }, reads, devices)
    }

    /// The number of objects.
    pub(crate) fn len(&self) -> usize {
        self.objects.len()
    }

    /// The objects.
    pub(crate) fn objects(&self) -> &[Py<PyAny>] {
        &self.objects
    }

    /// Which of these objects are torch tensors.
    pub(crate) fn torch_tensors(&self, indices: impl IntoIterator<Item = usize>) -> Vec<&Py<PyAny>> {
        indices.into_iter().filter(|&index| self.is_torch[index]).map(|index| &self.objects[index]).collect()
    }

    /// Whether some of them are torch tensors.
    pub(crate) fn is_torch(&self) -> bool {
        self.is_torch.contains(&true)
    }

    /// What errors call an object.
    pub(crate) fn name(&self, index: usize) -> String {
        self.names.of(index)
    }

    /// The position of each in what was passed.
    pub(crate) fn positions(&self) -> Vec<usize> {
        (0..self.objects.len()).map(|index| self.names.position(index)).collect()
    }

    /// The Python error for a fault that the core has found.
    pub(crate) fn fault(&self, py: Python<'_>, error: TensorError) -> PyErr {
        self.names.fault(error, self.objects[error.index].bind(py))
    }

    /// Refuses what cannot be changed element by element: complex tensors, and sparse ones with repeated indices.
    pub(crate) fn check_elementwise(&self, py: Python<'_>, views: &[View]) -> PyResult<()> {
        if let Some(index) = self.uncoalesced {
            return Err(self.names.uncoalesced(index, self.objects[index].bind(py)));
        }
        check_real(views).map_err(|error| self.fault(py, error))
    }

    /// Refuses tensors that are borrowed and whose memory has been freed or exchanged since `views` was made. To be called when Python code
    /// has run since then, and before anything is written.
    pub(crate) fn check_unchanged(&self, py: Python<'_>, views: &[View]) -> PyResult<()> {
        let mut extractor = Extractor::new(py, &self.names, true)?.anywhere();
        for (index, object) in self.objects.iter().enumerate().filter(|(index, _)| self.is_borrowed[*index]) {
            let object = object.bind(py);
            if !matches!(extractor.borrow(index, object), Ok(Some((view, _))) if view == views[index]) {
                return Err(self.names.changed(index, object));
            }
        }
        Ok(())
    }
}
