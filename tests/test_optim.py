"""ClippedSGD against float64 arithmetic, against clipping and torch's own optimizer, and as everything that an optimizer has to be."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normclip
from normclip.optim import ClippedSGD
from normclip.rules import DescentLimit, Hard, Normalize, Rule, Smoothness, Soft
from normclip.thresholds import AutoClip
from support.optim import DTYPES, LAYOUTS, bits, by_decay, by_dtype, by_momentum, clip_and_run, parameters_of, run, set_gradients
from support.tensors import raw

RULES: list[Rule | float] = [0.3, math.inf, Soft(0.5), Normalize(0.7), Smoothness(2.0, 0.5, lr=0.1), DescentLimit(0.2)]


# ---- One step, and many ----


@given(
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    size=st.tuples(st.integers(0, 40), st.integers(1, 70)),
    rule=st.sampled_from(RULES),
    lr=st.floats(0.0, 2.0),
    momentum=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 1e-4, 0.5]),
    dampening=st.sampled_from([0.0, 0.25, 1.0]),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_steps_are_rounded_once(
    dtype: torch.dtype,
    layouts: Any,
    size: Any,
    rule: Any,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    dampening: float,
    maximize: bool,
    seed: int,
) -> None:
    parameters = parameters_of(dtype, layouts[0], seed, (size, (3, 3)))
    nesterov = nesterov and momentum > 0.0
    dampening = 0.0 if nesterov else dampening
    optimizer = ClippedSGD(parameters, lr, rule, momentum, nesterov, weight_decay, dampening=dampening, maximize=maximize)
    for step in range(3):
        set_gradients(parameters, seed + step)
        for parameter in parameters:
            parameter.grad = LAYOUTS[layouts[1]](parameter.grad)
        before = [parameter.detach().double().clone() for parameter in parameters]
        buffers = [optimizer.state[parameter].get("momentum_buffer", torch.zeros(())).double().clone() for parameter in parameters]
        gradients = [parameter.grad.double() for parameter in parameters]
        optimizer.step()
        norm = math.sqrt(math.fsum(x * x for gradient in gradients for x in gradient.flatten().tolist()))
        assert optimizer.last_norm == pytest.approx(norm, rel=1e-14)
        coefficient = optimizer.last_coefficient
        assert coefficient == pytest.approx(optimizer.rule.multiplier(norm), rel=1e-13)
        for parameter, x, v, g in zip(parameters, before, buffers, gradients, strict=True):
            d = (-coefficient if maximize else coefficient) * g + weight_decay * x
            v = momentum * v + (d if step == 0 else (1.0 - dampening) * d)
            direction = d + momentum * v if nesterov else v if momentum else d
            assert_rounded(parameter, x - lr * direction, x.abs() + lr * direction.abs() + lr * d.abs())
            if momentum:
                assert_rounded(optimizer.state[parameter]["momentum_buffer"], v, v.abs() + 2 * d.abs() + weight_decay * x.abs())


def assert_rounded(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Off by half a unit in the last place, and what the arithmetic before costs, in units of the largest terms."""
    limits = torch.finfo(found.dtype)
    work = 2.0**-24 if found.element_size() == 2 else 2.0**-53
    bound = 0.5 * limits.eps * exact.abs() + 8 * work * (terms + exact.abs()) + limits.smallest_normal * limits.eps
    assert bool(((found.double() - exact).abs() <= bound).all())


@by_dtype
@by_momentum
@by_decay
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_clipping_and_torchs_optimizer(
    dtype: torch.dtype, momentum: float, nesterov: bool, weight_decay: float, layout: str
) -> None:
    ours, theirs = parameters_of(dtype, layout), parameters_of(dtype, layout)
    settings = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    clipped, sgd = ClippedSGD(ours, rule=1.0, **settings), torch.optim.SGD(theirs, **settings)
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        clipped.step()
        norm = normclip.clip_grad_norm_(theirs, rule=1.0)
        sgd.step()
        assert clipped.last_norm == pytest.approx(norm.item(), rel=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule(rule: Rule | float) -> None:
    ours, theirs = parameters_of(torch.float64), parameters_of(torch.float64)
    clipped, sgd = ClippedSGD(ours, 0.1, rule, momentum=0.9), torch.optim.SGD(theirs, 0.1, momentum=0.9)
    run(clipped, range(4))
    clip_and_run(sgd, range(4), rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@by_dtype
def test_gradients_stay_as_they_are(dtype: torch.dtype) -> None:
    parameters = parameters_of(dtype)
    optimizer = ClippedSGD(parameters, 0.1, 0.01, momentum=0.9)
    set_gradients(parameters, 0)
    before = [(raw(parameter.grad), parameter.grad._version) for parameter in parameters]
    optimizer.step()
    assert [(raw(parameter.grad), parameter.grad._version) for parameter in parameters] == before


@by_dtype
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    found = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        parameters = parameters_of(dtype, sizes=((700, 900), (3, 5), (1, 65_537)))
        optimizer = ClippedSGD(parameters, 0.1, 1.0, momentum=0.9, nesterov=True, weight_decay=0.01)
        run(optimizer, range(4))
        found.append(bits(optimizer))
    assert all(others == found[0] for others in found)


def test_lazily_negated_gradients() -> None:
    real, imaginary = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    (torch.complex(real, imaginary).conj() * (1 + 2j)).imag.sum().backward()
    assert imaginary.grad.is_neg()
    ClippedSGD([real, imaginary], 1.0, math.inf).step()
    assert (real.item(), imaginary.item()) == (-1.0, 3.0)


def test_a_huge_norm_has_its_small_coefficient() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3e38, -1e38])
    ClippedSGD([parameter], 1.0, 1e-3).step()
    torch.testing.assert_close(parameter.data, torch.tensor([-3.0, 1.0]) * (1e-3 / math.sqrt(10.0)), rtol=1e-7, atol=0.0)


