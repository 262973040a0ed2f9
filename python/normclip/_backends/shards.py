"""Tensors of which other ranks hold parts: DTensors, and tensors whose norm is taken together with those of other ranks.

Each rank measures its own shards, and the rows of :mod:`normclip._backends.ranks` join them. Tensors are counted where they live:

- DTensors on their mesh, by one collective for any number of tensors, and where the mesh replicates them on the first replica alone.
- Others as each rank has them, without a collective: beside DTensors they are replicas.
- The sum of both, along each process group that was passed, from every rank of it.

All ranks take part in all collectives, whatever happens on one: what it cannot do, it says in its row, and then all raise. Nothing has been
written by then. To change tensors takes no collective: each rank changes its shards.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from normclip._backends import local
from normclip._backends.protocol import Batch, Norm
from normclip._backends.ranks import (
    DIFFERENT,
    DIGEST,
    DOUBLE,
    FAILED,
    HEAD,
    Array,
    Merge,
    along,
    check_member,
    merged_each,
    merged_moments,
    merged_norms,
)
from normclip._core import MOMENTS, NORMS, Moments, listed

# A mesh of several dimensions that spans the whole world is gathered at once up to this size. Larger ones, and parts of the world, are
# gathered dimension by dimension, where a rank receives the sum of their sizes and not the product.
_AT_ONCE = 1024

_PLAIN = 0
"""The home of tensors that are on no mesh. The meshes are numbered from 1."""


class Shards:
    """A :class:`~normclip._backends.protocol.Batch` of tensors of which other ranks hold parts. Figures are those of the whole.

    ``norm``, ``statistics`` and ``each`` are collectives: all ranks call them, in the same order.
    """

    is_torch = True

    def __init__(self, given: Any, *, grads: bool, writable: bool, process_groups: Sequence[ProcessGroup]) -> None:
        self._along = list(process_groups)
        for group in self._along:
            check_member(group)
        self._meshes: dict[tuple[str, ...], list[ProcessGroup]] = {}
        self._places: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._homes: list[int] = []
        self._counts: list[bool] = []
        self._measured: list[Any] = []
        self._shapes: list[tuple[int, ...]] = []
        self._wrappers: dict[int, DTensor] = {}
        self._reduced = False
        self._device = torch.device("cpu")
        self._read = self._write = local.collect([], grads=False)
        self._double, self._same = False, True
        self._total = Moments()
        self._each: list[Moments] = []
        self._error: Exception | None = None
        try:
            with torch.no_grad():
                self._take(listed(given, grads=grads), grads=grads, writable=writable)
        except Exception as error:  # raised when the other ranks know of it
            self._error = error

    def _take(self, items: list[Any], *, grads: bool, writable: bool) -> None:
        tensors = [getattr(item, "grad", None) if grads else item for item in items]
        # Those of parameters without a gradient as well: their ranks are waited for.
        for pair in zip(items, tensors, strict=True):
            for holder in pair:
                if isinstance(holder, DTensor):
                    self._place(holder.device_mesh)
        self._device = next((tensor.device for tensor in (*tensors, *items) if isinstance(tensor, torch.Tensor)), self._device)

        to_read, to_write = list(items), list(items)
        for index, tensor in enumerate(tensors):
            whole, home, counts = tensor, _PLAIN, True
            if isinstance(tensor, DTensor):
                home, coordinate = self._place(tensor.device_mesh)
                placements = tensor.placements
                partial = any(placement.is_partial() for placement in placements)
                shard = _local(tensor)
                whole = _local(_reduced(tensor)) if partial else shard
                # What is Partial has been reduced, to replicas. Of these the first counts.
                copied = (placement.is_replicate() or placement.is_partial() for placement in placements)
                counts = not any(at and copy for at, copy in zip(coordinate, copied, strict=True))
                to_read[index], to_write[index] = (SimpleNamespace(grad=part) if grads else part for part in (whole, shard))
                self._wrappers[id(shard)] = tensor
                self._reduced |= partial
            elif tensor is None and grads:
                to_read[index] = to_write[index] = SimpleNamespace(grad=None)
                continue
            self._measured.append(whole)
            self._shapes.append(tuple(getattr(tensor, "shape", ())))
            self._homes.append(home)
            self._counts.append(counts)
        self._write = local.collect(to_write, grads=grads, writable=writable)
        self._read = local.collect(to_read, grads=grads) if self._reduced else self._write

    def _place(self, mesh: DeviceMesh) -> tuple[int, tuple[int, ...]]:
        """The number of a mesh, and where this rank is on it."""
        place = self._places.get(id(mesh))
        if place is None:
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                place = _PLAIN, (0,) * mesh.ndim  # such a rank has an empty shard, and no group to gather along
            else:
                groups = _groups_of(mesh)
                names = tuple(group.group_name for group in groups)
                self._meshes.setdefault(names, groups)
                place = 1 + list(self._meshes).index(names), tuple(coordinate)
            self._places[id(mesh)] = place
        return place

    @property
    def is_double(self) -> bool:
        """Whether any rank has float64 tensors. Known once something was measured."""
        return self._double

    @property
    def positions(self) -> list[int]:
        return self._write.positions

    def __len__(self) -> int:
        return len(self._write)

    # ---- Measuring, with the other ranks ----

    def norm(self, order: float) -> float | Norm:
        if order in NORMS:
            found: float = getattr(self._sum(self._sums), NORMS[order])
        else:
            found = float(self._agreed(lambda: self._norms(order), merged_norms(order))[0])
        if self._device.type == "cpu":
            return found
        exact = torch.tensor(found, dtype=torch.float64, device=self._device)
        return Norm(exact, exact.to(torch.float64 if self.is_double else torch.float32))

    def statistics(self, groups: list[int] | None = None, *, finite_only: bool = False) -> tuple[Moments, list[Moments], bytes]:
        """As for any batch, but the table has the figures of this rank's shards."""
        table = b""

        def measure() -> list[Array]:
            nonlocal table
            _, self._each, table = self._read.statistics(list(range(len(self._read))), finite_only=finite_only)
            return self._merged(self._homes, 1 + len(self._meshes))

        total = self._sum(measure, float(zlib.crc32(repr((self._shapes, groups)).encode())))
        if groups is not None:
            self._check_same()
        if not groups:
            return total, [], table
        labels = 1 + max(groups)
        cells = [home * labels + group for home, group in zip(self._homes, groups, strict=True)]
        tables = np.array(self._merged(cells, (1 + len(self._meshes)) * labels)).reshape(-1, labels, len(MOMENTS))
        whole = np.array([tables[0], *map(merged_each, tables[1:], self._meshes.values())])
        return total, [Moments.from_array(merged_moments(whole[:, label])) for label in range(labels)], table

    def each(self) -> list[Moments]:
        """Of each whole tensor, what ``statistics`` has found."""
        self._check_same()
        rows = np.array(
            [moments.to_array() if counts else np.zeros(len(MOMENTS)) for moments, counts in zip(self._each, self._counts, strict=True)]
        )
        for home, groups in enumerate(self._meshes.values(), 1):
            here = [index for index, at in enumerate(self._homes) if at == home]
            if here:
                rows[here] = merged_each(rows[here], groups)
        # A repetition was counted as nothing, and reads like the tensor that it repeats.
        first_of: dict[int, int] = {}
        return [Moments.from_array(rows[first_of.setdefault(id(tensor), index)]) for index, tensor in enumerate(self._measured)]

    def nonfinite(self) -> list[tuple[str, int, int]]:
        """Those of this rank; if it has none, the number on the others."""
        found = self._write.nonfinite()
        others = self._total.nans + self._total.infs > 0
        return found or ([("on other ranks", self._total.nans, self._total.infs)] if others else [])

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error of this rank, once all ranks know of it."""
        self._error = self._error or error
        self._sum(list)
        raise error

    def _sum(self, measure: Callable[[], list[Array]], digest: float = 0.0) -> Moments:
        self._total = Moments.from_array(self._agreed(measure, merged_moments, digest))
        return self._total

    def _agreed(self, measure: Callable[[], list[Array]], merge: Merge, digest: float = 0.0) -> Array:
        """What this rank measures, of plain tensors and of each mesh, merged with what the others do.

        Raises:
            Exception: This rank has failed: what it has failed with.
            RuntimeError: Another rank has.
        """
        parts = [np.zeros(len(MOMENTS))] * (1 + len(self._meshes))
        if self._error is None:
            try:
                parts = measure()
            except Exception as error:
                self._error = error
        failed = 0.0 if self._error is None else 1.0 + dist.get_rank()
        head, found = [failed, float(self._write.is_double), digest], [parts[0]]
        same = True
        for groups, part in zip(self._meshes.values(), parts[1:], strict=True):
            row = along(np.array([*head, *part]), groups, merge)
            # What was learnt here is told on the next mesh. A digest is a mesh's own.
            head[:DIGEST] = row[:DIGEST].tolist()
            same = same and row[DIGEST] != DIFFERENT
            found.append(row[HEAD:])
        row = along(np.array([*head, *merge(np.array(found))]), self._along, merge)
        self._double = bool(row[DOUBLE])
        if digest:
            self._same = same
        if self._error is not None:
            raise self._error
        if row[FAILED]:
            raise RuntimeError(f"rank {row[FAILED] - 1:.0f} could not take its tensors, and no rank has changed any: see its own error")
        return row[HEAD:]

    def _sums(self) -> list[Array]:
        parts = 1 + len(self._meshes)
        places = [home if counts else parts for home, counts in zip(self._homes, self._counts, strict=True)]
        sums = [moments.to_array() for moments in self._read.statistics(places)[1]]
        return [*sums, *[np.zeros(len(MOMENTS))] * parts][:parts]

    def _merged(self, places: list[int], number: int) -> list[Array]:
        sums = [Moments()] * number
        for place, moments, counts in zip(places, self._each, self._counts, strict=True):
            if counts:
                sums[place] += moments
        return [moments.to_array() for moments in sums]

    def _norms(self, order: float) -> list[Array]:
        rows = []
        for home in range(1 + len(self._meshes)):
            places = zip(self._measured, self._homes, self._counts, strict=True)
            tensors = [tensor for tensor, at, counts in places if at == home and counts]
            elements = any(math.prod(tensor.shape) for tensor in tensors)
            rows.append(np.array([float(local.collect(tensors, grads=False).norm(order)), float(elements), *[0.0] * (len(MOMENTS) - 2)]))
        return rows

    def _check_same(self) -> None:
        if not self._same:
            raise ValueError("the ranks list different tensors: for figures of tensors or groups, list the same on all, in the same order")

    # ---- Changing, each rank for itself ----

    def clip_(self, limit: float, norm: Any, epsilon: float) -> list[Any]:
        return self._written(self._targets.clip_(limit, float(norm), epsilon))

    def scale_(self, factor: float | torch.Tensor) -> list[Any]:
        return self._written(self._targets.scale_(float(factor)))

    def scale_each_(self, factors: list[float | None]) -> list[Any]:
        return self._written(self._targets.scale_each_(factors))

    def clamp_(self, limit: float) -> list[Any]:
        self.check_elementwise()
        return self._written(self._targets.clamp_(limit))

    def zero_nonfinite_(self, indices: list[int]) -> list[Any]:
        self.check_elementwise()
        return self._written(self._targets.zero_nonfinite_(indices))

    def check_unchanged(self) -> None:
        self._targets.check_unchanged()

    def check_elementwise(self) -> None:
        if self._reduced:
            raise TypeError(
                "a DTensor has a Partial placement, so its single elements are not known: reduce it with .redistribute(), or scale it"
            )
        self._targets.check_elementwise()

    @property
    def _targets(self) -> Batch:
        if self._error is not None:
            raise self._error
        return self._write

    def _written(self, tensors: list[Any]) -> list[Any]:
        return [*tensors, *(self._wrappers[id(tensor)] for tensor in tensors if id(tensor) in self._wrappers)]


def _groups_of(mesh: DeviceMesh) -> list[ProcessGroup]:
    """The groups along which to gather on a mesh."""
    world = dist.group.WORLD
    if world is not None and mesh.ndim > 1 and mesh.size() == dist.get_world_size() <= _AT_ONCE:
        return [world]
    return [mesh.get_group(dim) for dim in reversed(range(mesh.ndim))]


def _local(tensor: DTensor) -> Any:
    """The shard itself. Without gradients being enabled."""
    shard = tensor.to_local()
    wait = getattr(shard, "wait", None)  # what a collective that still runs will fill
    return shard if wait is None else wait()


def _reduced(tensor: DTensor) -> DTensor:
    """The tensor with replicas where it had parts to be summed, as the weights of norms have in sequence parallel training."""
    operations = {getattr(placement, "reduce_op", None) for placement in tensor.placements if placement.is_partial()}
    if not operations <= {"sum", "avg"}:
        raise TypeError(f"a DTensor has placements {tensor.placements}: of Partial ones normclip takes those that are summed or averaged")
    return tensor.redistribute(placements=[Replicate() if placement.is_partial() else placement for placement in tensor.placements])
