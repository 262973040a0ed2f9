"""Steps of gradient descent on tensors that are not, or not all, in CPU memory, by torch operations. Nothing waits for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normclip import _core
from normclip._backends import local
from normclip._backends.protocol import AnyNorm, Member, Settings


class DeviceStep:
    """A :class:`~normclip._backends.protocol.Step` of tensors on any devices."""

    def __init__(self, members: list[Member]) -> None:
        _core.Descent.check(members)
        self._members = members
        self._gradients = local.collect([gradient for _, _, _, gradient, _ in members], grads=False)

    def norm(self) -> AnyNorm:
        return self._gradients.norm(2.0)

    def step_(self, coefficient: float | Tensor, settings: list[Settings]) -> list[Any]:
        alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        for number, _, parameter, gradient, buffer in self._members:
            alike.setdefault((number, parameter.device, parameter.dtype), []).append((parameter, gradient, buffer))
        for (number, device, dtype), triples in alike.items():
            factor = torch.as_tensor(coefficient, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            _step(triples, factor.to(device, non_blocking=True), settings[number])
        return []  # torch's operations have raised the version counters


def _step(triples: list[tuple[Tensor, Tensor, Tensor | None]], coefficient: Tensor, settings: Settings) -> None:
    lr, momentum, nesterov, weight_decay = settings
    parameters = [parameter for parameter, _, _ in triples]
    directions = torch._foreach_mul([gradient for _, gradient, _ in triples], coefficient)
    if weight_decay != 0.0:
        torch._foreach_add_(directions, parameters, alpha=weight_decay)
    buffers = [buffer for _, _, buffer in triples if buffer is not None]
    if buffers:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        if nesterov:
            torch._foreach_add_(directions, buffers, alpha=momentum)
        else:
            directions = tuple(buffers)
    torch._foreach_add_(parameters, directions, alpha=-lr)
