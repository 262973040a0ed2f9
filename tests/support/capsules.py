"""DLPack capsules made by hand, for what NumPy and torch never export."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Producer:
    """Lends the memory of an array, described as told. It owns all that its capsules point to, so keep it while they are in use."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        dtype: tuple[int, int, int] = (2, 32, 1),
        device: tuple[int, int] = (1, 0),
        byte_offset: int = 0,
        data: bool = True,
        version: tuple[int, int] | None = (1, 0),
        flags: int = 0,
        ndim: int | None = None,
        null_shape: bool = False,
    ) -> None:
        shape = array.shape if shape is None else shape
        self._array, self._device, self._version = array, device, version
        self._shape = (ctypes.c_int64 * max(1, len(shape)))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * max(1, len(strides)))(*strides)
        address, ndim = array.ctypes.data if data else None, len(shape) if ndim is None else ndim
        tensor = _Tensor(address, *device, ndim, *dtype, None if null_shape else self._shape, self._strides, byte_offset)
        self._plain = _Managed(tensor)
        self._versioned = _ManagedVersioned(*(version or (1, 0)), flags=flags, tensor=tensor)
        self.arguments: dict[str, Any] = {}
        """With which the memory was asked for last."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **arguments: Any) -> Any:
        self.arguments = arguments
        if self._version is None:
            return _new_capsule(ctypes.addressof(self._plain), b"dltensor", None)
        return _new_capsule(ctypes.addressof(self._versioned), b"dltensor_versioned", None)
