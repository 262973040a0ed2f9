"""Launches the kernels of :mod:`normclip._backends.triton` on lists of CUDA tensors.

The kernels read a table of chunks, which describes where the elements of the list are. It is uploaded once and cached by the addresses and
sizes of the tensors. A norm takes two launches, clipping by it a third, and neither waits for the device. Launches go to the current
stream, so a CUDA graph can capture them, provided that an earlier call with the same tensors has uploaded the table.

Chunks have 2^15 elements, or more if that would make more than 2^15 chunks: enough programs to fill the device, and few enough partials
that one program can merge them.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from normclip._backends.parts import Part, moved
from normclip._backends.protocol import Norm
from normclip._backends.totals import COLUMN, HUGE, SHRINK
from normclip._backends.triton import change, elements, measure, merge, pairs
from normclip._core import MOMENTS, DeviceList

# The kernel's mode for a norm of this order. Other orders are sums of powers.
_WHAT = {
    2.0: measure.SQUARES.value,
    1.0: measure.ABSOLUTES.value,
    math.inf: measure.LARGEST.value,
    -math.inf: measure.SMALLEST.value,
    0.0: measure.NONZEROS.value,
}
_BYTES_OF_TYPE = np.array([2, 2, 4, 8])
# The columns that the kernels write, and where these stand in an array of moments. The second number of each sum stays 0.
_WRITTEN = ("count", "zeros", "nans", "infs", "sum_abs", "medium", "small", "large", "largest")
_COLUMNS = np.array([COLUMN[name] for name in _WRITTEN])


@dataclass(frozen=True)
class Tuning:
    """Sizes that the kernels are compiled for. They fix the order of summation, so another size gives other last bits."""

    chunk: int = 1 << 15
    """Elements of a chunk, a multiple of 8."""
    chunks: int = 1 << 15
    """The number of chunks above which chunks are made longer, up to 2^20 elements."""
    warps: int = 4
    """Warps of a program that reads or changes a chunk."""
    tile: int = 4 * 32 * 16
    """Bytes that such a program loads at once: 16 for each thread."""
    unroll: int = 4
    """Tiles for each turn of its loop."""
    lanes: int = 4096
    """Partials that a program of the merge kernels loads at once."""
    short: int = 128
    """Used in place of ``lanes`` for tables whose longest tensor has at most this many chunks."""

    @property
    def options(self) -> dict[str, Any]:
        """Compile options of the kernels that run over chunks."""
        # Fused multiply-add cannot change sums of exact products (16- and 32-bit elements), and saves a rounding in float64 ones.
        return {"BYTES": self.tile, "UNROLL": self.unroll, "num_warps": self.warps, "enable_fp_fusion": True}


@dataclass(eq=False)
class Table:
    """A table of chunks in a device's memory."""

    rows: torch.Tensor
    """int64: a row for each chunk, then for each tensor the number of its first chunk, then the number of chunks."""
    chunks: int
    """The number of chunks."""
    types: int
    """The element types that occur, as a bit mask: bit i stands for ``elements.ELEMENTS[i]``."""
    longest: int
    """The largest number of chunks that a tensor has."""
    indices: npt.NDArray[np.int64]
    """For each tensor of the table, its index in the list that was passed."""
    ready: Any
    """The CUDA event of the upload, for other streams to wait for; None on the CPU."""
    streams: set[int] = field(default_factory=set)
    """The handles of streams that have waited for ``ready``."""

    @property
    def segments(self) -> torch.Tensor:
        """For each tensor the number of its first chunk, and at the end the number of chunks."""
        return self.rows[elements.ROW.value * self.chunks :]


# Tables that a CUDA graph has captured are never freed: a graph may be replayed at any time, and nothing tells when it is destroyed.
_captured: set[Table] = set()


