//! A Python object → the memory of its elements, by DLPack.
//!
//! Three ways in, fastest first: the C exchange API that a type may carry (torch ≥ 2.10; the tensor is borrowed), the versioned capsule,
//! which says whether writing is allowed, and the plain capsule of older producers, which does not.

use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::ptr;

use normclip_core::{Dtype, TensorError, View};
use pyo3::exceptions::{PyBufferError, PyException, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyDict, PyType};
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
}

/// A tensor as it was exported. It is alive as long as the object and the owner.
pub(crate) struct Exported {
    pub(crate) tensor: dlpack::Tensor,
    pub(crate) owner: Option<Py<PyAny>>,
    is_torch: bool,
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
    /// Whether torch tensors in memory that the CPU cannot read are taken too.
    anywhere: bool,
}

impl<'a, 'py> Extractor<'a, 'py> {
    pub(crate) fn new(py: Python<'py>, names: &'a Names, writing: bool) -> PyResult<Self> {
        let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?.cast_into::<PyDict>()?;
        let torch_tensor = match modules.get_item(intern!(py, "torch"))? {
            Some(torch) => torch.getattr_opt(intern!(py, "Tensor"))?,
            None => None,
        };
        Ok(Self { names, torch_tensor, latest: None, writing, anywhere: false })
    }

    /// The same for torch tensors on any device.
    pub(crate) fn anywhere(self) -> Self {
        Self { anywhere: true, ..self }
    }

    /// How its objects are called.
    pub(crate) fn names(&self) -> &'a Names {
        self.names
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
        let TypeFacts { borrow, is_torch, is_array } = self.facts(object)?;
        if let Some(borrow) = borrow
            && let Ok(tensor) = borrow_tensor(object, borrow)
        {
            let tensor = self.checked(index, object, tensor)?;
            let read = self.view(index, object, &tensor)?;
            return Ok(Extracted { read, write: None, owners: Vec::new(), device: tensor.device, is_torch });
        }
        match self.tensor(index, object)? {
            Some(Exported { tensor, owner, is_torch }) => {
                let read = self.view(index, object, &tensor)?;
                // The array itself is kept anyway, and a million capsules are no trifle.
                let owners = owner.into_iter().filter(|_| !is_array).collect();
                Ok(Extracted { read, write: None, owners, device: tensor.device, is_torch })
            }
            None => self.extract_sparse(index, object),
        }
    }

    /// What the object exports; None for a sparse tensor of torch, which has no memory of its own.
    pub(crate) fn tensor(&mut self, index: usize, object: &Bound<'py, PyAny>) -> PyResult<Option<Exported>> {
        let TypeFacts { borrow, is_torch, .. } = self.facts(object)?;
        let borrowed = borrow.map(|borrow| borrow_tensor(object, borrow));
        if let Some(Ok(tensor)) = borrowed {
            return Ok(Some(Exported { tensor: self.checked(index, object, tensor)?, owner: None, is_torch }));
        }
        // Asking all tensors whether they are sparse would take as long as borrowing.
        if is_torch && object.getattr(intern!(object.py(), "is_sparse"))?.is_truthy()? {
            return Ok(None);
        }
        if let Some(Err(error)) = borrowed {
            return Err(self.refusal(index, object, error));
        }
        let (tensor, capsule, read_only) = self.capsule(index, object, is_torch)?;
        if self.writing && read_only {
            return Err(PyValueError::new_err(format!("{} is read-only: pass a writable copy of it", self.names.describe(index, object))));
        }
        Ok(Some(Exported { tensor, owner: Some(capsule), is_torch }))
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
        let mut extracted = self.extract(index, &terms)?;
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

    /// By `__dlpack__`: the tensor, the capsule that owns it, and whether it is read-only.
    fn capsule(&self, index: usize, object: &Bound<'py, PyAny>, is_torch: bool) -> PyResult<(dlpack::Tensor, Py<PyAny>, bool)> {
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
        // torch refuses to export what requires a gradient, although its memory may be read.
        let exporter = if is_torch { &object.call_method0(intern!(py, "detach"))? } else { object };
        let arguments = PyDict::new(py);
        arguments.set_item(intern!(py, "max_version"), (dlpack::MAJOR, 0))?;
        if !device.is_host() {
            // No waiting between streams: what is launched later goes to the stream that is current then.
            arguments.set_item(intern!(py, "stream"), -1)?;
        }
        let versioned = exporter.call_method(intern!(py, "__dlpack__"), (), Some(&arguments));
        let exported = match versioned {
            // Producers from before version 1 do not know the argument.
            Err(error) if error.is_instance_of::<PyTypeError>(py) => exporter.call_method0(intern!(py, "__dlpack__")),
            other => other,
        };
        let capsule = exported.and_then(|capsule| Ok(capsule.cast_into::<PyCapsule>()?)).map_err(broken)?;
        // The capsule is kept and never renamed, so it stays the owner and cleans up when it goes.
        let pointer = |name: &CStr| capsule.pointer_checked(Some(name));
        let (tensor, read_only) = if let Ok(managed) = pointer(c"dltensor_versioned") {
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
            (managed.tensor, managed.flags & dlpack::READ_ONLY != 0)
        } else {
            let managed = pointer(c"dltensor").map_err(broken)?.cast::<ManagedTensor>();
            // SAFETY: the name says that the capsule holds this struct.
            let tensor = unsafe { managed.as_ref() }.tensor;
            // It cannot say whether it may be written. NumPy and torch export only what may; of others (JAX) we do not know.
            let numpy = object.get_type().module()?.to_string_lossy() == "numpy";
            (tensor, !is_torch && !numpy)
        };
        Ok((self.checked(index, object, tensor)?, capsule.into_any().unbind(), read_only))
    }

    fn checked(&self, index: usize, object: &Bound<'py, PyAny>, tensor: RawTensor) -> PyResult<dlpack::Tensor> {
        tensor.checked().map_err(|problem| self.names.fault(TensorError { index, problem }, object))
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
            _ => {
                let name = self.names.describe(index, object);
                Err(PyTypeError::new_err(format!(
                    "{name} has an element type that normclip does not read: cast it, for example to float32"
                )))
            }
        }
    }

    fn check_device(&self, index: usize, object: &Bound<'py, PyAny>, device: Device) -> PyResult<()> {
        if device.is_host() {
            return Ok(());
        }
        if self.anywhere
            && let Some(tensor) = &self.torch_tensor
            && object.is_instance(tensor)?
        {
            return Ok(());
        }
        let name = self.names.describe(index, object);
        let place = object
            .getattr("device")
            .and_then(|place| place.str())
            .map_or_else(|_| format!("device {}:{}", device.kind, device.id), |place| place.to_string());
        let message = format!("{name} is on {place}, and normclip reads CPU memory: move it with .cpu()");
        Err(if self.anywhere { PyTypeError::new_err(message) } else { NotOnCPU::new_err(message) })
    }

    /// The producer's own refusal, with the tensor's name and its first line. Interrupts pass as they are.
    fn refusal(&self, index: usize, object: &Bound<'py, PyAny>, error: PyErr) -> PyErr {
        if !error.is_instance_of::<PyException>(object.py()) {
            return error;
        }
        let reason = error.value(object.py()).to_string();
        let reason = reason.lines().next().unwrap_or_default();
        let name = self.names.describe(index, object);
        PyTypeError::new_err(format!("{name} gives no access to its memory ({reason}): pass a dense CPU tensor with data, such as a copy"))
    }
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
