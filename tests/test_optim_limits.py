"""Limits on the update, of our optimizers and of any, and steps within torch.amp.GradScaler."""

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normclip._backends.choose import serving
from normclip._backends.protocol import Served
from normclip.optim import ClippedAdamW, ClippedSGD, limited
from normclip.rules import Soft
from normclip.thresholds import AutoClip
from support.optim import bits, by_dtype, parameters, parameters_of, run, set_gradients

MAKERS: dict[str, Any] = {
    "SGD": lambda parameters, **more: ClippedSGD(parameters, **{"lr": 0.1, "rule": 1.0, **more}),
    "Nesterov": lambda parameters, **more: ClippedSGD(parameters, **{"lr": 0.1, "rule": 1.0, **more}, momentum=0.9, nesterov=True),
    "AdamW": lambda parameters, **more: ClippedAdamW(parameters, **{"lr": 0.1, "rule": 1.0, "weight_decay": 0.0, **more}),
    "AMSGrad": lambda parameters, **more: ClippedAdamW(parameters, **{"lr": 0.1, "rule": 1.0, **more}, weight_decay=0.0, amsgrad=True),
}
by_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


@pytest.fixture(params=["rust", "device"])
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the steps are taken: in Rust, or by torch operations as on a device."""
    with serving(Served(rust=(), triton=())) if request.param == "device" else nullcontext():
        yield


def next_direction(optimizer: Any, seed: int) -> list[Tensor]:
    """u of the step with these gradients, from a copy that takes it without limits."""
    twin = copy.deepcopy(optimizer)
    twin.descent_limit = twin.update_rms_limit = None
    before = [parameter.detach().clone() for parameter in parameters(twin)]
    run(twin, range(seed, seed + 1))
    return [(old - new.detach()) / optimizer.param_groups[0]["lr"] for old, new in zip(before, parameters(twin), strict=True)]


@by_maker
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("descent_limit", "update_rms_limit"), [(0.01, None), (1e6, None), (None, 0.01), (0.002, 0.02)])
def test_steps_are_shortened_by_what_they_would_do(
    place: None, make: Any, maximize: bool, descent_limit: float | None, update_rms_limit: float | None
) -> None:
    optimizer = make(parameters_of(torch.float64), maximize=maximize, descent_limit=descent_limit, update_rms_limit=update_rms_limit)
    for step in range(4):
        directions = next_direction(optimizer, step)
        before = [parameter.detach().clone() for parameter in parameters(optimizer)]
        run(optimizer, range(step, step + 1))
        rms = [u.square().mean().sqrt().item() for u in directions]
        assert optimizer.last_update_rms == pytest.approx(rms, rel=1e-9)
        paces = [1.0 if update_rms_limit is None else 1.0 / max(1.0, size / update_rms_limit) for size in rms]
        sign = -1.0 if maximize else 1.0
        pairs = zip(paces, directions, parameters(optimizer), strict=True)
        descent = sum(sign * pace * (u * parameter.grad).sum().item() for pace, u, parameter in pairs)
        assert optimizer.last_descent == pytest.approx(descent, rel=1e-9)
        pace = min(1.0, descent_limit / descent) if descent_limit is not None and descent > 0.0 else 1.0
        for parameter, x, u, own in zip(parameters(optimizer), before, directions, paces, strict=True):
            torch.testing.assert_close(parameter.detach(), x - 0.1 * own * pace * u, rtol=1e-9, atol=1e-12)


def test_weight_decay_of_adamw_goes_with_the_learning_rate() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    ClippedAdamW([parameter], 0.5, rule=1.0, weight_decay=0.5, update_rms_limit=0.25).step()
    assert parameter.item() == pytest.approx((1.0 - 0.125 * 0.5) - 0.125, rel=1e-6)


def test_a_step_that_would_ascend_is_not_limited() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = ClippedSGD([parameter], 1.0, math.inf, momentum=0.9, descent_limit=0.1)
    parameter.grad = torch.tensor([10.0])
    optimizer.step()
    parameter.grad = torch.tensor([-1.0])
    before = parameter.item()
    optimizer.step()
    assert optimizer.last_descent == pytest.approx(-8.0)
    assert parameter.item() == pytest.approx(before - 8.0, rel=1e-6)


def test_limits_may_be_set_and_lifted() -> None:
    optimizer = ClippedAdamW(parameters_of(torch.float32), rule=1.0)
    run(optimizer, range(1))
    assert optimizer.last_descent is None
    optimizer.descent_limit = -1.0
    before = bits(optimizer)
    with pytest.raises(ValueError, match=r"descent_limit is -1\.0"):
        run(optimizer, range(1, 2))
    assert bits(optimizer) == before
    optimizer.descent_limit = 1.0
    run(optimizer, range(1, 2))
    assert optimizer.last_descent > 0.0


# ---- Any optimizer ----

OTHERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "Nesterov": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.1, weight_decay=0.0),
    "AMSGrad": lambda parameters: torch.optim.AdamW(parameters, 0.1, weight_decay=0.0, amsgrad=True),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("descent_limit", [0.05, 1e6])
def test_any_optimizer_is_limited_as_ours(name: str, descent_limit: float) -> None:
    theirs = limited(OTHERS[name](parameters_of(torch.float64)), descent_limit=descent_limit)
    ours = MAKERS[name](parameters_of(torch.float64), rule=math.inf, descent_limit=descent_limit)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (ours, theirs)]
    for step in range(5):
        for each in (ours, theirs):
            run(each, range(step, step + 1))
        assert theirs.last_descent == pytest.approx(ours.last_descent, rel=1e-9)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(parameters(theirs), parameters(ours), rtol=1e-9, atol=1e-11)
    assert theirs.state_dict().keys() == OTHERS[name](parameters_of(torch.float64)).state_dict().keys()


def test_limited_steps_with_closures_and_without_gradients() -> None:
    first, second = parameters_of(torch.float64)
    optimizer = limited(torch.optim.SGD([first, second], 0.1), descent_limit=1.0)
    before = second.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = first.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0.0
    assert optimizer.last_descent == pytest.approx(first.grad.square().sum().item())
    assert torch.equal(second, before)


def test_a_parameter_that_is_listed_twice_is_shortened_once() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = limited(torch.optim.SGD([parameter, parameter], 1.0), descent_limit=25.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()  # torch takes its step twice
    assert optimizer.last_descent == pytest.approx(50.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-3.0, -4.0]))


def test_sparse_gradients_are_limited_as_dense_ones() -> None:
    models = [nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, sparse=sparse) for sparse in (True, False)]
    optimizers = [limited(torch.optim.SGD(model.parameters(), 1.0), descent_limit=1.0) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.tensor([1, 2, 1])).sum().backward()
        optimizer.step()
    assert optimizers[0].last_descent == optimizers[1].last_descent == pytest.approx(15.0)
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_nothing_to_limit() -> None:
    optimizer = limited(torch.optim.SGD(parameters_of(torch.float32), 0.1), descent_limit=1.0)
    optimizer.step()
    assert repr(optimizer.last_descent) == "0.0"


def test_what_cannot_be_limited() -> None:
    with pytest.raises(TypeError, match="LBFGS"):
        limited(torch.optim.LBFGS(parameters_of(torch.float32)), descent_limit=1.0)
    with pytest.raises(TypeError, match="pass an optimizer of torch"):
        limited(1.0, descent_limit=1.0)
    with pytest.raises(ValueError, match=r"descent_limit is 0\.0"):
        limited(torch.optim.SGD(parameters_of(torch.float32), 0.1), descent_limit=0.0)


# ---- GradScaler ----


def scaled_pair(make: Any, dtype: torch.dtype, scale: float) -> tuple[Any, Any, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.ones(()))  # makes the scale
    return make(parameters_of(dtype)), make(parameters_of(dtype)), scaler


@by_maker
@by_dtype
def test_scaled_gradients_are_unscaled_in_the_step(place: None, make: Any, dtype: torch.dtype) -> None:
    scaled, plain, scaler = scaled_pair(make, dtype, 64.0)
    for optimizer in (scaled, plain):
        optimizer.rule = Soft(1.0)
    for step in range(3):
        run(plain, range(step, step + 1))
        set_gradients(parameters(scaled), step)
        for parameter in parameters(scaled):
            parameter.grad = 64.0 * parameter.grad
        before = [parameter.grad.clone() for parameter in parameters(scaled)]
        scaler.step(scaled)
        scaler.update()
        assert all(torch.equal(parameter.grad, old) for parameter, old in zip(parameters(scaled), before, strict=True))
        assert float(scaled.last_norm) == pytest.approx(float(plain.last_norm), rel=1e-12)
        assert float(scaled.last_coefficient) == pytest.approx(float(plain.last_coefficient), rel=1e-12)
    assert scaler.get_scale() == 64.0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(parameters(scaled), parameters(plain), rtol=4 * eps, atol=4 * eps)


@by_maker
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(place: None, make: Any, value: float) -> None:
    optimizer, _, scaler = scaled_pair(make, torch.float32, 64.0)
    rule = optimizer.rule = AutoClip()
    for _ in range(2):
        set_gradients(parameters(optimizer), 0)
        scaler.step(optimizer)
        scaler.update()
    before, noted = bits(optimizer), rule.state_dict()
    parameters(optimizer)[1].grad[3, 3] = value
    scaler.step(optimizer)
    scaler.update()
    assert (bits(optimizer), rule.state_dict()) == (before, noted)
    assert scaler.get_scale() == 32.0
    assert not math.isfinite(float(optimizer.last_norm))
    assert float(optimizer.last_coefficient) == 0.0
    optimizer.step()  # without the scaler nothing is skipped
    assert bits(optimizer) != before


@by_maker
def test_gradients_may_be_unscaled_before(make: Any) -> None:
    scaled, plain, scaler = scaled_pair(make, torch.float32, 64.0)
    run(plain, range(1))
    set_gradients(parameters(scaled), 0)
    for parameter in parameters(scaled):
        parameter.grad = 64.0 * parameter.grad
    scaler.unscale_(scaled)
    scaler.step(scaled)
    assert bits(scaled) == bits(plain)


def test_limits_are_of_unscaled_gradients() -> None:
    for make in (MAKERS["SGD"], MAKERS["AdamW"]):
        scaled, plain, scaler = scaled_pair(lambda listed, make=make: make(listed, descent_limit=0.01), torch.float64, 64.0)
        run(plain, range(1))
        set_gradients(parameters(scaled), 0)
        for parameter in parameters(scaled):
            parameter.grad = 64.0 * parameter.grad
        scaler.step(scaled)
        assert scaled.last_descent == pytest.approx(plain.last_descent, rel=1e-12)
        torch.testing.assert_close(parameters(scaled), parameters(plain), rtol=1e-12, atol=1e-14)


def test_limited_refuses_scaled_gradients() -> None:
    optimizer = limited(torch.optim.AdamW(parameters_of(torch.float32), fused=True), descent_limit=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    set_gradients(parameters(optimizer), 0)
    with pytest.raises(ValueError, match="unscale_"):
        scaler.step(optimizer)
