//! The C structs of DLPack 1.x, as its `dlpack.h` defines them. Enumerations are plain integers here: a producer may know more of them than we do.

use std::ffi::{c_int, c_void};

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    pub(crate) id: i32,
}

/// Devices whose memory the CPU can read: `kDLCPU` and `kDLCUDAHost` (pinned).
pub(crate) const HOST_DEVICES: [i32; 2] = [1, 3];

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DataType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Tensor {
    pub(crate) data: *mut c_void,
    pub(crate) device: Device,
    pub(crate) ndim: i32,
    pub(crate) dtype: DataType,
    pub(crate) shape: *const i64,
    pub(crate) strides: *const i64,
    pub(crate) byte_offset: u64,
}

/// `DLManagedTensor`, of capsules named "dltensor".
#[repr(C)]
pub(crate) struct ManagedTensor {
    pub(crate) tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLPackVersion`.
#[repr(C)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// `DLManagedTensorVersioned`, of capsules named "dltensor_versioned".
#[repr(C)]
pub(crate) struct ManagedTensorVersioned {
    pub(crate) version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    pub(crate) flags: u64,
    pub(crate) tensor: Tensor,
}

/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
pub(crate) const READ_ONLY: u64 = 1;

/// The major version whose layouts these are.
pub(crate) const MAJOR: u32 = 1;

/// `DLPackExchangeAPIHeader`: what stays the same across versions.
#[repr(C)]
pub(crate) struct ExchangeHeader {
    pub(crate) version: Version,
    pub(crate) previous: *const ExchangeHeader,
}

/// `DLPackDLTensorFromPyObjectNoSync`: fills in a tensor borrowed from a Python object, or returns −1 with a Python error set.
pub(crate) type Borrow = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;

/// `DLPackExchangeAPI`. We use one function of it.
#[repr(C)]
pub(crate) struct ExchangeApi {
    header: ExchangeHeader,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object: *const c_void,
    managed_tensor_to_py_object: *const c_void,
    pub(crate) borrow: Option<Borrow>,
    current_work_stream: *const c_void,
}
