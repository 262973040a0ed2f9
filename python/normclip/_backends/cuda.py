"""Lists of CUDA tensors for the kernels of :mod:`normclip._backends.triton`: tables, their cache, and launches.

A list is described by a table of chunks, which is uploaded once and kept while addresses and sizes stay as they are. A norm is two
launches, clipping by it a third, and no step waits for the device. Launches go to the current stream, so they can be captured in a CUDA
graph; the table must be there before, from one call with the same tensors.

Chunks have 2^15 elements, or more where that would make more than 2^15 of them: enough programs to fill the device, few enough partials.
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

_WHAT = {
    2.0: measure.SQUARES.value,
    1.0: measure.ABSOLUTES.value,
    math.inf: measure.LARGEST.value,
    -math.inf: measure.SMALLEST.value,
    0.0: measure.NONZEROS.value,
}
_BYTES_OF_TYPE = np.array([2, 2, 4, 8])
# Where the columns of the kernels go in an array of moments. The rests of sums, which the kernels do not have, stay 0.
_KERNELS = ("count", "zeros", "nans", "infs", "sum_abs", "medium", "small", "large", "largest")
_PLACES = np.array([COLUMN[name] for name in _KERNELS])


@dataclass(frozen=True)
class Tuning:
    """Sizes that the kernels are compiled for. They are part of what fixes the bits of a result."""

    chunk: int = 1 << 15
    """Elements of a chunk, a multiple of 8."""
    chunks: int = 1 << 15
    """Where there would be more than these, chunks are made longer, up to 2^20 elements."""
    warps: int = 4
    tile: int = 4 * 32 * 16
    """Bytes that a program reads at once: 16 a thread."""
    unroll: int = 4
    lanes: int = 4096
    """Partials that a merging program reads at once."""
    short: int = 128
    """The same for a tensor of no more chunks than these."""

    @property
    def options(self) -> dict[str, Any]:
        """What kernels over chunks are compiled with."""
        # Fused multiply-add changes nothing where products are exact, and elsewhere it saves a rounding.
        return {"BYTES": self.tile, "UNROLL": self.unroll, "num_warps": self.warps, "enable_fp_fusion": True}


@dataclass(eq=False)
class Table:
    """Chunks on a device."""

    rows: torch.Tensor
    """int64: the chunks, then for each tensor the number of the first of its chunks, then that of all."""
    chunks: int
    types: int
    """A bit for each element type that occurs."""
    longest: int
    """Chunks of the tensor that has most."""
    indices: npt.NDArray[np.int64]
    """Of the tensors, in the list that they came from."""
    ready: Any
    """The event after which the table is there; None on the CPU."""
    streams: set[int] = field(default_factory=set)
    """Those that know."""

    @property
    def segments(self) -> torch.Tensor:
        """Where the chunks of each tensor begin."""
        return self.rows[elements.ROW.value * self.chunks :]


# A CUDA graph uses its tables for as long as it lives, which we do not see.
_captured: set[Table] = set()


def _table(layout: bytes, device: torch.device, tuning: Tuning, *, addresses: int = 1) -> Table:
    """The table of a layout, there for the current stream."""
    table = _tables(layout, device, addresses, tuning)
    if table.ready is None:
        return table
    if torch.cuda.is_current_stream_capturing():
        # A capture may not wait for what is outside of it; `torch.cuda.graph` waits for the device before it begins.
        _captured.add(table)
        return table
    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream not in table.streams:
        stream.wait_event(table.ready)
        table.rows.record_stream(stream)
        table.streams.add(stream.cuda_stream)
    return table


# Those that were used last. A table follows from the key alone, so memory that is freed and taken again does no harm.
@lru_cache(maxsize=64)
def _tables(layout: bytes, device: torch.device, addresses: int, tuning: Tuning) -> Table:
    """Cuts tensors into chunks. A row of the layout is `addresses` addresses, elements, element type and index."""
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
    # Pairs have a second address where single tensors have their number.
    rows = np.column_stack([places, packed, tensor][: 4 - addresses])
    uploaded = _upload(np.concatenate([rows.ravel(), segments]).astype(np.int64), device)
    ready = torch.cuda.current_stream(device).record_event() if on_cuda else None
    return Table(uploaded, len(rows), reduce(or_, (1 << types).tolist(), 0), int(chunks_of.max(initial=0)), indices, ready)


def _upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # On the CPU there is Triton's interpreter alone.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class CudaPart:
    """The CUDA tensors of a list that are on one device."""

    def __init__(self, taken: DeviceList, kind: int, number: int, indices: list[int], tuning: Tuning | None = None) -> None:
        # DLPack's kind 1 is the CPU: Triton's interpreter takes its tensors for those of a device.
        self.device = torch.device("cpu") if kind == 1 else torch.device("cuda", number)
        self._taken, self._kind, self._number, self._indices = taken, kind, number, indices
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
            # Long columns are summed by a program each, short ones of a tensor by one for all.
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
        rows[np.searchsorted(self._indices, table.indices)[:, None], _PLACES] = found
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
        # The kernel counts tensors as the table does.
        of_index = dict(zip(self._indices, factors, strict=True))
        with _on(self.device):
            used = [of_index[index] for index in self._table(write=True).indices]
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
        return self._taken.layout(self._kind, self._number, write=write, repeated=repeated)

    def _table(self, *, write: bool = False) -> Table:
        return _table(self._layout(write=write), self.device, self._tuning)


def _on(device: torch.device) -> Any:
    """Makes a device the current one, for launches; the CPU is that of Triton's interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