# ---- Norms that are not finite, and nothing to do ----


def test_not_finite() -> None:
    for value, expected in ((math.nan, [math.nan, math.nan]), (math.inf, [math.nan, 1.0])):
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.tensor([value, 2.0])
        optimizer = ClippedSGD([parameter], 0.1, 1.0)
        optimizer.step()
        np.testing.assert_array_equal(parameter.detach(), expected)
        assert not math.isfinite(optimizer.last_norm)


def test_parameters_without_gradients_are_passed_over() -> None:
    parameters = parameters_of(torch.float32)
    optimizer = ClippedSGD(parameters, 0.1, 1.0, momentum=0.9)
    before = bits(optimizer)
    assert (optimizer.last_norm, optimizer.last_coefficient) == (None, None)
    optimizer.step()
    assert (optimizer.last_norm, optimizer.last_coefficient) == (0.0, 1.0)
    assert bits(optimizer) == before
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.step()
    assert optimizer.last_norm == pytest.approx(math.sqrt(parameters[1].numel()), rel=1e-15)
    assert (raw(parameters[0]), list(optimizer.state)) == (before[0], [parameters[1]])


# ---- Everything that an optimizer has to be ----


def test_groups_have_their_own_settings_and_one_norm() -> None:
    ours, theirs = parameters_of(torch.float64), parameters_of(torch.float64)
    settings = [{"lr": 0.3, "momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}]
    groups = [[{"params": [parameter], **own} for parameter, own in zip(side, settings, strict=True)] for side in (ours, theirs)]
    clipped, sgd = ClippedSGD(groups[0], 0.1, 1.0), torch.optim.SGD(groups[1], 0.1)
    run(clipped, range(5))
    clip_and_run(sgd, range(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step)),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=12),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
def test_schedulers(name: str, lr: float | Tensor) -> None:
    ours, theirs = parameters_of(torch.float64), parameters_of(torch.float64)
    clipped, sgd = ClippedSGD(ours, copy.copy(lr), 1.0, momentum=0.9), torch.optim.SGD(theirs, float(lr), momentum=0.9)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (clipped, sgd)]
    for step in range(8):
        run(clipped, range(step, step + 1))
        clip_and_run(sgd, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@by_dtype
def test_checkpoints_resume_bit_for_bit(dtype: torch.dtype) -> None:
    def make() -> ClippedSGD:
        parameters = parameters_of(dtype, "transposed")
        groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3, "nesterov": True}]
        return ClippedSGD(groups, 0.1, 1.0, momentum=0.9)

    through = make()
    run(through, range(5))
    saved = io.BytesIO()
    torch.save({"optimizer": through.state_dict(), "parameters": [group["params"] for group in through.param_groups]}, saved)
    run(through, range(5, 9))

    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed = make()
    resumed.load_state_dict(loaded["optimizer"])
    with torch.no_grad():
        for group, values in zip(resumed.param_groups, loaded["parameters"], strict=True):
            torch._foreach_copy_(group["params"], values)
    run(resumed, range(5, 9))
    assert bits(resumed) == bits(through)


def test_torchs_checkpoints_can_be_loaded() -> None:
    ours, theirs = parameters_of(torch.float64), parameters_of(torch.float64)
    sgd = torch.optim.SGD(theirs, 0.1, momentum=0.9)
    run(sgd, range(3))
    optimizer = ClippedSGD(ours, 1.0, math.inf)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    with torch.no_grad():
        torch._foreach_copy_(ours, theirs)
    run(optimizer, range(3, 6))
    run(sgd, range(3, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: Callable[[ClippedSGD], ClippedSGD]) -> None:
    optimizer = ClippedSGD(parameters_of(torch.float32), 0.1, Soft(1.0), momentum=0.9)
    run(optimizer, range(3))
    other = copied(optimizer)
    assert (other.rule, other.last_norm, other.last_coefficient) == (Soft(1.0), optimizer.last_norm, optimizer.last_coefficient)
    for each in (optimizer, other):
        run(each, range(3, 5))
    assert bits(other) == bits(optimizer)


def test_a_model_learns_with_closures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = ClippedSGD(model.named_parameters(), 0.1, 1.0, momentum=0.9)
    x = torch.randn(64, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_rule_may_be_replaced() -> None:
    parameters = parameters_of(torch.float32)
    optimizer = ClippedSGD(parameters, 0.1, 1.0)
    assert optimizer.rule == Hard(1.0)
    run(optimizer, range(1))
    first = optimizer.last_coefficient
    optimizer.rule = Soft(1.0)
    run(optimizer, range(1))
    assert optimizer.last_coefficient < first


def test_rules_that_remember_note_each_step_once() -> None:
    parameters = parameters_of(torch.float32)
    rule = AutoClip(percentile=50)
    optimizer = ClippedSGD(parameters, 0.1, rule)
    norms = []
    for step in range(3):
        run(optimizer, range(step, step + 1))
        norms.append(optimizer.last_norm)
    parameters[0].grad = torch.eye(5, 9).to_sparse()
    with pytest.raises(TypeError):
        optimizer.step()
    assert rule.state_dict() == {"history": norms}


def test_version_counters_rise() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ClippedSGD([parameter], 0.1, 1.0, momentum=0.9)
    loss = parameter.square().sum()  # keeps the parameter for its backward
    parameter.grad = torch.ones(3)
    optimizer.step()
    buffer = optimizer.state[parameter]["momentum_buffer"]
    versions = parameter._version, buffer._version
    optimizer.step()
    assert (parameter._version, buffer._version) == (versions[0] + 1, versions[1] + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