def _table(layout: bytes, device: torch.device, tuning: Tuning, *, addresses: int = 1) -> Table:
    """The table of a layout, which kernels on the current stream may read."""
    table = _tables(layout, device, addresses, tuning)
    if table.ready is None:
        return table
    if torch.cuda.is_current_stream_capturing():
        # A captured stream may not wait for an event from outside the capture, and need not: `torch.cuda.graph` synchronizes the device
        # before it begins to capture.
        _captured.add(table)
        return table
    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream not in table.streams:
        stream.wait_event(table.ready)
        table.rows.record_stream(stream)
        table.streams.add(stream.cuda_stream)
    return table


# A table depends on these arguments alone. A cached table stays valid if the memory is freed and other tensors get the same addresses.
@lru_cache(maxsize=64)
def _tables(layout: bytes, device: torch.device, addresses: int, tuning: Tuning) -> Table:
    """Splits tensors into chunks. A row of the layout is one tensor: `addresses` addresses, elements, element type and index."""
    on_cuda = device.type == "cuda"
    if on_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "these tensors are new to normclip, and a CUDA graph is being captured, in which nothing can be uploaded: "
            "make the same call once with the same tensors before the capture, and let gradients keep their memory, as "
            "zero_grad(set_to_none=False) does; tensors with gaps in their memory cannot be captured"
        )
    tensors = np.frombuffer(layout, dtype=np.int64).reshape(-1, addresses + 3)
    starts = tensors[:, :addresses]
    elements, types, indices = (tensors[:, addresses + column] for column in range(3))
    chunk = tuning.chunk
    while elements.sum() > chunk * tuning.chunks and chunk < 1 << 20:
        chunk *= 2
    chunks_of = -(-elements // chunk)
    segments = np.concatenate([[0], np.cumsum(chunks_of)])
    tensor = np.repeat(np.arange(len(tensors)), chunks_of)
    first = (np.arange(len(tensor)) - segments[tensor]) * chunk
    places = starts[tensor] + (first * _BYTES_OF_TYPE[types[tensor]])[:, None]
    packed = np.minimum(elements[tensor] - first, chunk) << 3 | types[tensor]
    # A row has three numbers: the last is the tensor's number, which a table of pairs leaves out for the second address.
    rows = np.column_stack([places, packed, tensor][: 4 - addresses])
    uploaded = _upload(np.concatenate([rows.ravel(), segments]).astype(np.int64), device)
    ready = torch.cuda.current_stream(device).record_event() if on_cuda else None
    return Table(uploaded, len(rows), reduce(or_, (1 << types).tolist(), 0), int(chunks_of.max(initial=0)), indices, ready)


def _upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # On the CPU, only Triton's interpreter runs the kernels, and there is nothing to upload.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class CudaPart:
    """The tensors of a list that are on one CUDA device."""

    def __init__(self, tensors: DeviceList, kind: int, number: int, indices: list[int], tuning: Tuning | None = None) -> None:
        # DLPack's device type 1 is the CPU, on which tests run the kernels by Triton's interpreter.
        self.device = torch.device("cpu") if kind == 1 else torch.device("cuda", number)
        self._tensors, self._kind, self._number, self._indices = tensors, kind, number, indices
        self._tuning = tuning or Tuning()

    # ---- Measuring ----

    def norm(self, order: float, dtype: torch.dtype) -> Norm:
        with _on(self.device):
            table = self._table()
            if table.chunks == 0:
                exact = torch.zeros((), dtype=torch.float64, device=self.device)
                return Norm(exact, exact.to(dtype))
            what = _WHAT.get(order, measure.POWERS.value if order > 0.0 else measure.INVERSE_POWERS.value)
            partials = self._measure(table, order, what, columns=3)
            exact = torch.empty((), dtype=torch.float64, device=self.device)
            rounded = torch.empty((), dtype=dtype, device=self.device)
            merge.norm[(1,)](
                partials, table.chunks, exact, rounded, order, TYPES=table.types, WHAT=what, LANES=self._tuning.lanes, num_warps=8
            )
            return Norm(exact, rounded)

    def moments(self, *, finite_only: bool) -> npt.NDArray[np.float64]:
        rows = np.zeros((len(self._indices), len(MOMENTS)))
        with _on(self.device):
            table = self._table()
            if table.chunks == 0:
                return rows
            columns = merge.COLUMNS.value
            partials = self._measure(table, 2.0, measure.MOMENTS.value, columns=columns, finite_only=finite_only)
            moments = torch.empty((len(table.indices), columns), dtype=torch.float64, device=self.device)
            # If all tensors have few chunks, one program merges all columns of a tensor; else one program merges one column of a tensor.
            short = table.longest <= self._tuning.short
            merge.tabulate[(len(table.indices), 1 if short else columns)](
                partials,
                table.chunks,
                table.segments,
                moments,
                PER_PROGRAM=columns if short else 1,
                LANES=self._tuning.short if short else self._tuning.lanes,
                num_warps=4,
            )
            found = moments.cpu().numpy()
        rows[np.searchsorted(self._indices, table.indices)[:, None], _COLUMNS] = found
        rows[rows[:, COLUMN["largest"]] >= HUGE, COLUMN["sum_abs"]] *= SHRINK
        return rows

    def _measure(self, table: Table, order: float, what: int, *, columns: int, finite_only: bool = False) -> torch.Tensor:
        partials = torch.empty((columns, table.chunks), dtype=torch.float64, device=self.device)
        measure.measure[(table.chunks,)](
            table.rows, partials, table.chunks, order, TYPES=table.types, WHAT=what, FINITE=finite_only, **self._tuning.options
        )
        return partials

    # ---- Changing ----

    def clip_(self, limit: float, norm: torch.Tensor, epsilon: float) -> None:
        self._change(change.CLIP.value, limit, moved(norm, self.device), epsilon)

    def scale_(self, factor: float | torch.Tensor) -> None:
        if isinstance(factor, torch.Tensor):
            self._change(change.SCALE.value, 1.0, moved(factor, self.device))
        else:
            self._change(change.SCALE.value, factor)

    def scale_each_(self, factors: npt.NDArray[np.float64]) -> None:
        # The table leaves out empty and repeated tensors, and the kernel reads a factor by the tensor's number in the table.
        factor_of = dict(zip(self._indices, factors, strict=True))
        with _on(self.device):
            used = [factor_of[index] for index in self._table(write=True).indices]
            self._change(change.SCALE_EACH.value, 1.0, _upload(np.array(used), self.device))

    def clamp_(self, limit: float) -> None:
        self._change(change.CLAMP.value, limit)

    def zero_nonfinite_(self) -> None:
        self._change(change.ZERO_NONFINITE.value, 0.0)

    def _change(self, what: int, number: float, numbers: torch.Tensor | None = None, epsilon: float = 0.0) -> None:
        with _on(self.device):
            table = self._table(write=True)
            if table.chunks > 0:
                change.change[(table.chunks,)](table.rows, numbers, number, epsilon, TYPES=table.types, WHAT=what, **self._tuning.options)

    # ---- Pairs ----

    def dot(self, other: Part) -> torch.Tensor:
        assert isinstance(other, CudaPart)
        with _on(self.device):
            x, y = (np.frombuffer(side._layout(repeated=True), dtype=np.int64).reshape(-1, 4) for side in (self, other))
            table = _table(np.column_stack([x[:, 0], y]).tobytes(), self.device, self._tuning, addresses=2)
            partials = torch.empty((9, table.chunks), dtype=torch.float64, device=self.device)
            found = torch.empty(4, dtype=torch.float64, device=self.device)
            pairs.products[(table.chunks,)](table.rows, partials, table.chunks, TYPES=table.types, **self._tuning.options)
            pairs.dot[(1,)](partials, table.chunks, found, TYPES=table.types, LANES=self._tuning.lanes, num_warps=8)
            return found

    def _layout(self, *, write: bool = False, repeated: bool = False) -> bytes:
        return self._tensors.layout(self._kind, self._number, write=write, repeated=repeated)

    def _table(self, *, write: bool = False) -> Table:
        return _table(self._layout(write=write), self.device, self._tuning)


def _on(device: torch.device) -> Any:
    """Makes a CUDA device the current one, as launches need; does nothing on the CPU, for Triton's interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
