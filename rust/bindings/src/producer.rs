//! How an object gives access to its memory: the C exchange API of its type, which lends a tensor, and the capsules of `__dlpack__`.
//!
//! DLPack calls such an object the producer. What it says is read here and judged in `extract`.

use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;

use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyCapsule, PyCapsuleMethods, PyDict, PyType};

use crate::dlpack::{self, Borrow, ExchangeApi, ExchangeHeader, ManagedTensor, ManagedTensorVersioned, RawTensor};

/// What the type of an object says about its objects.
#[derive(Clone, Copy)]
pub(crate) struct Producer {
    /// The function that lends a tensor; not all types have one.
    borrow: Option<Borrow>,
    pub(crate) is_torch: bool,
    /// Whether it is `numpy.ndarray` itself. The owner of such a capsule is the array and nothing besides.
    pub(crate) is_numpy: bool,
}

impl Producer {
    /// What this type says. `torch_tensor` is `torch.Tensor`, where torch is imported.
    pub(crate) fn of<'py>(kind: &Bound<'py, PyType>, torch_tensor: Option<&Bound<'py, PyAny>>) -> PyResult<Self> {
        let is_torch = match torch_tensor {
            Some(tensor) => kind.is_subclass(tensor)?,
            None => false,
        };
        let borrow = exchange_api(kind)?.and_then(|api| api.borrow);
        let is_numpy = borrow.is_none() && kind.fully_qualified_name()?.to_cow()? == "numpy.ndarray";
        Ok(Self { borrow, is_torch, is_numpy })
    }

    /// Borrows the tensor of an object of this type, if the type lends them. Runs no Python code.
    ///
    /// The tensor and the numbers that it points to are valid until the object is freed or its memory exchanged, which only Python code does.
    #[inline(always)]
    pub(crate) fn borrow(&self, object: &Bound<'_, PyAny>) -> Option<PyResult<RawTensor>> {
        let borrow = self.borrow?;
        let mut tensor = MaybeUninit::uninit();
        // SAFETY: the function comes from the type of this object, and we are attached to the interpreter.
        let status = unsafe { borrow(object.as_ptr().cast::<c_void>(), tensor.as_mut_ptr()) };
        if status != 0 {
            return Some(Err(PyErr::fetch(object.py())));
        }
        // SAFETY: the function has succeeded, so it has filled in the tensor.
        Some(Ok(unsafe { tensor.assume_init() }))
    }
}

/// The C exchange API of a type, if it has one, of the version that we know.
pub(crate) fn exchange_api(kind: &Bound<'_, PyAny>) -> PyResult<Option<&'static ExchangeApi>> {
    let Some(capsule) = kind.getattr_opt(intern!(kind.py(), "__dlpack_c_exchange_api__"))?.filter(|capsule| !capsule.is_none()) else {
        return Ok(None);
    };
    let capsule = capsule.cast::<PyCapsule>()?;
    let mut header = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?.cast::<ExchangeHeader>().as_ptr().cast_const();
    // SAFETY: the capsule holds a pointer to a chain of headers, newest first, that lives as long as the process.
    while let Some(found) = unsafe { header.as_ref() } {
        if found.version.major == dlpack::MAJOR {
            // SAFETY: a header of version 1 is the beginning of this struct, which lives as long as the header.
            return Ok(unsafe { header.cast::<ExchangeApi>().as_ref() });
        }
        header = found.previous;
    }
    Ok(None)
}

/// What is asked of `__dlpack__`.
pub(crate) struct Request {
    pub(crate) is_torch: bool,
    /// Whether the tensor is to be written, so that a copy of it is of no use.
    pub(crate) writing: bool,
    pub(crate) on_host: bool,
}

/// The capsule of an object's `__dlpack__`, and whether its memory may be written if the capsule itself does not say.
pub(crate) fn export<'py>(object: &Bound<'py, PyAny>, request: &Request) -> PyResult<(Bound<'py, PyCapsule>, bool)> {
    let py = object.py();
    let exporter = if request.is_torch { &bare(object)? } else { object };
    let arguments = PyDict::new(py);
    arguments.set_item(intern!(py, "max_version"), (dlpack::MAJOR, 0))?;
    if request.writing {
        arguments.set_item(intern!(py, "copy"), false)?;
    }
    if !request.on_host {
        // A torch tensor: no other is asked for where it is not on the host. −1 is not to wait between streams: as with torch's own
        // operations, what is launched later goes to the stream that is current then.
        arguments.set_item(intern!(py, "stream"), -1)?;
    }
    let dlpack = intern!(py, "__dlpack__");
    // A capsule without a version cannot say whether its memory may be written. torch exports only what may.
    let (capsule, may_write) = match exporter.call_method(dlpack, (), Some(&arguments)) {
        // Producers from before version 1 do not know these arguments.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => {
            let array = object.is_instance(&py.import(intern!(py, "numpy"))?.getattr(intern!(py, "ndarray"))?)?;
            let read_only = array && !object.getattr(intern!(py, "flags"))?.getattr(intern!(py, "writeable"))?.is_truthy()?;
            let exporter = if read_only { &seemingly_writable(object)? } else { exporter };
            (exporter.call_method0(dlpack)?, request.is_torch || array && !read_only)
        }
        capsule => (capsule?, request.is_torch),
    };
    Ok((capsule.cast_into()?, may_write))
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

/// What a capsule holds. Its tensor is valid as long as the capsule.
pub(crate) enum Contents {
    /// A tensor of DLPack 1, which says what may be done with it.
    Versioned { tensor: RawTensor, read_only: bool, is_copy: bool },
    /// A tensor from before version 1.
    Unversioned(RawTensor),
    /// A tensor of another major version, which cannot be read.
    Unknown(u32),
}

/// Reads a capsule. It is not renamed, unlike by consumers that take over the tensor: so it stays the owner, and its destructor frees it.
pub(crate) fn contents(capsule: &Bound<'_, PyCapsule>) -> PyResult<Contents> {
    let pointer = |name: &CStr| capsule.pointer_checked(Some(name));
    let Ok(managed) = pointer(c"dltensor_versioned") else {
        let managed = pointer(c"dltensor")?.cast::<ManagedTensor>();
        // SAFETY: a capsule of this name holds this struct, which lives as long as the capsule.
        return Ok(Contents::Unversioned(unsafe { managed.as_ref() }.tensor));
    };
    let managed = managed.cast::<ManagedTensorVersioned>();
    // SAFETY: a capsule of this name holds a struct that begins with its version. No more is read before the version is known.
    let major = unsafe { (*managed.as_ptr()).version.major };
    if major != dlpack::MAJOR {
        return Ok(Contents::Unknown(major));
    }
    // SAFETY: in version 1 it is this struct, which lives as long as the capsule.
    let managed = unsafe { managed.as_ref() };
    Ok(Contents::Versioned {
        tensor: managed.tensor,
        read_only: managed.flags & dlpack::READ_ONLY != 0,
        is_copy: managed.flags & dlpack::IS_COPIED != 0,
    })
}
