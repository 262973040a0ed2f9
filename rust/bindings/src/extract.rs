//! A Python object → the memory of its elements, by DLPack.
//!
//! Three ways in, fastest first: the C exchange API that a type may carry (torch ≥ 2.10; the tensor is borrowed), the versioned capsule,
//! which says whether writing is allowed, and the plain capsule of older producers, which does not.
//!
//! A capsule keeps its memory alive. What is borrowed stays valid only as long as no Python code runs that may free it, and any other way in
//! may run some: whoever takes several tensors asks `ran_python` at the end, and then borrows again.

use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::ptr;

use normclip_core::{Dtype, TensorError, View};
use pyo3::exceptions::{PyBufferError, PyException, PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyCapsule, PyCapsuleMethods, PyDict, PyType};
use pyo3::{create_exception, intern};

use crate::dlpack::{self, Borrow, Device, ExchangeApi, ExchangeHeader, ManagedTensor, ManagedTensorVersioned, RawTensor};
use crate::names::Names;

create_exception!(normclip._core, NotOnCPU, PyTypeError, "A tensor is in the memory of another device: `DeviceList` may take it.");

/// Memory to read, memory to write, and what keeps them alive besides the object itself.
pub(crate) struct Extracted {
    pub(crate) read: View,
    /// The same as `read`, but for sparse tensors with repeated indices: their sums are measured, their terms are scaled.
    pub(crate) write: Option<View>,
    pub(crate) owners: Vec<Py<PyAny>>,
    pub(crate) device: Device,
    pub(crate) is_torch: bool,
    /// Whether it is borrowed.
    pub(crate) lent: bool,
}

/// A tensor as it was exported. It is alive as long as the object and the owner; without one it is borrowed.
pub(crate) struct Exported {
    pub(crate) tensor: dlpack::Tensor,
    pub(crate) owner: Option<Py<PyAny>>,
}

/// What there is to take of an object.
pub(crate) enum Form {
    Dense(Exported),
    /// A COO tensor of torch, which has no memory of its own.
    Sparse,
    /// A tensor that torch computes with although it has no memory to look at: on the meta device, or of a subclass that keeps its elements
    /// elsewhere. With the number of its device, in the order in which they were met.
    Abstract(Dtype, i32),
}

/// What the type of an object tells.
#[derive(Clone, Copy)]
struct TypeFacts {
    borrow: Option<Borrow>,
    is_torch: bool,
    /// Whether it is NumPy's own array: its capsule keeps the array and nothing besides.
    is_array: bool,
}

/// Takes objects one after the other.
pub(crate) struct Extractor<'a, 'py> {
    names: &'a Names,
    torch_tensor: Option<Bound<'py, PyAny>>,
    /// The type that was looked up last, and its facts: lists are mostly of one type.
    latest: Option<(Bound<'py, PyType>, TypeFacts)>,
    writing: bool,
    /// Whether torch tensors are taken too whose elements the CPU cannot read.
    anywhere: bool,
    /// The devices of abstract tensors.
    places: Vec<String>,
    ran_python: bool,
}

impl<'a, 'py> Extractor<'a, 'py> {
    pub(crate) fn new(py: Python<'py>, names: &'a Names, writing: bool) -> PyResult<Self> {
        let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?.cast_into::<PyDict>()?;
        let torch_tensor = match modules.get_item(intern!(py, "torch"))? {
            Some(torch) => torch.getattr_opt(intern!(py, "Tensor"))?,
            None => None,
        };
        Ok(Self { names, torch_tensor, latest: None, writing, anywhere: false, places: Vec::new(), ran_python: false })
    }

    /// The same for torch tensors on any device.
    pub(crate) fn anywhere(self) -> Self {
        Self { anywhere: true, ..self }
    }

    /// How its objects are called.
    pub(crate) fn names(&self) -> &'a Names {
        self.names
    }

    /// Whether anything has been taken by other means than borrowing, so that what is borrowed may no longer be valid.
    pub(crate) fn ran_python(&self) -> bool {
        self.ran_python
    }

