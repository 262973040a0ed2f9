"""Optimizer steps on CUDA devices: one launch for all parameters of the same element types, which does not wait for the device.

All that differs between parameters is read on the device: addresses and sizes from tables of chunks, settings from rows of factors, numbers
of steps from counters, and the coefficient and whether to step at all from where they were computed. So a CUDA graph can capture a step,
provided that an earlier one of the same tensors and settings has uploaded these. Replays count their steps, and keep the settings of the
capture.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from normclip._backends.cuda import Tuning
from normclip._backends.launch import launch, on_device
from normclip._backends.parts import moved
from normclip._backends.protocol import Member, Settings, SGDSettings
from normclip._backends.tables import Table, table_of
from normclip._backends.triton import elements, limits, step

_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class _Group:
    """The parameters of one launch."""

    def __init__(self) -> None:
        self.layout = array("q")
        self.rows: dict[tuple[float, ...], int] = {}
        """The rows of factors that occur, and the number of each."""


class _Launch(NamedTuple):
    """What a launch reads."""

    device: torch.device
    constants: tuple[int, ...]
    width: int
    """How many numbers a parameter has in the table: addresses, the number of its row of factors, and its place."""
    table: Table
    factors: Table


class CudaStep:
    """The step of those parameters that are on CUDA devices: they are added one by one, and then measured or moved together."""

    def __init__(self, tuning: Tuning | None) -> None:
        self._tuning = tuning or Tuning()
        self._groups: defaultdict[tuple[torch.device, tuple[int, ...]], _Group] = defaultdict(_Group)
        self._written: list[Tensor] = []
        self._copied: list[tuple[list[Tensor], list[Tensor]]] = []
        self._clocks: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)

    def add(self, place: int, member: Member, addresses: list[int], settings: Settings) -> None:
        """Add a parameter.

        Args:
            place: The row of the parameter among what is measured, and its place among paces.
            member: The parameter, with its gradient and states.
            addresses: Those of the parameter, its states and its gradient, as ``Stepper.check`` has found them.
            settings: Those of its group.
        """
        _, _, parameter, gradient, states, steps = member
        device, tensors = parameter.device, [parameter, *states]
        clock = _clock(steps, device) if isinstance(steps, Tensor) else None
        self._written += tensors
        if clock is not None:
            self._written.append(clock)
            self._clocks[device, clock.dtype].append(clock)
        if 0 in addresses and parameter.numel() > 0:
            # What has gaps, or another order of elements than the parameter, is moved as a copy.
            copies = [tensor.resolve_neg().clone(memory_format=torch.contiguous_format) for tensor in (*tensors, gradient)]
            self._copied.append((tensors, copies))
            addresses = [copy.data_ptr() for copy in copies]
        constants = (
            step.SGD.value if isinstance(settings, SGDSettings) else step.ADAMW.value,
            len(states),
            _CODES[parameter.dtype],
            _CODES[states[0].dtype if states else parameter.dtype],
            _CODES[torch.float32 if clock is None else clock.dtype],
            int(all(address % elements.VECTOR.value == 0 for address in addresses)),
        )
        group = self._groups[device, constants]
        factors = _factors(settings, is_first=isinstance(steps, int) and steps == 0)
        row = group.rows.setdefault(factors, len(group.rows))
        clocks = [] if clock is None else [clock.data_ptr()]
        group.layout.extend([*addresses, *clocks, row, place, parameter.numel(), constants[2], 0])

    def measure(self, coefficient: float | Tensor, count: int) -> Tensor:
        """What the step would do to each of ``count`` parameters, by their places: Σu·g, Σu² and the number of elements.

        Returns:
            ``(count, 3)``, float64, on one of the devices. Zeros for places at which no parameter was added.
        """
        found: dict[torch.device, Tensor] = {}
        for reads in self._launches():
            device, structure = reads.device, reads.table.structure
            with on_device(device):
                if device not in found:
                    found[device] = torch.zeros((count, limits.COLUMNS.value), dtype=torch.float64, device=device)
                partials = torch.empty((limits.COLUMNS.value, structure.chunks), dtype=torch.float64, device=device)
                self._launch(reads, coefficient, partials=partials)
                lanes = self._tuning.short if structure.longest <= self._tuning.short else self._tuning.lanes
                arguments = (partials, structure.chunks, structure.segments, reads.table.addresses.numbers, found[device])
                launch(
                    limits.merge,
                    (len(structure.segments) - 1, 1, 1),
                    arguments,
                    (reads.width, lanes),
                    device,
                    num_warps=4,
                    enable_fp_fusion=False,
                )
        first, *others = found.values()
        for other in others:
            first += moved(other, first.device)
        return first

    def paces(
        self, movements: Tensor, descent_limit: float | None, update_rms_limit: float | None, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What to multiply the learning rate of each parameter by, ⟨u, g⟩ and RMS(u) of each, as ``_core.paces`` works them out."""
        device, count = movements.device, len(movements)
        each, sizes = torch.empty((2, count), dtype=torch.float64, device=device)
        descent = torch.empty((), dtype=torch.float64, device=device)
        with on_device(device):
            arguments = (movements, count, _number(scale, device), each, sizes, descent)
            bounds = [math.inf if bound is None else bound for bound in (descent_limit, update_rms_limit)]
            launch(limits.limit, (1, 1, 1), (*arguments, *bounds), (self._tuning.short,), device, num_warps=4, enable_fp_fusion=False)
        return each, descent, sizes

    def take(self, coefficient: float | Tensor, taken: Tensor | None, paces: Tensor | None) -> list[Tensor]:
        """Move the parameters by their gradients times the coefficient, or none if ``taken`` holds 0.

        Args:
            coefficient: What gradients are multiplied by.
            taken: Whether there is a step; None for yes.
            paces: What learning rates are multiplied by, by the places of parameters; None for 1.

        Returns:
            The tensors to pass to ``mark_written``.

        Raises:
            RuntimeError: A CUDA graph is being captured, and something would have to be uploaded for it. Nothing has changed.
        """
        for reads in self._launches():
            with on_device(reads.device):
                self._launch(reads, coefficient, taken=taken, paces=paces)
        for tensors, copies in self._copied:
            torch._foreach_copy_(tensors, copies[:-1])
        for (device, dtype), clocks in self._clocks.items():
            torch._foreach_add_(clocks, 1.0 if taken is None else taken.to(device, dtype, non_blocking=True))
        return self._written

    def _launches(self) -> list[_Launch]:
        """What to launch, after all that has to be uploaded for it is."""
        found = []
        for (device, constants), group in self._groups.items():
            width = 4 + constants[1] + constants[0]
            with on_device(device):
                table = table_of(group.layout.tobytes(), device, self._tuning.chunking, addresses=width)
                # Rows of factors are uploaded and kept as the addresses of tensors without elements are.
                rows = array("d", [number for row in group.rows for number in (*row, 0.0, 0.0, 0.0)])
                factors = table_of(rows.tobytes(), device, self._tuning.chunking, addresses=len(next(iter(group.rows))))
            found.append(_Launch(device, constants, width, table, factors))
        return found

    def _launch(
        self,
        reads: _Launch,
        coefficient: float | Tensor,
        *,
        taken: Tensor | None = None,
        paces: Tensor | None = None,
        partials: Tensor | None = None,
    ) -> None:
        """Launch the kernel of a step. With partials, it measures."""
        device, constants, _, table, factors = reads
        table.await_uploads()
        factors.await_uploads()
        if table.structure.chunks == 0:
            return
        numbers = [None if number is None else _number(number, device) for number in (coefficient, taken, paces)]
        # Fused multiplications and additions would give other bits than those of the CPU.
        launch(
            step.step,
            (table.structure.chunks, 1, 1),
            (table.structure.rows, table.addresses.numbers, factors.addresses.numbers.view(torch.float64), *numbers, partials),
            (*constants, self._tuning.tile),
            (device, self._tuning.warps, taken is None, paces is None, partials is None),
            num_warps=self._tuning.warps,
            enable_fp_fusion=False,
        )


def _clock(steps: Tensor, device: torch.device) -> Tensor:
    """What counts the steps of a parameter, on the parameter's device. That of a new or a loaded state is in CPU memory, and is moved.

    Raises:
        TypeError: It is not of a type that counts.
    """
    if steps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the step of a parameter is of {steps.dtype}: make it one number of float32. Nothing has changed")
    if steps.device != device:
        steps.data = steps.to(device)
    return steps


def _factors(settings: Settings, *, is_first: bool) -> tuple[float, ...]:
    """The row of factors of a step, as the kernel's NUMBERS tells."""
    sign = -1.0 if settings.maximize else 1.0
    if isinstance(settings, SGDSettings):
        lr, momentum, dampening, weight_decay, nesterov, _ = settings
        # The first direction that enters a buffer is not dampened.
        return sign, lr, momentum, 1.0 if is_first else 1.0 - dampening, weight_decay, float(nesterov)
    lr, first, second, eps, weight_decay, _, _ = settings
    return sign, lr, first, second, 1.0 - first, 1.0 - second, eps, weight_decay


def _number(number: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return moved(number, device)
    return torch.full((), number, dtype=torch.float64, device=device)
