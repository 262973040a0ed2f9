"""`GradMonitor` with gradients on a device."""

from collections.abc import Callable

import pytest
import torch

import normclip
from normclip.monitor import Figures, GradMonitor


def test_patched_clipping_tells_the_monitor(place: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = torch.nn.Parameter(place(torch.zeros(2)))
    weight.grad = place(torch.tensor([3.0, 4.0]))
    told: list[Figures] = []
    with normclip.patch_torch(GradMonitor([("weight", weight)], lambda figures, step: told.append(figures))):
        norm = torch.nn.utils.clip_grad_norm_(weight, 1.0)
    assert (norm.item(), norm.device, norm.dtype) == (5.0, weight.device, torch.float32)
    torch.testing.assert_close(weight.grad.cpu(), torch.tensor([0.6, 0.8]))
    assert (told[0]["norm/weight"], told[0]["clip/coefficient"]) == (5.0, pytest.approx(0.2))
