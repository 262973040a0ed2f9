"""Lists of tensors that are not, or not all, in CPU memory: one part a device, each with its backend, and their results put together.

Tensors that lie in one run of memory are read and written where they are. Others (columns of a matrix, say) are read through a contiguous
copy, which is copied back when it was changed. Norms other than 2 of complex tensors are taken of a copy of their moduli.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from normclip import _core
from normclip._backends.parts import Array, Part, moved
from normclip._backends.protocol import Norm, Served
from normclip._backends.totals import COLUMN, hard_coefficient, joined
from normclip._core import MOMENTS, DeviceList, Moments, TensorList

# The kind of device of tensors without memory, by which DLPack knows none.
_ABSTRACT = -1


class _CpuPart:
    """Those in CPU memory, by Rust."""

    device = torch.device("cpu")

    def __init__(self, tensors: list[Any], *, writable: bool) -> None:
        self._objects, self._tensors = tensors, TensorList(tensors, writable=writable)

    def norm(self, order: float, dtype: torch.dtype) -> Norm:
        exact = torch.tensor(self._tensors.norm(order), dtype=torch.float64)
        return Norm(exact, exact.to(dtype))

    def moments(self, *, finite_only: bool) -> Array:
        return np.frombuffer(self._tensors.moments(finite_only=finite_only)).reshape(-1, len(MOMENTS))

    def clip_(self, limit: float, norm: torch.Tensor, epsilon: float) -> None:
        self._tensors.clip_(limit, float(norm), epsilon)

    def scale_(self, factor: float | torch.Tensor) -> None:
        if (number := float(factor)) != 1.0:
            self._tensors.scale_(number)

    def scale_each_(self, factors: Array) -> None:
        self._tensors.scale_each_(factors.tolist())

    def clamp_(self, limit: float) -> None:
        self._tensors.clamp_(limit)

    def zero_nonfinite_(self) -> None:
        self._tensors.zero_nonfinite_(list(range(len(self._tensors))))

    def dot(self, other: Part) -> torch.Tensor:
        assert isinstance(other, _CpuPart)
        return torch.tensor(_core.dot(self._objects, other._objects), dtype=torch.float64)


def _part_of(taken: DeviceList, device: tuple[int, int, list[int]], served: Served, *, writable: bool) -> Part:
    """The tensors of a device, with the backend that serves it best."""
    kind, number, indices = device
    if kind in served.rust:
        return _CpuPart(_chosen(taken, indices), writable=writable)
    if kind in served.triton:
        try:
            from normclip._backends.cuda import CudaPart
        except ImportError:
            pass  # torch without Triton, as on some platforms
        else:
            return CudaPart(taken, kind, number, indices, served.tuning)
    from normclip._backends.plain import TorchPart

    return TorchPart(_chosen(taken, indices), writable=writable, abstract=kind == _ABSTRACT)


def _chosen(taken: DeviceList, indices: list[int]) -> list[Any]:
    objects = taken.objects
    return [objects[index] for index in indices]


class DeviceBatch:
    """A :class:`~normclip._backends.protocol.Batch` of tensors on any devices."""

    def __init__(self, taken: DeviceList, served: Served) -> None:
        self._taken = taken
        self._served = served

    @property
    def is_torch(self) -> bool:
        """Whether norms are torch tensors. Those that stay on a device always are."""
        return True

    @property
    def is_double(self) -> bool:
        return self._taken.is_double

    @property
    def positions(self) -> list[int]:
        return self._taken.positions

    def __len__(self) -> int:
        return len(self._taken)

    # ---- Measuring ----

    def norm(self, order: float) -> Norm:
        dtype = torch.float64 if self.is_double else torch.float32
        parts = [part for part, _ in self._read(moduli=order != 2.0)]
        norms = [part.norm(order, dtype) for part in parts]
        if len(norms) == 1:
            return norms[0]
        first = norms[0].exact
        exact = joined(torch, torch.stack([moved(norm.exact, first.device, first.dtype) for norm in norms]), order)
        return Norm(exact, exact.to(norms[0].rounded.dtype))

    def statistics(self, groups: list[int] | None = None, *, finite_only: bool = False) -> tuple[Moments, list[Moments], bytes]:
        return self._taken.statistics(self._moments(finite_only=finite_only).tobytes(), groups or [])

    def nonfinite(self) -> list[tuple[str, int, int]]:
        rows = zip(self._taken.names, self._moments(finite_only=False)[:, [COLUMN["nans"], COLUMN["infs"]]], strict=True)
        return [(name, int(nans), int(infs)) for name, (nans, infs) in rows if nans + infs > 0]

    def _moments(self, *, finite_only: bool) -> Array:
        rows = np.zeros((len(self), len(MOMENTS)))
        for part, indices in self._read(moduli=True):
            rows[indices] = part.moments(finite_only=finite_only)
        return rows

    # ---- Changing ----

    def clip_(self, limit: float, norm: Any, epsilon: float) -> list[Any]:
        if limit == math.inf:
            return []
        if isinstance(norm, float):
            coefficient = hard_coefficient(limit, norm, epsilon)
            return [] if coefficient == 1.0 else self.scale_(coefficient)
        exact = norm.exact if isinstance(norm, Norm) else norm.detach()
        return self._write(lambda part, _: part.clip_(limit, exact, epsilon))

    def scale_(self, factor: float | torch.Tensor) -> list[Any]:
        return self._write(lambda part, _: part.scale_(factor))

    def scale_each_(self, factors: list[float | None]) -> list[Any]:
        each = np.array([1.0 if factor is None else factor for factor in factors])
        return self._write(lambda part, indices: part.scale_each_(each[indices]))

    def clamp_(self, limit: float) -> list[Any]:
        self.check_elementwise()
        return self._write(lambda part, _: part.clamp_(limit))

    def zero_nonfinite_(self, indices: list[int]) -> list[Any]:
        self.check_elementwise()
        # Only where something is not finite is anything written, so the others need not be left out.
        self._write(lambda part, _: part.zero_nonfinite_())
        return _chosen(self._taken, indices)

    def check_unchanged(self) -> None:
        self._taken.check_unchanged()

    def check_elementwise(self) -> None:
        self._taken.check_elementwise()

    def _write(self, change: Callable[[Part, list[int]], None]) -> list[Any]:
        with self._writable() as taken:
            # First what may still fail: operations of other people's tensors.
            for part, indices in sorted(self._parts(taken, writable=True), key=lambda part: not getattr(part[0], "abstract", False)):
                change(part, indices)
        return self._taken.torch_tensors

    # ---- Memory that the kernels do not walk ----

    @cached_property
    def _scattered(self) -> list[int]:
        """The tensors that cannot be read and written where they are."""
        return self._away(self._taken.scattered)

    def _away(self, indices: list[int]) -> list[int]:
        """Those that are on devices."""
        if not indices:
            return []
        at_home = {index for kind, _, members in self._taken.devices if kind in self._served.rust for index in members}
        return [index for index in indices if index not in at_home]

    def _copies(self) -> dict[int, torch.Tensor]:
        # A copy always: what is contiguous may still begin off the border of its element type.
        return {index: self._tensor(index).clone(memory_format=torch.contiguous_format) for index in self._scattered}

    def _read(self, *, moduli: bool) -> Iterator[tuple[Part, list[int]]]:
        copies = self._copies()
        if moduli:
            for index in self._away(self._taken.complex):
                tensor = self._tensor(index)
                copies[index] = torch.abs((tensor.coalesce().values() if tensor.is_sparse else tensor).to(torch.complex128))
        return self._parts(self._with(copies), writable=False)

    @contextmanager
    def _writable(self) -> Iterator[DeviceList]:
        copies = self._copies()
        yield self._with(copies)
        first_of = self._taken.first_of if copies else []
        for index, copy in copies.items():
            if first_of[index] is None:
                self._tensor(index).copy_(copy)

    def _with(self, copies: dict[int, torch.Tensor]) -> DeviceList:
        if not copies:
            return self._taken
        first_of = self._taken.first_of
        places = enumerate(self._taken.objects)
        return DeviceList([copies.get(i if first_of[i] is None else first_of[i], tensor) for i, tensor in places])  # type: ignore[arg-type]

    def _tensor(self, index: int) -> torch.Tensor:
        tensor: torch.Tensor = self._taken.objects[index]
        return tensor.detach()

    def _parts(self, taken: DeviceList, *, writable: bool) -> Iterator[tuple[Part, list[int]]]:
        for device in taken.devices:
            yield _part_of(taken, device, self._served, writable=writable), device[2]


def dot(xs: DeviceList, ys: DeviceList, served: Served) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σxy, √Σx², √Σy² and the cosine, on the device of the first pair."""
    _core.check_pairs(xs.objects, ys.objects)
    sides = [_dense(taken) for taken in (xs, ys)]
    pairs: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for x, y in zip(*sides, strict=True):
        memory = (*(key for side in (x, y) for key in (side.data_ptr(), side.stride(), side.dtype)), x.shape, x.device)
        if x.numel() > 0:
            pairs.setdefault(memory, _in_step(x, y))
    if not pairs:
        zero = torch.zeros((), dtype=torch.float64, device=sides[0][0].device)
        return zero, zero, zero, torch.full_like(zero, math.nan)
    found = []
    devices = list(dict.fromkeys(x.device for x, _ in pairs.values()))
    for device in devices:
        lists = [DeviceList([pair[side] for pair in pairs.values() if pair[0].device == device]) for side in (0, 1)]
        x, y = (_part_of(taken, taken.devices[0], served, writable=False) for taken in lists)
        found.append(x.dot(y))
    found = [moved(products, found[0].device, found[0].dtype) for products in found]
    if len(found) == 1:
        return found[0][0], found[0][1], found[0][2], found[0][3]
    product = torch.stack([products[0] for products in found]).sum()
    x_norm, y_norm = (joined(torch, torch.stack([products[side] for products in found]), 2.0) for side in (1, 2))
    return product, x_norm, y_norm, product / x_norm / y_norm


def _dense(taken: DeviceList) -> list[torch.Tensor]:
    objects = taken.objects
    tensors = (tensor.detach() if isinstance(tensor, torch.Tensor) else torch.utils.dlpack.from_dlpack(tensor) for tensor in objects)
    return [tensor.resolve_conj().resolve_neg() for tensor in tensors]


def _in_step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pair of one real element type, whose elements lie in the same order and on the same borders of vectors."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    if x.stride() != y.stride() or DeviceList([x]).scattered:
        x, y = x.contiguous(), y.contiguous()
    return (x, y) if (x.data_ptr() - y.data_ptr()) % 16 == 0 else (x, y.clone())