    /// The object with torch's lazy conjugate and negative carried out: they are flags that memory does not show.
    pub(crate) fn resolved(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        if !self.facts(object)?.is_torch {
            return Ok(object.clone());
        }
        let py = object.py();
        object.call_method0(intern!(py, "resolve_conj"))?.call_method0(intern!(py, "resolve_neg"))
    }

    /// The memory of the object at this index of the list.
    pub(crate) fn extract(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Extracted> {
        // What nearly all tensors of a model are, first and without a detour: there may be thousands.
        let TypeFacts { is_torch, is_array, .. } = self.facts(object)?;
        if let Some((read, device)) = self.borrow(index, object)? {
            return Ok(Extracted { read, write: None, owners: Vec::new(), device, is_torch, lent: true });
        }
        match self.tensor(index, object)? {
            Form::Dense(Exported { tensor, owner }) => {
                let read = self.view(index, object, &tensor)?;
                // The array itself is kept anyway, and a million capsules are no trifle.
                let owners = owner.into_iter().filter(|_| !is_array).collect();
                Ok(Extracted { read, write: None, owners, device: tensor.device, is_torch, lent: false })
            }
            Form::Sparse => self.extract_sparse(index, object),
            Form::Abstract(dtype, place) => {
                let device = Device { kind: Device::ABSTRACT, id: place };
                Ok(Extracted { read: View::none(dtype), write: None, owners: Vec::new(), device, is_torch, lent: false })
            }
        }
    }

    /// The memory of an object that lends it, without any code of Python's.
    pub(crate) fn borrow(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Option<(View, Device)>> {
        let Some(Ok(tensor)) = self.facts(object)?.borrow.map(|borrow| borrow_tensor(object, borrow)) else { return Ok(None) };
        let tensor = self.checked(index, object, tensor)?;
        Ok(if lacks_memory(&tensor) { None } else { Some((self.view(index, object, &tensor)?, tensor.device)) })
    }

    /// What the object exports.
    pub(crate) fn tensor(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Form> {
        let TypeFacts { borrow, is_torch, .. } = self.facts(object)?;
        let exported = match borrow.map(|borrow| borrow_tensor(object, borrow)) {
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
        // Only now is time to ask for what few tensors are.
        self.ran_python = true;
        if object.getattr(intern!(object.py(), "is_sparse"))?.is_truthy()? {
            return Ok(Form::Sparse);
        }
        // What a collective of torch's is still filling: an AsyncCollectiveTensor.
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

    fn facts(&mut self, object: &Bound<'py, PyAny>) -> PyResult<TypeFacts> {
        match &self.latest {
            Some((of, facts)) if of.as_type_ptr() == object.get_type_ptr() => return Ok(*facts),
            _ => {}
        }
        let of = object.get_type();
        let is_torch = match &self.torch_tensor {
            Some(tensor) => of.is_subclass(tensor)?,
            None => false,
        };
        let borrow = match of.getattr_opt(intern!(object.py(), "__dlpack_c_exchange_api__"))? {
            Some(capsule) if !capsule.is_none() => borrow_function(&capsule)?,
            _ => None,
        };
        let is_array = of.fully_qualified_name()?.to_cow()? == "numpy.ndarray";
        let facts = TypeFacts { borrow, is_torch, is_array };
        self.latest = Some((of, facts));
        Ok(facts)
    }

    /// A sparse COO tensor is its values. Where indices repeat, their sums are measured, and the terms are what can be written.
    fn extract_sparse(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Extracted> {
        let py = object.py();
        let terms = object.call_method0(intern!(py, "_values"))?;
        let mut extracted = Extracted { lent: false, ..self.extract(index, &terms)? };
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
        let exporter = if is_torch {
            self.torch_dtype(index, object)?;
            &bare(object).map_err(broken)?
        } else {
            object
        };
        let arguments = PyDict::new(py);
        arguments.set_item(intern!(py, "max_version"), (dlpack::MAJOR, 0))?;
        if self.writing {
            arguments.set_item(intern!(py, "copy"), false)?;
        }
        if !device.is_host() {
            // A torch tensor, as nothing else is taken there. No waiting between streams: as with torch's own operations, what is launched
            // later goes to the stream that is current then.
            arguments.set_item(intern!(py, "stream"), -1)?;
        }
        // A capsule without a version cannot say whether its memory may be written. torch exports only what may.
        let mut may_write = is_torch;
        let versioned = exporter.call_method(intern!(py, "__dlpack__"), (), Some(&arguments));
        let exported = match versioned {
            // Producers from before version 1 do not know these arguments.
            Err(error) if error.is_instance_of::<PyTypeError>(py) => {
                let array = object.is_instance(&py.import(intern!(py, "numpy"))?.getattr(intern!(py, "ndarray"))?)?;
                let read_only = array && !object.getattr(intern!(py, "flags"))?.getattr(intern!(py, "writeable"))?.is_truthy()?;
                may_write = is_torch || array && !read_only;
                let exporter = if read_only { &seemingly_writable(object)? } else { exporter };
                exporter.call_method0(intern!(py, "__dlpack__"))
            }
            other => other,
        };
        let capsule = exported.and_then(|capsule| Ok(capsule.cast_into::<PyCapsule>()?)).map_err(broken)?;
        // The capsule is kept and never renamed, so it stays the owner and cleans up when it goes.
        let pointer = |name: &CStr| capsule.pointer_checked(Some(name));
        let tensor = if let Ok(managed) = pointer(c"dltensor_versioned") {
            let managed = managed.cast::<ManagedTensorVersioned>();
            // SAFETY: the name says that the capsule holds this struct. Its version comes first and is checked before the rest is believed.
            let major = unsafe { (*managed.as_ptr()).version.major };
            if major != dlpack::MAJOR {
                return Err(PyBufferError::new_err(format!(
                    "{} exports DLPack {major}, and normclip reads DLPack 1",
                    self.names.of(index)
                )));
            }
            // SAFETY: a DLManagedTensorVersioned of our version, alive as long as the capsule.
            let managed = unsafe { managed.as_ref() };
            if self.writing && managed.flags & dlpack::IS_COPIED != 0 {
                return Err(PyValueError::new_err(format!(
                    "{} exports a copy of its elements, so what is written there would be lost: pass what shares its memory",
                    self.names.describe(index, object)
                )));
            }
            may_write = managed.flags & dlpack::READ_ONLY == 0;
            managed.tensor
        } else {
            let managed = pointer(c"dltensor").map_err(broken)?.cast::<ManagedTensor>();
            // SAFETY: the name says that the capsule holds this struct.
            unsafe { managed.as_ref() }.tensor
        };
        let tensor = self.checked(index, object, tensor)?;
        if self.writing && !may_write {
            return Err(PyValueError::new_err(format!("{} is read-only: pass a writable copy of it", self.names.describe(index, object))));
        }
        Ok(Exported { tensor, owner: Some(capsule.into_any().unbind()) })
    }

    fn checked(&self, index: usize, object: &Bound<'py, PyAny>, tensor: RawTensor) -> PyResult<dlpack::Tensor> {
        // SAFETY: all that comes here is of a producer. Callers use a borrowed tensor before Python code runs, or borrow it again (see
        // `ran_python`), and keep the capsules of the others.
        unsafe { tensor.checked() }.map_err(|problem| self.names.fault(TensorError { index, problem }, object))
    }

    fn view(&self, index: usize, object: &Bound<'py, PyAny>, tensor: &dlpack::Tensor) -> PyResult<View> {
        let dtype = self.dtype(index, object, tensor)?;
        // A handle says nothing about what shares memory with what.
        let (start, shape) = if tensor.device.has_addresses() { (tensor.start(), tensor.shape()) } else { (ptr::null_mut(), &[0][..]) };
        let strides = if tensor.device.has_addresses() { tensor.strides() } else { None };
        // SAFETY: a DLPack tensor describes memory that is valid while its owner lives, and lists keep the owners. That nobody writes it
        // meanwhile is up to the caller in Python, as with every in-place operation of NumPy and torch. Memory of other devices is
        // never read or written here: `DeviceList` passes addresses on.
        let view = unsafe { View::new(start, dtype, shape, strides) };
        view.map_err(|problem| self.names.fault(TensorError { index, problem }, object))
    }

    /// The element type of a tensor in memory that the CPU can read.
    pub(crate) fn dtype(&self, index: usize, object: &Bound<'py, PyAny>, tensor: &dlpack::Tensor) -> PyResult<Dtype> {
        self.check_device(index, object, tensor.device)?;
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

    fn unknown_type(&self, index: usize, object: &Bound<'py, PyAny>) -> PyErr {
        let name = self.names.describe(index, object);
        PyTypeError::new_err(format!("{name} has an element type that normclip does not read: cast it, for example to float32"))
    }

    fn check_device(&self, index: usize, object: &Bound<'py, PyAny>, device: Device) -> PyResult<()> {
        if device.is_host() {
            return Ok(());
        }
        let name = self.names.describe(index, object);
        let place = object
            .getattr("device")
            .and_then(|place| place.str())
            .map_or_else(|_| format!("device {}:{}", device.kind, device.id), |place| place.to_string());
        let is_torch = match &self.torch_tensor {
            Some(tensor) => object.is_instance(tensor)?,
            None => false,
        };
        if !is_torch {
            return Err(PyTypeError::new_err(format!(
                "{name} is on {place}, and of other libraries than torch normclip reads CPU memory: pass torch.from_dlpack of it"
            )));
        }
        if self.anywhere {
            return Ok(());
        }
        Err(NotOnCPU::new_err(format!("{name} is on {place}, and normclip reads CPU memory: move it with .cpu()")))
    }

    /// The producer's own refusal, with the tensor's name and its first line. Interrupts and a lack of memory pass as they are.
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

/// A torch tensor of the same memory that torch agrees to export: what requires a gradient, or is lazily conjugated, it refuses. The conjugate
/// of a lazy conjugate is the memory as it is.
fn bare<'py>(tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = tensor.py();
    let detached = tensor.call_method0(intern!(py, "detach"))?;
    let conjugate = detached.call_method0(intern!(py, "is_conj"))?.is_truthy()?;
    if conjugate { detached.call_method0(intern!(py, "conj")) } else { Ok(detached) }
}

/// A NumPy array of the same memory that does not say that it is read-only: NumPy before version 2.1 exports no other.
fn seemingly_writable<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = array.py();
    let interface = array.getattr(intern!(py, "__array_interface__"))?;
    let (address, _) = interface.get_item(intern!(py, "data"))?.extract::<(usize, bool)>()?;
    interface.set_item(intern!(py, "data"), (address, false))?;
    let attributes = [(intern!(py, "__array_interface__"), interface)].into_py_dict(py)?;
    let holder = py.import(intern!(py, "types"))?.call_method(intern!(py, "SimpleNamespace"), (), Some(&attributes))?;
    py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "asarray"), (holder,))
}

/// Whether there are elements and nowhere to read them.
fn lacks_memory(tensor: &dlpack::Tensor) -> bool {
    tensor.start().is_null() && !tensor.shape().contains(&0)
}

/// The function of a C exchange API that lends a tensor, if its version is ours.
fn borrow_function(capsule: &Bound<'_, PyAny>) -> PyResult<Option<Borrow>> {
    let capsule = capsule.cast::<PyCapsule>()?;
    let mut header = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?.cast::<ExchangeHeader>().as_ptr().cast_const();
    // SAFETY: the capsule holds a pointer to a chain of headers, newest first, that lives as long as the process.
    while let Some(found) = unsafe { header.as_ref() } {
        if found.version.major == dlpack::MAJOR {
            // SAFETY: a header of version 1 is the beginning of this struct.
            return Ok(unsafe { (*header.cast::<ExchangeApi>()).borrow });
        }
        header = found.previous;
    }
    Ok(None)
}

fn borrow_tensor(object: &Bound<'_, PyAny>, borrow: Borrow) -> PyResult<RawTensor> {
    let mut tensor = MaybeUninit::uninit();
    // SAFETY: the function comes from the type of this object, and we are attached to the interpreter.
    let status = unsafe { borrow(object.as_ptr().cast::<c_void>(), tensor.as_mut_ptr()) };
    if status != 0 {
        return Err(PyErr::fetch(object.py()));
    }
    // SAFETY: the function has succeeded, so it has filled in the tensor.
    Ok(unsafe { tensor.assume_init() })
}
