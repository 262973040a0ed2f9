//! The C structs of DLPack 1.x, as its `dlpack.h` defines them. Enumerations are plain integers here: a producer may know more of them than
//! we do.

use std::ffi::{c_int, c_void};
use std::{ptr, slice};

use normclip_core::Problem;

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    pub(crate) id: i32,
}

impl Device {
    /// No kind of DLPack's: of tensors that have no memory.
    pub(crate) const ABSTRACT: i32 = -1;

    /// Whether the CPU can read its memory: `kDLCPU` and `kDLCUDAHost` (pinned).
    pub(crate) fn is_host(self) -> bool {
        matches!(self.kind, 1 | 3)
    }

    /// Whether its pointers are addresses in the address space of the process, as those of CUDA and ROCm are (`kDLCUDA`, `kDLROCM`,
    /// `kDLROCMHost`, `kDLCUDAManaged`). Other devices may hand out handles.
    pub(crate) fn has_addresses(self) -> bool {
        self.is_host() || matches!(self.kind, 2 | 10 | 11 | 13)
    }
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DataType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

/// `DLTensor`, as a producer fills it in, to be used by what [`RawTensor::checked`] makes of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawTensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

impl RawTensor {
    /// The tensor, if it has the numbers that it needs. Whether its shape and strides describe memory is checked by `View`.
    ///
    /// # Safety
    /// A producer of DLPack tensors has filled it in. The result must not be used after its shape and strides are gone: those of a tensor from
    /// a capsule live as long as the capsule, those of a borrowed tensor until any Python code runs, which may free or resize the object.
    pub(crate) unsafe fn checked(self) -> Result<Tensor, Problem> {
        let rank = usize::try_from(self.ndim).map_err(|_| Problem::Malformed)?;
        if rank > 0 && self.shape.is_null() {
            return Err(Problem::Malformed);
        }
        let start = if self.data.is_null() {
            ptr::null_mut()
        } else {
            let offset = usize::try_from(self.byte_offset).map_err(|_| Problem::Malformed)?;
            (self.data as usize).checked_add(offset).ok_or(Problem::Malformed)?;
            self.data.cast::<u8>().wrapping_add(offset)
        };
        Ok(Tensor { start, device: self.device, dtype: self.dtype, rank, shape: self.shape, strides: self.strides })
    }
}

/// A tensor with the numbers that it needs. Shape and strides are in its producer's memory: see [`RawTensor::checked`] for how long.
#[derive(Clone, Copy)]
pub(crate) struct Tensor {
    start: *mut u8,
    pub(crate) device: Device,
    pub(crate) dtype: DataType,
    rank: usize,
    shape: *const i64,
    strides: *const i64,
}

impl Tensor {
    /// The address of the first element, or null.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    /// The size of each dimension.
    pub(crate) fn shape(&self) -> &[i64] {
        self.numbers(self.shape).unwrap_or(&[])
    }

    /// The strides in elements; None for row-major order.
    pub(crate) fn strides(&self) -> Option<&[i64]> {
        self.numbers(self.strides)
    }

    fn numbers(&self, start: *const i64) -> Option<&[i64]> {
        // SAFETY: DLPack promises `ndim` numbers there, and whoever called `RawTensor::checked`, that they still are.
        (self.rank > 0 && !start.is_null()).then(|| unsafe { slice::from_raw_parts(start, self.rank) })
    }
}

/// `DLManagedTensor`, of capsules named "dltensor".
#[repr(C)]
pub(crate) struct ManagedTensor {
    pub(crate) tensor: RawTensor,
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
    pub(crate) tensor: RawTensor,
}

impl ManagedTensorVersioned {
    /// A 0-dim tensor in CPU memory: the floating-point number of so many bits at this address. The deleter frees the whole.
    pub(crate) fn scalar(number: *mut c_void, bits: u8, deleter: unsafe extern "C" fn(*mut Self)) -> Self {
        let (device, dtype) = (Device { kind: 1, id: 0 }, DataType { code: 2, bits, lanes: 1 });
        let tensor = RawTensor { data: number, device, ndim: 0, dtype, shape: ptr::null(), strides: ptr::null(), byte_offset: 0 };
        Self { version: Version { major: MAJOR, minor: 0 }, context: ptr::null_mut(), deleter: Some(deleter), flags: 0, tensor }
    }
}

/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
pub(crate) const READ_ONLY: u64 = 1;

/// `DLPACK_FLAG_BITMASK_IS_COPIED`.
pub(crate) const IS_COPIED: u64 = 2;

/// The major version whose layouts these are.
pub(crate) const MAJOR: u32 = 1;

/// `DLPackExchangeAPIHeader`: what stays the same across versions.
#[repr(C)]
pub(crate) struct ExchangeHeader {
    pub(crate) version: Version,
    pub(crate) previous: *const ExchangeHeader,
}

/// `DLPackDLTensorFromPyObjectNoSync`: fills in a tensor borrowed from a Python object, or returns −1 with a Python error set.
pub(crate) type Borrow = unsafe extern "C" fn(*mut c_void, *mut RawTensor) -> c_int;

/// `DLPackManagedTensorToPyObjectNoSync`: makes a Python object that takes over a tensor, or returns −1 with a Python error set.
pub(crate) type Adopt = unsafe extern "C" fn(*mut ManagedTensorVersioned, *mut *mut c_void) -> c_int;

/// `DLPackExchangeAPI`. We use two functions of it.
#[repr(C)]
pub(crate) struct ExchangeApi {
    header: ExchangeHeader,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object: *const c_void,
    pub(crate) adopt: Option<Adopt>,
    pub(crate) borrow: Option<Borrow>,
    current_work_stream: *const c_void,
}
