"""Policies that remember on device tensors, against the CPU."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normclip
from normclip.rules import Least
from normclip.thresholds import AGC, AdaClip, AdaGC, AdaGN, AutoClip, ZClip

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEQUENCE = [1.0, 0.5, 4.0, 2.0, math.inf, 9.0]


def parameters_of(norm: float, place: Callable[[Tensor], Tensor]) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    named = [(f"w{i}", torch.nn.Parameter(place(torch.randn(4, i + 1, generator=generator)))) for i in range(3)]
    for _, parameter in named:
        parameter.grad = place(torch.randn(parameter.shape, generator=generator) * norm)
    return named


@pytest.mark.parametrize(
    "make",
    [lambda: AutoClip(30), lambda: AutoClip(30, window=2), lambda: ZClip(alpha=0.8, z=1.5, warmup=3, max_norm=3.0), AdaGN],
    ids=["AutoClip", "window", "ZClip", "AdaGN"],
)
def test_rules_that_remember(place: Callable[[Tensor], Tensor], make: Callable[[], AutoClip]) -> None:
    rule, twin = make(), make()
    for norm in SEQUENCE:
        found, expected = parameters_of(norm, place), parameters_of(norm, Tensor.clone)
        normclip.clip_grad_norm_([parameter for _, parameter in found], rule=Least(100.0, rule))
        multiplier = twin.multiplier(math.sqrt(sum(parameter.grad.double().square().sum().item() for _, parameter in expected)))
        for (_, x), (_, y) in zip(found, expected, strict=True):
            torch.testing.assert_close(x.grad.cpu(), y.grad * multiplier, equal_nan=True)
    for ours, theirs in zip(rule.state_dict().values(), twin.state_dict().values(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_policies_by_tensor_and_by_unit(place: Callable[[Tensor], Tensor]) -> None:
    policy, twin = AdaGC(warmup=2, beta=0.5), AdaGC(warmup=2, beta=0.5)
    elements, other = AdaClip(theta=0.5), AdaClip(theta=0.5)
    for norm in SEQUENCE:
        found, expected = parameters_of(norm, place), parameters_of(norm, Tensor.clone)
        ours = policy.clip_(found)
        theirs = twin.clip_(expected)
        assert ours.coefficients == pytest.approx(theirs.coefficients, rel=1e-12, nan_ok=True)
        elements.clip_(found)
        other.clip_(expected)
        AGC().clip_(found)
        AGC().clip_(expected)
        for (_, x), (_, y) in zip(found, expected, strict=True):
            torch.testing.assert_close(x.grad.cpu(), y.grad, equal_nan=True)
    assert policy.state_dict()["norms"] == pytest.approx(twin.state_dict()["norms"], rel=1e-12)
    for name, (steps, maximum) in other.state_dict()["maxima"].items():
        assert elements.state_dict()["maxima"][name] == pytest.approx([steps, maximum], rel=1e-6)
