"""Optimizer steps on tensors that are not all in CPU memory: by :mod:`.cuda_steps` where there are kernels, else by torch operations.

The latter have each formula once, in foreach operations on lists of tensors of one device, one element type and one number of steps. They
round after every operation, as torch's own optimizers do; those of AdamW are of float32 for 16-bit types. They wait for the device where it
counts the steps, decides whether there is one, or measures it for limits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normclip._backends import local
from normclip._backends.parts import moved
from normclip._backends.protocol import AdamWSettings, AnyNorm, Member, Served, SGDSettings
from normclip._core import Stepper, paces

# DLPack's device types, of those devices that kernels may serve: on the CPU, Triton's interpreter runs them.
_KINDS = {"cpu": 1, "cuda": 2}


class DeviceStep:
    """A :class:`~normclip._backends.protocol.Step` on tensors of any devices."""

    def __init__(self, stepper: Stepper, members: list[Member], fresh: list[tuple[Tensor, str, Tensor]], served: Served) -> None:
        self.fresh = fresh
        self._stepper, self._members, self._served = stepper, members, served
        self._addresses = stepper.check(members)
        self._taken: Tensor | None = None
        self._gradients = local.collect([gradient for _, _, _, gradient, _, _ in members], served=served)

    @property
    def is_empty(self) -> bool:
        return not self._members

    def norm(self) -> AnyNorm:
        return self._gradients.norm(2.0)

    def check_unchanged(self) -> None:
        self._addresses = self._stepper.check(self._members)
        self._gradients.check_unchanged()

    def measure(self, coefficient: float | Tensor, settings: list[Any]) -> list[tuple[float, float, float]]:
        return _rows(self._movements(self._split(settings), coefficient, settings))

    def skip_unless(self, taken: Tensor) -> None:
        """Have a step write nothing if this holds False. Where there are kernels, the device finds out."""
        self._taken = taken

    def step_(self, coefficient: float | Tensor, settings: list[Any], paces: list[float] | None = None) -> list[Any]:
        return self._take(self._split(settings), coefficient, settings, None if paces is None else torch.tensor(paces, dtype=torch.float64))

    def step_within(
        self,
        coefficient: float | Tensor,
        settings: list[Any],
        descent_limit: float | None,
        update_rms_limit: float | None,
        scale: float | Tensor,
    ) -> tuple[list[Any], float | Tensor, list[float] | Tensor]:
        split = self._split(settings)
        movements = self._movements(split, coefficient, settings)
        step, _ = split
        descent: float | Tensor
        sizes: list[float] | Tensor
        if step is None:
            found, descent, sizes = paces(_rows(movements), descent_limit, update_rms_limit, float(scale))
            each = torch.tensor(found, dtype=torch.float64)
        else:
            each, descent, sizes = step.paces(movements, descent_limit, update_rms_limit, scale)
        return self._take(split, coefficient, settings, each), descent, sizes

    def _split(self, settings: list[Any]) -> tuple[Any, list[int]]:
        """The step by kernels, if any are of use, and the places of the members that it is not of."""
        kernels, others = self._kernels(), []
        step, every, begin = kernels(self._served.tuning) if kernels else None, array("q", self._addresses), 0
        for place, member in enumerate(self._members):
            end = begin + len(member[4]) + 2
            addresses, begin = every[begin:end], end
            if step is None or -1 in addresses or not self._is_served(member[2]):
                others.append(place)
            else:
                step.add(place, member, addresses, settings[member[0]])
        return step, others

    @torch.no_grad()
    def _movements(self, split: tuple[Any, list[int]], coefficient: float | Tensor, settings: list[Any]) -> Tensor:
        """For each member, Σu·g, Σu² and the number of its elements: on a device where there are kernels, else in CPU memory."""
        step, others = split
        found = torch.zeros((len(self._members), 3), dtype=torch.float64)
        for group, places, factor, (parameters, gradients, *states) in self._grouped(others, coefficient, settings, None):
            copies = [[state.clone() for state in tensors] for tensors in states]
            directions = _direction(group, self._number(places[0]), parameters, gradients, copies, factor)
            for place, u, g in zip(places, directions, gradients, strict=True):
                wide = u.to(torch.float64 if u.device.type != "mps" else torch.float32)
                along = (wide * g).sum().item()
                numbers = -along if group.maximize else along, wide.square().sum().item(), u.numel()
                found[place] = torch.tensor(numbers, dtype=torch.float64)
        if step is None:
            return found
        measured: Tensor = step.measure(coefficient, len(self._members))
        return measured + moved(found, measured.device) if others else measured

    @torch.no_grad()
    def _take(self, split: tuple[Any, list[int]], coefficient: float | Tensor, settings: list[Any], paces: Tensor | None) -> list[Any]:
        step, others = split
        # These come first, as operations of tensor subclasses may raise, and then nothing else has changed.
        if others and (self._taken is None or bool(self._taken)):
            self._step_by_torch(others, coefficient, settings, None if paces is None else paces.tolist())
        return [] if step is None else step.take(coefficient, self._taken, paces)

    def _is_served(self, parameter: Tensor) -> bool:
        return _KINDS.get(parameter.device.type) in self._served.triton

    def _kernels(self) -> Any:
        """The class of steps by kernels, where there are some for any of the parameters."""
        if any(self._is_served(parameter) for _, _, parameter, *_ in self._members):
            try:
                from normclip._backends.cuda_steps import CudaStep
            except ImportError:
                return None  # torch was built without Triton
            return CudaStep
        return None

    def _step_by_torch(self, every: Sequence[int], coefficient: float | Tensor, settings: list[Any], paces: list[float] | None) -> None:
        for group, places, factor, (parameters, gradients, *states) in self._grouped(every, coefficient, settings, paces):
            lr = group.lr * (1.0 if paces is None else paces[places[0]])
            if isinstance(group, SGDSettings):
                directions = _direction(group, 0.0, parameters, gradients, states, factor)
                torch._foreach_add_(parameters, directions, alpha=-lr)
                continue
            lists = [parameters, *states]
            wide = [_widened(tensors) for tensors in lists]
            directions = _direction(group, self._number(places[0]), wide[0], gradients, wide[1:], factor)
            torch._foreach_mul_(wide[0], 1.0 - lr * group.weight_decay)
            torch._foreach_add_(wide[0], directions, alpha=-lr)
            for tensors, changed in zip(lists, wide, strict=True):
                if changed is not tensors:
                    torch._foreach_copy_(tensors, changed)
        counters = [steps for steps in (self._members[place][5] for place in every) if isinstance(steps, Tensor)]
        if counters:
            torch._foreach_add_(counters, 1.0)

    def _number(self, place: int) -> float:
        """Which step of the parameter this is."""
        return float(self._members[place][5]) + 1.0

    def _grouped(
        self, every: Sequence[int], coefficient: float | Tensor, settings: list[Any], paces: list[float] | None
    ) -> list[tuple[Any, ...]]:
        """The members of these places as torch's foreach operations take them: of one device, element type, step, pace and settings.

        Each with these settings, the places of the members, the coefficient on the device, and lists of parameters, gradients and states.
        """
        grouped: dict[tuple[Any, ...], list[int]] = {}
        for place in every:
            number, _, parameter, _, states, _ = self._members[place]
            group, steps = settings[number], self._number(place)
            if isinstance(group, SGDSettings):
                # The first update of a momentum buffer is not dampened.
                group, steps = group._replace(dampening=0.0) if steps == 1.0 else group, 0.0
            kind = states[0].dtype if states else None
            pace = None if paces is None else paces[place]
            grouped.setdefault((group, steps, parameter.device, parameter.dtype, kind, pace), []).append(place)
        found = []
        for (group, _, device, dtype, *_), places in grouped.items():
            factor = torch.as_tensor(coefficient, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            members = [self._members[place] for place in places]
            lists = [[parameter for _, _, parameter, *_ in members], [gradient for _, _, _, gradient, *_ in members]]
            lists += [list(tensors) for tensors in zip(*(states for *_, states, _ in members), strict=True)]
            found.append((group, places, factor.to(device, non_blocking=True), lists))
        return found


def _rows(movements: Tensor) -> list[Any]:
    return [tuple(row) for row in movements.tolist()]


def _direction(
    group: SGDSettings | AdamWSettings,
    steps: float,
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[list[Tensor]],
    coefficient: Tensor,
) -> Any:
    """The directions in which parameters go. Changes the states."""
    factor = -coefficient if group.maximize else coefficient
    if isinstance(group, SGDSettings):
        return _sgd(group, parameters, torch._foreach_mul(gradients, factor), states)
    return _adamw(group, steps, torch._foreach_mul(_widened(gradients), factor), [_widened(tensors) for tensors in states])


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, or for 16-bit types copies in float32: the squares of AdamW underflow in float16."""
    return [tensor.float() for tensor in tensors] if tensors and tensors[0].dtype.itemsize == 2 else tensors


def _sgd(group: SGDSettings, parameters: list[Tensor], directions: Any, states: list[list[Tensor]]) -> Any:
    if group.weight_decay != 0.0:
        torch._foreach_add_(directions, parameters, alpha=group.weight_decay)
    if not states:
        return directions
    (buffers,) = states
    torch._foreach_mul_(buffers, group.momentum)
    torch._foreach_add_(buffers, directions, alpha=1.0 - group.dampening)
    if not group.nesterov:
        return buffers
    torch._foreach_add_(directions, buffers, alpha=group.momentum)
    return directions


def _adamw(group: AdamWSettings, steps: float, gradients: Any, states: list[list[Tensor]]) -> Any:
    averages, squares, *largest = states
    torch._foreach_lerp_(averages, gradients, 1.0 - group.beta1)
    torch._foreach_mul_(squares, group.beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1.0 - group.beta2)
    if largest:
        torch._foreach_maximum_(largest[0], squares)
        squares = largest[0]
    below = torch._foreach_sqrt(squares)
    torch._foreach_div_(below, (1.0 - group.beta2**steps) ** 0.5)
    torch._foreach_add_(below, group.eps)
    torch._foreach_mul_(below, 1.0 - group.beta1**steps)
    return torch._foreach_div(averages, below)
