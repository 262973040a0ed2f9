//! A Python object → the memory of its elements, by DLPack.
//!
//! There are three ways, tried in this order: the C exchange API of the object's type (torch since 2.10), which lends a tensor; the versioned
//! capsule of `__dlpack__`, which says whether it may be written; and the capsule of older producers, which does not.
//!
//! A capsule keeps its memory alive. A borrowed tensor does not, and the shape and strides that it points to are in torch's memory too: it is
//! valid until the object is freed or gets other memory, which only Python code does. A [`View`] has copies of shape and strides, but what it
//! describes is valid no longer. As the other two ways run Python code, a list is extracted by [`Extractor::each`], which borrows again what
//! was borrowed before such code ran.

use std::ptr;

use normclip_core::{Dtype, Problem, TensorError, View};
use pyo3::exceptions::{PyBufferError, PyException, PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyType;
use pyo3::{create_exception, intern};

use crate::dlpack::{self, Device, RawTensor};
use crate::names::Names;
use crate::producer::{Contents, Producer, Request, contents, export};
use crate::threads::reserved;
use crate::torch::tensor_type;

create_exception!(normclip._core, NotOnCPU, PyTypeError, "A tensor is in the memory of another device: `DeviceList` may take it.");

/// Memory to read, memory to write, and what keeps them alive besides the object itself.
pub(crate) struct Extracted {
    pub(crate) read: View,
    /// The same as `read`, but for sparse tensors with repeated indices: their sums are measured, their terms are scaled.
    pub(crate) write: Option<View>,
    pub(crate) owners: Vec<Py<PyAny>>,
    pub(crate) device: Device,
    pub(crate) is_torch: bool,
    pub(crate) is_borrowed: bool,
}

/// A tensor as it was exported. It is alive as long as the object and the owner; without one it is borrowed.
pub(crate) struct Exported {
    pub(crate) tensor: dlpack::Tensor,
    pub(crate) owner: Option<Py<PyAny>>,
}

/// In which form an object has its elements.
pub(crate) enum Form {
    Dense(Exported),
    /// A COO tensor of torch, which has no memory of its own.
    Sparse,
    /// A tensor that torch computes with although it has no memory to look at: on the meta device, or of a subclass that keeps its elements
    /// elsewhere. With the number of its device, in the order in which they were met.
    Abstract(Dtype, i32),
}

/// Finds the memory of the objects of a list, one after the other.
pub(crate) struct Extractor<'a, 'py> {
    names: &'a Names,
    /// `torch.Tensor`, if torch is imported.
    torch_tensor: Option<Bound<'py, PyAny>>,
    /// The type that was looked up last: lists are mostly of one type.
    latest: Option<(Bound<'py, PyType>, Producer)>,
    /// The type before: in an optimizer's list parameters and gradients alternate.
    previous: Option<(Bound<'py, PyType>, Producer)>,
    writing: bool,
    /// Whether torch tensors may be on any device, or on none.
    anywhere: bool,
    /// The devices of abstract tensors.
    places: Vec<String>,
    ran_python: bool,
}

impl<'a, 'py> Extractor<'a, 'py> {
    pub(crate) fn new(py: Python<'py>, names: &'a Names, writing: bool) -> PyResult<Self> {
        Ok(Self {
            names,
            torch_tensor: tensor_type(py)?,
            latest: None,
            previous: None,
            writing,
            anywhere: false,
            places: Vec::new(),
            ran_python: false,
        })
    }

    /// The same for torch tensors on any device.
    pub(crate) fn anywhere(self) -> Self {
        Self { anywhere: true, ..self }
    }

    /// Calls `take` for each object, in order, with its index. It takes what the object exports, and returns whether that is borrowed.
    ///
    /// Where Python code has run for one of the objects, which may have freed what was borrowed before, `take` is called once more for all
    /// that is borrowed: then no such code runs. Returns which are borrowed.
    // Inlined with what a borrowed tensor takes: see `extract`.
    #[inline(always)]
    pub(crate) fn each(
        &mut self,
        objects: &[Bound<'py, PyAny>],
        mut take: impl FnMut(&mut Self, usize, &Bound<'py, PyAny>) -> PyResult<bool>,
    ) -> PyResult<Vec<bool>> {
        let mut borrowed = reserved(objects.len())?;
        for (index, object) in objects.iter().enumerate() {
            borrowed.push(take(self, index, object)?);
        }
        if self.ran_python {
            for (index, object) in objects.iter().enumerate().filter(|(index, _)| borrowed[*index]) {
                // Asked first, as what lends no memory any more would run Python code.
                if self.borrow(index, object)?.is_none() || !take(self, index, object)? {
                    return Err(self.names.changed(index, object));
                }
            }
        }
        Ok(borrowed)
    }

    /// The dense tensors that these objects export, with their element types.
    pub(crate) fn dense(mut self, objects: &[Bound<'py, PyAny>]) -> PyResult<Vec<(Exported, Dtype)>> {
        let mut found = reserved(objects.len())?;
        self.each(objects, |extractor, index, object| {
            let what = match extractor.tensor(index, object)? {
                Form::Dense(Exported { tensor, .. }) if tensor.device.has_addresses() && lacks_memory(&tensor) => {
                    return Err(extractor.names.fault(TensorError { index, problem: Problem::NullData }, object));
                }
                Form::Dense(exported) => {
                    let (dtype, is_borrowed) = (extractor.dtype(index, object, &exported.tensor)?, exported.owner.is_none());
                    put(&mut found, index, (exported, dtype));
                    return Ok(is_borrowed);
                }
                Form::Sparse => "is sparse: make it dense, with .to_dense()",
                Form::Abstract(..) => "has no memory of its own: materialize it first",
            };
            Err(PyTypeError::new_err(format!("{} {what}", extractor.names.describe(index, object))))
        })?;
        Ok(found)
    }

    /// The object with torch's lazy conjugate and negative carried out: they are flags that memory does not show.
    pub(crate) fn resolved(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        if !self.producer(object)?.is_torch {
            return Ok(object.clone());
        }
        let py = object.py();
        object.call_method0(intern!(py, "resolve_conj"))?.call_method0(intern!(py, "resolve_neg"))
    }

    /// The memory of the object at this index of the list.
    // What a borrowed tensor takes is inlined into the loop over a list, from here down: as calls that return large structures it takes
    // 40 % longer.
    #[inline(always)]
    pub(crate) fn extract(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Extracted> {
        // Nearly all tensors of a model lend their memory. There may be thousands, so this comes first.
        let Producer { is_torch, is_numpy, .. } = self.producer(object)?;
        if let Some((read, device)) = self.borrow(index, object)? {
            return Ok(Extracted { read, write: None, owners: Vec::new(), device, is_torch, is_borrowed: true });
        }
        match self.tensor(index, object)? {
            Form::Dense(Exported { tensor, owner }) => {
                let read = self.view(index, object, &tensor)?;
                // The list keeps the array itself anyway, and a capsule more for each of a million arrays takes memory.
                let owners = owner.into_iter().filter(|_| !is_numpy).collect();
                Ok(Extracted { read, write: None, owners, device: tensor.device, is_torch, is_borrowed: false })
            }
            Form::Sparse => self.extract_sparse(index, object),
            Form::Abstract(dtype, place) => {
                let device = Device { kind: Device::ABSTRACT, id: place };
                Ok(Extracted { read: View::none(dtype), write: None, owners: Vec::new(), device, is_torch, is_borrowed: false })
            }
        }
    }

    /// The memory of an object that lends it; None of others. Runs no Python code, but to describe an error.
    #[inline(always)]
    pub(crate) fn borrow(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Option<(View, Device)>> {
        let Some(Ok(tensor)) = self.producer(object)?.borrow(object) else { return Ok(None) };
        let tensor = self.checked(index, object, tensor)?;
        Ok(if lacks_memory(&tensor) { None } else { Some((self.view(index, object, &tensor)?, tensor.device)) })
    }

    /// The tensor of an object that lends it; None of others. Runs no Python code.
    #[inline(always)]
    pub(crate) fn lent(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Option<dlpack::Tensor>> {
        let Some(Ok(tensor)) = self.producer(object)?.borrow(object) else { return Ok(None) };
        // SAFETY: as in `checked`.
        Ok(unsafe { tensor.checked() }.ok())
    }

    /// What the object exports. The tensor of a form without an owner is borrowed.
    pub(crate) fn tensor(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Form> {
        let producer = self.producer(object)?;
        let is_torch = producer.is_torch;
        let exported = match producer.borrow(object) {
            Some(Ok(tensor)) => Ok(Exported { tensor: self.checked(index, object, tensor)?, owner: None }),
            Some(Err(error)) => Err(self.refusal(index, object, error)),
            None => {
                self.ran_python = true;
                self.capsule(index, object, is_torch)
            }
        };
        match exported {
            Ok(exported) if !is_torch || !lacks_memory(&exported.tensor) => return Ok(Form::Dense(exported)),
            Err(error) if !is_torch || !error.is_instance_of::<PyException>(object.py()) => return Err(error),
            _ => {}
        }
        // Few tensors come here, so that there is time to find out what they are.
        self.ran_python = true;
        if object.getattr(intern!(object.py(), "is_sparse"))?.is_truthy()? {
            return Ok(Form::Sparse);
        }
        // An AsyncCollectiveTensor: a collective of torch's may still be filling it.
        if let Some(wait) = object.getattr_opt(intern!(object.py(), "trigger_wait"))? {
            let filled = wait.call0()?;
            let mut form = self.tensor(index, &filled)?;
            if let Form::Dense(exported) = &mut form {
                exported.owner.get_or_insert(filled.unbind());
            }
            return Ok(form);
        }
        if self.is_abstract(object)? {
            return self.abstract_form(index, object);
        }
        exported.map(Form::Dense)
    }

    /// Whether a torch tensor whose memory there is no access to is one that torch computes with all the same.
    fn is_abstract(&self, object: &Bound<'py, PyAny>) -> PyResult<bool> {
        let py = object.py();
        let Some(tensor) = &self.torch_tensor else { return Ok(false) };
        let dispatch = intern!(py, "__torch_dispatch__");
        let is_wrapper = !object.get_type().getattr(dispatch)?.is(&tensor.getattr(dispatch)?);
        let dense = object.getattr(intern!(py, "layout"))?.str()? == "torch.strided";
        // The elements of a DTensor are not all here.
        let is_shard = object.hasattr(intern!(py, "to_local"))?;
        Ok(dense && !is_shard && (is_wrapper || object.getattr(intern!(py, "is_meta"))?.is_truthy()?))
    }

    fn abstract_form(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Form> {
        let py = object.py();
        if !self.anywhere {
            let name = self.names.describe(index, object);
            return Err(NotOnCPU::new_err(format!("{name} has no memory of its own: materialize it first")));
        }
        let dtype = self.torch_dtype(index, object)?;
        // The least that torch has to be able to do with it.
        object.call_method0(intern!(py, "detach")).map_err(|error| self.refusal(index, object, error))?;
        let device = object.getattr(intern!(py, "device"))?.str()?.to_string();
        let place = self.places.iter().position(|place| *place == device).unwrap_or_else(|| {
            self.places.push(device);
            self.places.len() - 1
        });
        Ok(Form::Abstract(dtype, place as i32))
    }

    #[inline(always)]
    fn producer(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Producer> {
        match &self.latest {
            Some((kind, producer)) if kind.as_type_ptr() == object.get_type_ptr() => return Ok(*producer),
            _ => {}
        }
        std::mem::swap(&mut self.latest, &mut self.previous);
        match &self.latest {
            Some((kind, producer)) if kind.as_type_ptr() == object.get_type_ptr() => return Ok(*producer),
            _ => {}
        }
        let kind = object.get_type();
        let producer = Producer::of(&kind, self.torch_tensor.as_ref())?;
        self.latest = Some((kind, producer));
        Ok(producer)
    }

    /// A sparse COO tensor is its values. Where indices repeat, their sums are measured, and the terms are what can be written.
    fn extract_sparse(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Extracted> {
        let py = object.py();
        let terms = object.call_method0(intern!(py, "_values"))?;
        let mut extracted = Extracted { is_borrowed: false, ..self.extract(index, &terms)? };
        extracted.owners.push(terms.unbind());
        if !object.call_method0(intern!(py, "is_coalesced"))?.is_truthy()? {
            let sums = object.call_method0(intern!(py, "coalesce"))?.call_method0(intern!(py, "_values"))?;
            let coalesced = self.extract(index, &sums)?;
            extracted.write = Some(std::mem::replace(&mut extracted.read, coalesced.read));
            extracted.owners.extend(coalesced.owners);
            extracted.owners.push(sums.unbind());
        }
        Ok(extracted)
    }

    /// By `__dlpack__`: the tensor and the capsule that owns it.
    fn capsule(&self, index: usize, object: &Bound<'py, PyAny>, is_torch: bool) -> PyResult<Exported> {
        let py = object.py();
        let Some(device) = object.getattr_opt(intern!(py, "__dlpack_device__"))? else {
            return Err(PyTypeError::new_err(format!(
                "{} is a {}: pass torch tensors, NumPy arrays or other objects with __dlpack__",
                self.names.of(index),
                object.get_type().name()?
            )));
        };
        let broken = |error: PyErr| self.refusal(index, object, error);
        let (kind, id) = device.call0().and_then(|device| device.extract::<(i32, i32)>()).map_err(broken)?;
        let device = Device { kind, id };
        self.check_device(index, object, device)?;
        if is_torch {
            self.torch_dtype(index, object)?;
        }
        let request = Request { is_torch, writing: self.writing, on_host: device.is_host() };
        let (capsule, mut may_write) = export(object, &request).map_err(broken)?;
        let tensor = match contents(&capsule).map_err(broken)? {
            Contents::Unversioned(tensor) => tensor,
            Contents::Versioned { is_copy: true, .. } if self.writing => {
                return Err(PyValueError::new_err(format!(
                    "{} exports a copy of its elements, so what is written there would be lost: pass what shares its memory",
                    self.names.describe(index, object)
                )));
            }
            Contents::Versioned { tensor, read_only, .. } => {
                may_write = !read_only;
                tensor
            }
            Contents::Unknown(major) => {
                return Err(PyBufferError::new_err(format!(
                    "{} exports DLPack {major}, and normclip reads DLPack {}",
                    self.names.of(index),
                    dlpack::MAJOR
                )));
            }
        };
        let tensor = self.checked(index, object, tensor)?;
        if self.writing && !may_write {
            return Err(PyValueError::new_err(format!("{} is read-only: pass a writable copy of it", self.names.describe(index, object))));
        }
        Ok(Exported { tensor, owner: Some(capsule.into_any().unbind()) })
    }

    #[inline(always)]
    fn checked(&self, index: usize, object: &Bound<'py, PyAny>, tensor: RawTensor) -> PyResult<dlpack::Tensor> {
        // SAFETY: all that comes here is of a producer. Callers use a borrowed tensor before Python code runs, or borrow it again (see
        // `each`), and keep the capsules of the others.
        unsafe { tensor.checked() }.map_err(|problem| self.names.fault(TensorError { index, problem }, object))
    }

    #[inline(always)]
    fn view(&self, index: usize, object: &Bound<'py, PyAny>, tensor: &dlpack::Tensor) -> PyResult<View> {
        let dtype = self.dtype(index, object, tensor)?;
        // What is no address says nothing about what shares memory with what.
        let (start, shape) = if tensor.device.has_addresses() { (tensor.start(), tensor.shape()) } else { (ptr::null_mut(), &[0][..]) };
        let strides = if tensor.device.has_addresses() { tensor.strides() } else { None };
        // SAFETY: the elements that a DLPack tensor describes are there as long as its owner lives, which whoever holds the view keeps, or if
        // it is borrowed until Python code runs, which callers notice by `each` and `check_unchanged`. That no other thread uses the
        // memory while a list is measured or changed is up to the caller in Python, as with the operations of NumPy and torch. Memory of
        // other devices is not touched: of their views only addresses and sizes are used.
        let view = unsafe { View::new(start, dtype, shape, strides) };
        view.map_err(|problem| self.names.fault(TensorError { index, problem }, object))
    }

    /// The element type of a tensor in memory that the CPU can read.
    #[inline(always)]
    pub(crate) fn dtype(&self, index: usize, object: &Bound<'py, PyAny>, tensor: &dlpack::Tensor) -> PyResult<Dtype> {
        if !tensor.device.is_host() {
            self.check_device(index, object, tensor.device)?;
        }
        match (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) {
            (2, 16, 1) => Ok(Dtype::F16),
            (2, 32, 1) => Ok(Dtype::F32),
            (2, 64, 1) => Ok(Dtype::F64),
            (4, 16, 1) => Ok(Dtype::Bf16),
            (5, 64, 1) => Ok(Dtype::C64),
            (5, 128, 1) => Ok(Dtype::C128),
            _ => Err(self.unknown_type(index, object)),
        }
    }

    /// The element type of a torch tensor, as torch tells it.
    fn torch_dtype(&self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Dtype> {
        match object.getattr(intern!(object.py(), "dtype"))?.str()?.to_str()? {
            "torch.float16" => Ok(Dtype::F16),
            "torch.bfloat16" => Ok(Dtype::Bf16),
            "torch.float32" => Ok(Dtype::F32),
            "torch.float64" => Ok(Dtype::F64),
            "torch.complex64" => Ok(Dtype::C64),
            "torch.complex128" => Ok(Dtype::C128),
            _ => Err(self.unknown_type(index, object)),
        }
    }

    #[cold]
    fn unknown_type(&self, index: usize, object: &Bound<'py, PyAny>) -> PyErr {
        let name = self.names.describe(index, object);
        PyTypeError::new_err(format!("{name} has an element type that normclip does not read: cast it, for example to float32"))
    }

    #[cold]
    fn check_device(&self, index: usize, object: &Bound<'py, PyAny>, device: Device) -> PyResult<()> {
        if device.is_host() {
            return Ok(());
        }
        let is_torch = match &self.torch_tensor {
            Some(tensor) => object.is_instance(tensor)?,
            None => false,
        };
        if is_torch && self.anywhere {
            return Ok(());
        }
        let (name, place) = (self.names.describe(index, object), place(object, device));
        Err(if is_torch {
            NotOnCPU::new_err(format!("{name} is on {place}, and normclip reads CPU memory: move it with .cpu()"))
        } else {
            PyTypeError::new_err(format!(
                "{name} is on {place}, and of other libraries than torch normclip reads CPU memory: pass torch.from_dlpack of it"
            ))
        })
    }

    /// The producer's own refusal, with the tensor's name and its first line. Interrupts and a lack of memory pass as they are.
    #[cold]
    fn refusal(&self, index: usize, object: &Bound<'py, PyAny>, error: PyErr) -> PyErr {
        let py = object.py();
        if !error.is_instance_of::<PyException>(py) || error.is_instance_of::<PyMemoryError>(py) {
            return error;
        }
        let reason = error.value(py).to_string();
        let reason = reason.lines().next().unwrap_or_default();
        let name = self.names.describe(index, object);
        PyTypeError::new_err(format!("{name} gives no access to its memory ({reason}): pass a dense CPU tensor with data, such as a copy"))
    }
}

/// Puts an item at an index of a vector: one that it has, or the next.
#[inline(always)]
pub(crate) fn put<T>(items: &mut Vec<T>, index: usize, item: T) {
    match items.get_mut(index) {
        Some(place) => *place = item,
        None => items.push(item),
    }
}

/// The device of an object, as its library calls it.
pub(crate) fn place(object: &Bound<'_, PyAny>, device: Device) -> String {
    let name = object.getattr("device").and_then(|place| place.str());
    name.map_or_else(|_| format!("device {}:{}", device.kind, device.id), |place| place.to_string())
}

/// Whether there are elements and nowhere to read them.
fn lacks_memory(tensor: &dlpack::Tensor) -> bool {
    tensor.start().is_null() && !tensor.shape().contains(&0)
}
