"""Batches of tensors that are spread over ranks: DTensors, and any tensors along process groups.

Each rank measures its own shards, and collectives of :mod:`normclip._backends.ranks` merge the results:

- DTensors are merged over the ranks of their mesh, by one collective for all tensors of a mesh. Of replicas, only the first is counted.
- Other tensors are counted as this rank has them, without a collective: beside DTensors they are taken for replicas.
- The sum of both is merged over the ranks of each process group that was passed.

Every rank takes part in every collective, even after an error of its own: it sends the error in its row, and then all ranks raise. Nothing
has been written by then. Changing tensors takes no collective: each rank changes its own shards.

Norms of order 1, 2 and inf of DTensors on one CUDA device stay there, rows and all, if the mesh's backend gathers from there. Then nothing
waits, and an error of another rank is raised when the host asks for a number of this call, or by a later call.
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
from torch.distributed.tensor import DTensor

from normclip._backends import local
from normclip._backends.devices import DeviceBatch
from normclip._backends.dtensors import lines_of, local_shard, reduced
from normclip._backends.protocol import USUAL, Batch, Norm, Served
from normclip._backends.ranks import (
    DIFFERENT,
    DIGEST,
    DOUBLE,
    FAILED,
    HEAD,
    Array,
    Line,
    Merge,
    along,
    check_member,
    earlier_failure,
    error_of,
    failure_flag,
    line_along,
    merged_each,
    merged_moments,
    merged_norms,
)
from normclip._core import MOMENTS, NORMS, Moments, listed

_NO_MESH = 0
"""The mesh number of tensors that are not DTensors. Meshes are numbered from 1."""


class Shards:
    """A :class:`~normclip._backends.protocol.Batch` of this rank's shards, whose norms and statistics are those of the whole tensors.

    ``norm``, ``statistics`` and ``each`` are collectives: all ranks must call them, in the same order. An error while the batch is made is
    kept and raised by the first of them, when the other ranks know of it.
    """

    is_torch = True

    def __init__(self, given: Any, *, grads: bool, writable: bool, process_groups: Sequence[ProcessGroup], served: Served = USUAL) -> None:
        for group in process_groups:
            check_member(group)
        self._process_groups = [line_along(group) for group in process_groups]
        self._served = served
        # By the names of its groups, what to gather along for each mesh. Its place in this dict, from 1, is its mesh number.
        self._meshes: dict[tuple[str, ...], list[Line]] = {}
        # By the identity of a mesh object, its mesh number and this rank's coordinate.
        self._places: dict[int, tuple[int, tuple[int, ...]]] = {}
        # For each tensor: its mesh number, whether this rank's replica is counted, what is measured here, and the shape of the whole.
        self._mesh_numbers: list[int] = []
        self._counts: list[bool] = []
        self._measured: list[Any] = []
        self._shapes: list[tuple[int, ...]] = []
        self._wrappers: dict[int, DTensor] = {}  # by the identity of its local tensor
        self._reduced = False  # whether a Partial DTensor was reduced, so that what is read differs from what is written
        self._device = torch.device("cpu")
        self._read = self._write = local.collect([])
        self._double, self._same_lists, self._empty = False, True, False
        self._total = Moments()
        self._each: list[Moments] = []
        self._on_device: torch.Tensor | None = None  # the merged row of the last norm, if no host has read it
        self._error: Exception | None = None
        try:
            with torch.no_grad():
                self._collect(listed(given, grads=grads), grads=grads, writable=writable)
        except Exception as error:
            self._error = error
        self._failed = 1.0 + dist.get_rank()  # what this rank sends if it has an error
        if self._error is None and (failed := earlier_failure()):
            self._failed, self._error = failed, error_of(failed, earlier=True)

    def _collect(self, items: list[Any], *, grads: bool, writable: bool) -> None:
        tensors = [getattr(item, "grad", None) if grads else item for item in items]
        # Also the meshes of parameters without a gradient: their other ranks wait for this one.
        for pair in zip(items, tensors, strict=True):
            for holder in pair:
                if isinstance(holder, DTensor):
                    self._place(holder.device_mesh)
        self._device = next((tensor.device for tensor in (*tensors, *items) if isinstance(tensor, torch.Tensor)), self._device)

        to_read, to_write = list(items), list(items)
        for index, tensor in enumerate(tensors):
            whole, mesh_number, counts = tensor, _NO_MESH, True
            if isinstance(tensor, DTensor):
                mesh_number, coordinate = self._place(tensor.device_mesh)
                placements = tensor.placements
                partial = any(placement.is_partial() for placement in placements)
                shard = local_shard(tensor)
                whole = local_shard(reduced(tensor)) if partial else shard
                # Reducing a Partial placement makes replicas. Only the first replica, at coordinate 0, is counted.
                replicated = (placement.is_replicate() or placement.is_partial() for placement in placements)
                counts = not any(at and copy for at, copy in zip(coordinate, replicated, strict=True))
                to_read[index], to_write[index] = (SimpleNamespace(grad=part) if grads else part for part in (whole, shard))
                self._wrappers[id(shard)] = tensor
                self._reduced |= partial
            elif tensor is None and grads:
                to_read[index] = to_write[index] = SimpleNamespace(grad=None)
                continue
            self._measured.append(whole)
            self._shapes.append(tuple(getattr(tensor, "shape", ())))
            self._mesh_numbers.append(mesh_number)
            self._counts.append(counts)
        collect = local.collect_grads if grads else local.collect
        self._write = collect(to_write, writable, self._served)
        self._read = collect(to_read, served=self._served) if self._reduced else self._write

    def _place(self, mesh: DeviceMesh) -> tuple[int, tuple[int, ...]]:
        """The mesh number and this rank's coordinate on the mesh."""
        place = self._places.get(id(mesh))
        if place is None:
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                place = _NO_MESH, (0,) * mesh.ndim  # not a rank of the mesh: its shard is empty, and it has no group to gather along
            else:
                lines = lines_of(mesh)
                names = tuple(lines)
                self._meshes.setdefault(names, list(lines.values()))
                place = 1 + list(self._meshes).index(names), tuple(coordinate)
            self._places[id(mesh)] = place
        return place

    @property
    def is_double(self) -> bool:
        """Whether any rank has float64 tensors. False until a norm or statistics have been computed."""
        return self._double

    @property
    def is_empty(self) -> bool:
        """As for any batch. Waits for the last norm, and raises an error of another rank in it."""
        self.settle()
        return self._empty

    @property
    def positions(self) -> list[int]:
        return self._write.positions

    def __len__(self) -> int:
        return len(self._write)

    # ---- Measuring (collectives) ----

    def norm(self, order: float, digest: float = 0.0) -> float | Norm:
        """As for any batch. With a digest of the list for :meth:`check_same_lists`, hosts merge, and the norm is a float."""
        on_device = None if digest else self._norm_on_device(order)
        if on_device is not None:
            return on_device
        if order in NORMS:
            found: float = getattr(self._sum(self._sums, digest), NORMS[order])
        else:
            row = self._agreed(lambda: self._norms(order), merged_norms(order))
            found, self._empty = float(row[0]), not row[1]
        if digest or self._device.type == "cpu":
            return found
        exact = torch.tensor(found, dtype=torch.float64, device=self._device)
        return Norm(exact, exact.to(torch.float64 if self.is_double else torch.float32))

    def statistics(
        self, groups: list[int] | None = None, *, finite_only: bool = False, table: bool = True
    ) -> tuple[Moments, list[Moments], bytes]:
        """As for any batch, except that the table describes this rank's shards, not the whole tensors."""
        rows = b""

        def measure() -> list[Array]:
            nonlocal rows
            _, self._each, rows = self._read.statistics(list(range(len(self._read))), finite_only=finite_only, table=table)
            return self._merged(self._mesh_numbers, 1 + len(self._meshes))

        total = self._sum(measure, float(zlib.crc32(repr((self._shapes, groups)).encode())))
        if groups is not None:
            self.check_same_lists()
        if not groups:
            return total, [], rows
        labels = 1 + max(groups)
        cells = [mesh_number * labels + group for mesh_number, group in zip(self._mesh_numbers, groups, strict=True)]
        tables = np.array(self._merged(cells, (1 + len(self._meshes)) * labels)).reshape(-1, labels, len(MOMENTS))
        whole = np.array([tables[0], *map(merged_each, tables[1:], self._meshes.values())])
        return total, [Moments.from_array(merged_moments(whole[:, label])) for label in range(labels)], rows

    def each(self) -> tuple[list[Moments], list[int]]:
        """The moments of each whole tensor, from the shards that the last ``statistics`` call has measured; and where it is listed first.

        A tensor that is listed again has empty moments.
        """
        self.check_same_lists()
        counted = zip(self._each, self._counts, strict=True)
        rows = np.array([moments.to_array() if counts else np.zeros(len(MOMENTS)) for moments, counts in counted])
        for mesh_number, groups in enumerate(self._meshes.values(), 1):
            here = [index for index, at in enumerate(self._mesh_numbers) if at == mesh_number]
            if here:
                rows[here] = merged_each(rows[here], groups)
        first_of: dict[int, int] = {}
        firsts = [first_of.setdefault(id(tensor), index) for index, tensor in enumerate(self._measured)]
        return [Moments.from_array(row) for row in rows], firsts

    def nonfinite(self) -> list[tuple[str, int, int]]:
        """The non-finite tensors of this rank; if it has none, one entry with the counts of the other ranks."""
        self.settle()
        found = self._write.nonfinite()
        others = self._total.nans + self._total.infs > 0
        return found or ([("on other ranks", self._total.nans, self._total.infs)] if others else [])

    def fail(self, error: Exception) -> NoReturn:
        """Tell the other ranks of an error of this rank, then raise it. A collective."""
        self._error = self._error or error
        self._sum(list)
        raise error

    def _sum(self, measure: Callable[[], list[Array]], digest: float = 0.0) -> Moments:
        return self._concluded(self._agreed(measure, merged_moments, digest))

    def _concluded(self, numbers: Array) -> Moments:
        self._total = Moments.from_array(numbers)
        self._empty = self._total.count == 0
        return self._total

    def _agreed(self, measure: Callable[[], list[Array]], merge: Merge, digest: float = 0.0) -> Array:
        """Merge this rank's rows, one for plain tensors and one for each mesh, with those of all other ranks.

        Args:
            measure: Returns these rows; not called after an error of this rank.
            merge: Merges rows.
            digest: A digest of the list of tensors, if the ranks of a mesh must list the same; else 0.

        Returns:
            The 13 numbers of the merged row.

        Raises:
            Exception: The error of this rank, if it had one.
            RuntimeError: Another rank had one.
        """
        parts = [np.zeros(len(MOMENTS))] * (1 + len(self._meshes))
        if self._error is None:
            try:
                parts = measure()
            except Exception as error:
                self._error = error
        failed = 0.0 if self._error is None else self._failed
        head, found = [failed, float(self._write.is_double), digest], [parts[0]]
        same = True
        for groups, part in zip(self._meshes.values(), parts[1:], strict=True):
            row = along(np.array([*head, *part]), groups, merge)
            # Pass errors and dtypes of this mesh's ranks on to the next mesh. Digests are compared within a mesh only.
            head[:DIGEST] = row[:DIGEST].tolist()
            same = same and row[DIGEST] != DIFFERENT
            found.append(row[HEAD:])
        row = along(np.array([*head, *merge(np.array(found))]), self._process_groups, merge)
        self._double = bool(row[DOUBLE])
        if digest:
            self._same_lists = same
        if self._error is not None:
            raise self._error
        if row[FAILED]:
            raise error_of(row[FAILED])
        return row[HEAD:]

    def _sums(self) -> list[Array]:
        parts = 1 + len(self._meshes)
        places = [mesh_number if counts else parts for mesh_number, counts in zip(self._mesh_numbers, self._counts, strict=True)]
        sums = [moments.to_array() for moments in self._read.statistics(places, table=False)[1]]
        return [*sums, *[np.zeros(len(MOMENTS))] * parts][:parts]

    def _merged(self, places: list[int], number: int) -> list[Array]:
        sums = [Moments()] * number
        for place, moments, counts in zip(places, self._each, self._counts, strict=True):
            if counts:
                sums[place] += moments
        return [moments.to_array() for moments in sums]

    def _norms(self, order: float) -> list[Array]:
        rows = []
        for mesh_number in range(1 + len(self._meshes)):
            tensors = self._counted(mesh_number)
            elements = any(math.prod(tensor.shape) for tensor in tensors)
            norm = float(self._batch_of(tensors).norm(order)) if elements else 0.0
            rows.append(np.array([norm, float(elements), *[0.0] * (len(MOMENTS) - 2)]))
        return rows

    def _counted(self, mesh_number: int) -> list[Any]:
        """What this rank measures for a mesh, without replicas that other ranks count."""
        places = zip(self._measured, self._mesh_numbers, self._counts, strict=True)
        return [tensor for tensor, at, counts in places if at == mesh_number and counts]

    def _batch_of(self, tensors: list[Any]) -> Batch:
        return self._read if len(tensors) == len(self._measured) else local.collect(tensors, served=self._served)

    # ---- Measuring on the device, where it and the groups can (collectives) ----

    def _norm_on_device(self, order: float) -> Norm | None:
        """The norm, for which nothing has waited; None where the host has to merge, or to tell the other ranks of an error."""
        meshes = list(self._meshes.values())
        if order not in NORMS or self._error is not None or not isinstance(self._read, DeviceBatch) or not meshes or self._process_groups:
            return None
        double = self._write.is_double
        try:
            device = self._read.kernel_device
            if device is None or any(line.device.type != device.type for lines in meshes for line in lines):
                return None
            rows = [self._row(mesh_number, double) for mesh_number in range(1 + len(meshes))]
        except Exception as error:
            self._error = error
            return None
        from normclip._backends.device_ranks import norm

        self._on_device, found = norm(rows, meshes, order, device, double=double)
        return Norm(found.exact, found.rounded, self.settle)

    def _row(self, mesh_number: int, double: bool) -> torch.Tensor | None:
        """This rank's row for a mesh, on the device; None if it has nothing to count there."""
        tensors = self._counted(mesh_number)
        if not tensors:
            return None
        batch = self._batch_of(tensors)
        assert isinstance(batch, DeviceBatch)
        return batch.row(double=double)

    def settle(self) -> None:
        """Wait for the last norm, if it is on a device.

        Raises:
            RuntimeError: Another rank had an error.
        """
        row, self._on_device = self._on_device, None
        if row is not None:
            numbers = row.cpu().numpy()
            if numbers[FAILED]:
                failure_flag(row.device).zero_()  # all ranks have waited for this row
                raise error_of(numbers[FAILED])
            self._double = bool(numbers[DOUBLE])
            self._concluded(numbers[HEAD:])

    def check_same_lists(self) -> None:
        """Raise if the latest digests of the ranks differed."""
        if not self._same_lists:
            raise ValueError(
                "the ranks list different tensors: for statistics of tensors or groups, and for limits on the update, "
                "pass the same list on all ranks, in the same order"
            )

    # ---- Changing (no collectives) ----

    def clip_(self, limit: float, norm: Any, epsilon: float) -> list[Any]:
        number = norm if isinstance(self._write, DeviceBatch) else float(norm)
        return self._written(self._targets.clip_(limit, number, epsilon))

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
                "a DTensor has a Partial placement, so the values of its elements are unknown: reduce it with .redistribute(), or scale it"
            )
        self._targets.check_elementwise()

    @property
    def _targets(self) -> Batch:
        if self._error is not None:
            raise self._error
        return self._write

    def _written(self, tensors: list[Any]) -> list[Any]:
        return [*tensors, *(self._wrappers[id(tensor)] for tensor in tensors if id(tensor) in self._wrappers)]
