"""Small models, and the same training with torch's clipping and with normclip's in its place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normclip
import normclip.monitor

# Every function that clips the gradient of a weight by a rule.
by_clipping = pytest.mark.parametrize(
    "clip",
    [
        lambda weight, rule: normclip.clip_(weight.grad, rule),
        lambda weight, rule: normclip.clip_grad_norm_([weight], rule=rule),
        lambda weight, rule: normclip.clip_grads_([weight], rule),
        lambda weight, rule: normclip.clip_grads_([weight], limits={"rest": rule}, groups={}),
    ],
    ids=["clip_", "clip_grad_norm_", "clip_grads_", "clip_grads_ by groups"],
)


def small_model() -> nn.Module:
    """A network with the same random parameters each time."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def model_with(weight: list[float], bias: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A linear layer with these gradients."""
    model = torch.nn.Linear(len(weight), 1, dtype=dtype)
    model.weight.grad = torch.tensor([weight], dtype=dtype)
    model.bias.grad = torch.tensor([bias], dtype=dtype)
    return model


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, the same each time."""
    inputs = torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(2))
    return [(given, 5.0 * given.sum(1, keepdim=True)) for given in inputs]


def assert_trains_alike(monkeypatch: pytest.MonkeyPatch, train: Callable[[], nn.Module], calls: int, name: str = "clip_grad_norm_") -> None:
    """Parameters after training are those of unpatched torch within rounding, and normclip's function was called so many times for it."""
    counted: list[Any] = []
    function = getattr(normclip.clip, name)

    def counting(*arguments: Any, **keywords: Any) -> Any:
        counted.append(arguments)
        return function(*arguments, **keywords)

    monkeypatch.setattr(normclip.clip, name, counting)
    expected = list(train().parameters())
    assert not counted
    with normclip.patch_torch():
        trained = list(train().parameters())
    assert len(counted) == calls
    for ours, torchs in zip(trained, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with a word for each time that gradients are measured."""
    reads: list[str] = []

    def counting(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **how: reads.append(name) or function(*given, **how))

    counting(normclip.statistics, "measure")
    counting(normclip.monitor.monitor, "measure")
    counting(normclip.clip, "clip_grad_norm_")
    return reads
