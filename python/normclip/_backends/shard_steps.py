"""Optimizer steps of parameters of which other ranks hold parts: each rank moves its own shards, by the norm of the whole model.

The norm is one collective for all tensors of a mesh, and so is what limits on the update need of each parameter. An error of one rank is
raised on all of them, by these collectives, before anything is written. Where the norm stays on the device, as :mod:`.shards` tells, the
hosts of the others find out later, and their devices in time: the norm is −inf then, for which the caller has the step skipped.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import reduce
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from normclip._backends.dtensors import lines_of, local_shard, reduced
from normclip._backends.protocol import AnyNorm, PacedStep, Served
from normclip._backends.ranks import Array, Line, error_of, gathered
from normclip._backends.shards import Shards
from normclip._core import Stepper, paces, strictly

# The columns of a table of parameters: Σu·g, Σu² and the number of elements, and 1 if there is a gradient. It begins with a row of which
# the first number is 0, or 1 + the number of a rank that raised an error.
_HAS_GRADIENT = 3


class ShardStep:
    """A :class:`~normclip._backends.protocol.Step` of this rank's shards. All ranks must call ``norm``, which is a collective."""

    def __init__(
        self,
        stepper: Stepper,
        groups: list[dict[str, Any]],
        states: dict[Any, Any],
        counts: list[int],
        make: Any,
        local_step: Callable[[list[Any]], PacedStep],
        served: Served,
        *,
        limited: bool,
    ) -> None:
        self.fresh: list[tuple[Tensor, str, Tensor]] = []
        self._wrappers: dict[int, Tensor] = {}  # by the identity of its local tensor
        self._error: Exception | None = None
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._indices: list[int] = []  # of the members among all parameters
        self._limited = limited
        self._awaited = True  # whether other ranks may wait for this one in `step_within`
        with torch.no_grad():
            # Before anything that may fail on one rank alone: reducing is a collective.
            gradients = {id(item): _reduced(item.grad) for group in groups for item in group["params"]}
            items = [
                item if gradients[id(item)] is None else SimpleNamespace(grad=gradients[id(item)])
                for group in groups
                for item in group["params"]
            ]
            try:
                members, self.fresh = stepper.members(groups, states, counts, make)
                starts = np.cumsum([0, *(len(group["params"]) for group in groups)]).tolist()
                self._indices = [starts[group] + place for group, place, *_ in members]
                self._step = local_step(
                    [
                        (group, place, self._shard(item), self._shard(gradients[id(item)]), [self._shard(kept) for kept in its], steps)
                        for group, place, item, _, its, steps in members
                    ]
                )
            except Exception as error:
                self._error = error
        self._gradients = Shards(items, grads=True, writable=False, process_groups=(), served=served)

    @property
    def is_empty(self) -> bool:
        """Whether no rank has elements with a gradient. Waits for the norm, and raises an error of another rank."""
        return self._gradients.is_empty

    def norm(self) -> AnyNorm:
        if self._error is not None:
            self._gradients.fail(self._error)
        if not self._limited:
            return self._gradients.norm(2.0)
        # Limits take another collective, with a row for each parameter. So the host has to know whether there is a step.
        shapes = [tuple(parameter.shape) for parameter in self._parameters]
        return self._gradients.norm(2.0, digest=1.0 + zlib.crc32(repr(shapes).encode()))  # 0 would be none

    def check_unchanged(self) -> None:
        self._step.check_unchanged()

    def skip_unless(self, taken: Tensor) -> None:
        """As for steps on devices."""
        if self._indices:  # else Rust may have the step, which moves nothing
            self._step.skip_unless(taken)  # type: ignore[attr-defined]

    def step_(self, coefficient: Any, settings: list[Any]) -> list[Any]:
        return self._written(self._step.step_(coefficient, settings))

    def step_within(
        self, coefficient: Any, settings: list[Any], descent_limit: float | None, update_rms_limit: float | None, scale: float
    ) -> tuple[list[Any], float, list[float]]:
        """As for any step. A collective."""
        self._awaited = False
        self._gradients.check_same_lists()
        table = self._merged(lambda: self._step.measure(coefficient, settings))
        movements = [(along, squares, count) for along, squares, count, _ in table.tolist()]
        each, descent, rms = paces(movements, descent_limit, update_rms_limit, scale)
        written = self._step.step_(coefficient, settings, [each[index] for index in self._indices])
        return self._written(written), descent, [size for size, row in zip(rms, table, strict=True) if row[_HAS_GRADIENT]]

    def fail(self, error: Exception) -> None:
        """Tell the other ranks, which wait in ``step_within``, of an error of this rank, and raise it. A collective.

        Once this rank has been there itself, it does nothing.
        """

        def failing() -> NoReturn:
            raise error

        if self._awaited:
            self._merged(failing)

    def _merged(self, measure: Callable[[], Sequence[tuple[float, float, float]]]) -> Array:
        """What the step would do to each parameter as a whole, by this rank's shards and those of the others. A collective.

        Raises:
            Exception: The error of this rank, if it had one.
            RuntimeError: Another rank had one.
        """
        self._awaited = False
        error = None
        meshes, counts = self._meshes()
        table = np.zeros((1 + len(self._parameters), 1 + _HAS_GRADIENT))
        try:
            for index, movement in zip(self._indices, measure(), strict=True):
                table[1 + index] = (*movement, 1.0) if counts[index] else 0.0
        except Exception as caught:
            error, table[0, 0] = caught, 1.0 + dist.get_rank()
        for lines, indices in meshes:
            places = [0, *(1 + index for index in indices)]
            for line in lines:
                tables = gathered(table[places], line)
                failed = max(table[0, 0], tables[:, 0, 0].max())
                table[places] = strictly(reduce, np.add, tables)
                table[0, 0] = failed
        if error is not None:
            raise error
        if table[0, 0]:
            raise error_of(table[0, 0])
        return table[1:]

    def _meshes(self) -> tuple[list[tuple[list[Line], list[int]]], list[bool]]:
        """The lines along which the rows of parameters are gathered, with the indices of these, and which rows this rank contributes."""
        meshes: dict[tuple[str, ...], tuple[list[Line], list[int]]] = {}
        counts = [True] * len(self._parameters)
        for index, parameter in enumerate(self._parameters):
            coordinate = parameter.device_mesh.get_coordinate() if isinstance(parameter, DTensor) else None
            if coordinate is None:
                continue  # this rank has all of it, as others may, or nothing
            lines = lines_of(parameter.device_mesh)
            meshes.setdefault(tuple(lines), (list(lines.values()), []))[1].append(index)
            # Of replicas, only the first is counted.
            counts[index] = not any(at and placement.is_replicate() for at, placement in zip(coordinate, parameter.placements, strict=True))
        return list(meshes.values()), counts

    def _written(self, tensors: list[Any]) -> list[Any]:
        return [*tensors, *(self._wrappers[id(tensor)] for tensor in tensors if id(tensor) in self._wrappers)]

    def _shard(self, tensor: Any) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        shard = local_shard(tensor)
        self._wrappers[id(shard)] = tensor
        return shard


def _reduced(gradient: Tensor | None) -> Tensor | None:
    if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
        return reduced(gradient)
    return gradient
