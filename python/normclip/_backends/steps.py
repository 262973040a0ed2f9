"""Optimizer steps of gradient descent on tensors that are not all in CPU memory, by torch operations that do not wait for a device.

Rounds after every operation, as :class:`torch.optim.SGD` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normclip import _core
from normclip._backends import local
from normclip._backends.protocol import AnyNorm, Member, Served, Settings


class DeviceStep:
    """A :class:`~normclip._backends.protocol.Step` on tensors of any devices."""

    def __init__(self, members: list[Member], served: Served) -> None:
        _core.Step.check(members)
        self._members = members
        self._gradients = local.collect([gradient for _, _, _, gradient, _, _ in members], served=served)

    def norm(self) -> AnyNorm:
        return self._gradients.norm(2.0)

    def check_unchanged(self) -> None:
        _core.Step.check(self._members)
        self._gradients.check_unchanged()

    def step_(self, coefficient: float | Tensor, settings: list[Settings]) -> list[Any]:
        # Grouped, as torch's foreach operations take tensors of one device, one dtype and the same settings.
        grouped: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        for number, _, parameter, gradient, states, new in self._members:
            # The first update of a momentum buffer is not dampened.
            group = settings[number]._replace(dampening=0.0) if new else settings[number]
            grouped.setdefault((group, parameter.device, parameter.dtype), []).append((parameter, gradient, states[0] if states else None))
        for (group, device, dtype), triples in grouped.items():
            factor = torch.as_tensor(coefficient, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            _step(triples, factor.to(device, non_blocking=True), group)
        return []  # nothing to mark as written: torch's operations have raised the version counters


def _step(triples: list[tuple[Tensor, Tensor, Tensor | None]], coefficient: Tensor, group: Settings) -> None:
    parameters = [parameter for parameter, _, _ in triples]
    directions = torch._foreach_mul([gradient for _, gradient, _ in triples], -coefficient if group.maximize else coefficient)
    if group.weight_decay != 0.0:
        torch._foreach_add_(directions, parameters, alpha=group.weight_decay)
    buffers = [buffer for _, _, buffer in triples if buffer is not None]
    if buffers:
        torch._foreach_mul_(buffers, group.momentum)
        torch._foreach_add_(buffers, directions, alpha=1.0 - group.dampening)
        if group.nesterov:
            torch._foreach_add_(directions, buffers, alpha=group.momentum)
        else:
            directions = tuple(buffers)
    torch._foreach_add_(parameters, directions, alpha=-group.lr)
