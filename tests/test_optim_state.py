"""What ClippedSGD saves, loads and refuses: checkpoints of torch.optim.SGD both ways, settings changed by hand, steps that fail."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from normclip._backends.choose import serving
from normclip._backends.protocol import Served
from normclip._backends.steps import DeviceStep
from normclip.optim import ClippedSGD
from normclip.rules import Rule, Soft
from normclip.thresholds import AdaGC, AutoClip, Threshold, ZClip
from support.optim import bits, by_decay, parameters_of, run, set_gradients
from support.training import by_clipping

SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "dampening": 1.0, "maximize": True},
    {"dampening": 0.5, "maximize": True},
    {"momentum": 0.5, "nesterov": True, "maximize": True},
]
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=repr)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the steps are taken: in Rust, or by torch operations as on a device."""
    with serving(Served(rust=(), triton=())) if request.param == "device" else nullcontext():
        yield


def itself(state: Any) -> Any:
    return state


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def handed_over(saved: torch.optim.Optimizer, to: torch.optim.Optimizer, through: Callable[[Any], Any] = itself) -> None:
    """Parameters and state."""
    with torch.no_grad():
        for group, other in zip(to.param_groups, saved.param_groups, strict=True):
            torch._foreach_copy_(group["params"], other["params"])
    to.load_state_dict(through(saved.state_dict()))


# ---- Checkpoints, both ways ----


@pytest.mark.parametrize("place", ["rust", "device"], indirect=True)
@by_settings
@by_decay
@pytest.mark.parametrize("through", [itself, through_a_file])
def test_either_goes_on_where_the_other_was(place: None, settings: dict[str, Any], weight_decay: float, through: Any) -> None:
    settings = {"lr": 0.1, "weight_decay": weight_decay, **settings}
    alone = torch.optim.SGD(parameters_of(torch.float64), **settings)
    run(alone, range(9))

    first = torch.optim.SGD(parameters_of(torch.float64), **settings)
    run(first, range(3))
    ours = ClippedSGD(parameters_of(torch.float64, seed=1), 1.0, math.inf)  # of other settings until it has loaded
    handed_over(first, ours, through)
    run(ours, range(3, 6))
    last = torch.optim.SGD(parameters_of(torch.float64, seed=2), 1.0)
    handed_over(ours, last, through)
    run(last, range(6, 9))
    for x, y in zip(last.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)
    assert last.state_dict()["param_groups"] == alone.state_dict()["param_groups"]


def test_the_format_is_torchs() -> None:
    ours, theirs = ClippedSGD(parameters_of(torch.float32), 0.1, 1.0, momentum=0.9), torch.optim.SGD(parameters_of(torch.float32), 0.1)
    assert list(ours.state_dict()["param_groups"][0]) == list(theirs.state_dict()["param_groups"][0])
    run(ours, range(1))
    assert [list(state) for state in ours.state_dict()["state"].values()] == [["momentum_buffer"]] * 2


@by_settings
def test_a_first_step_in_torch_and_here(settings: dict[str, Any]) -> None:
    ours, theirs = parameters_of(torch.float64), parameters_of(torch.float64)
    run(ClippedSGD(ours, 0.1, math.inf, **settings), range(1))
    run(torch.optim.SGD(theirs, 0.1, **settings), range(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=1e-15)


def test_settings_of_torch_that_have_no_effect_are_kept() -> None:
    state = torch.optim.SGD(parameters_of(torch.float32), 0.1, fused=True).state_dict()
    optimizer = ClippedSGD(parameters_of(torch.float32), 0.5, 1.0)
    optimizer.load_state_dict(state)
    run(optimizer, range(1))
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]


def test_states_without_later_settings() -> None:
    """As normclip 0.1.0 and old versions of torch have saved them."""
    optimizer = ClippedSGD(parameters_of(torch.float32), 0.5, 1.0, momentum=0.9, dampening=0.5, maximize=True)
    state = optimizer.state_dict()
    for name in ("dampening", "maximize", "foreach", "differentiable", "fused"):
        del state["param_groups"][0][name]
    state["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert (group["dampening"], group["maximize"], group["foreach"]) == (0.0, False, None)
    run(optimizer, range(1))


# ---- What is refused when it is loaded ----


def _with(**settings: Any) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["param_groups"][1].update(settings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with(lr=-1.0), r"param_groups\[1\]: lr is -1.0"),
        (_with(lr=math.nan), r"param_groups\[1\]: lr is nan"),
        (_with(lr=math.inf), r"param_groups\[1\]: lr is inf"),
        (_with(lr=torch.tensor(-1.0)), r"param_groups\[1\]: lr is -1.0"),
        (_with(lr=torch.ones(2)), r"param_groups\[1\]: "),
        (_with(lr="fast"), r"param_groups\[1\]: "),
        (_with(lr=None), r"param_groups\[1\]: "),
        (_with(momentum=-0.1), r"param_groups\[1\]: momentum is -0.1"),
        (_with(dampening="0.5"), r"param_groups\[1\]: dampening is '0.5': pass a number"),
        (_with(dampening=None), r"param_groups\[1\]: dampening is a NoneType: pass a number"),
        (_with(dampening=math.nan), r"param_groups\[1\]: dampening is nan"),
        (_with(weight_decay=math.inf), r"param_groups\[1\]: weight_decay is inf"),
        (_with(momentum=0.0, nesterov=True), r"param_groups\[1\]: nesterov needs a momentum above 0"),
        (_with(dampening=0.5, nesterov=True), r"param_groups\[1\]: nesterov needs .* a dampening of 0"),
        (_with(maximize="no"), r"param_groups\[1\]: maximize is 'no'"),
        (_with(differentiable=True), r"param_groups\[1\]: differentiable is True: .* torch.optim.SGD"),
        (lambda state: state["param_groups"][1].pop("momentum"), r"param_groups\[1\]: there is no momentum"),
        (lambda state: state["state"][1].update(exp_avg=torch.ones(3)), r"has \['exp_avg', 'momentum_buffer'\]: load that of ClippedSGD"),
        (lambda state: state["state"][1].update(momentum_buffer=torch.ones(3)), r"of shape \(40, 33\) has another shape"),
        (lambda state: state["state"][1].update(momentum_buffer=1.0), r"of shape \(40, 33\) has another shape"),
    ],
)
def test_bad_states_change_nothing(spoil: Callable[[dict[str, Any]], object], message: str) -> None:
    first, second = parameters_of(torch.float32)
    optimizer = ClippedSGD([{"params": [first]}, {"params": [second]}], 0.1, 1.0, momentum=0.9)
    run(optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    state["param_groups"][0]["lr"] = 0.7
    before, groups = bits(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert bits(optimizer) == before
    assert optimizer.state_dict()["param_groups"] == groups
    run(optimizer, range(1))


def test_adams_state_is_refused() -> None:
    parameters = parameters_of(torch.float32)
    for steps in (0, 1):
        adam = torch.optim.Adam(parameters, 0.1)
        run(adam, range(steps))
        with pytest.raises(ValueError, match="there is no momentum"):
            ClippedSGD(parameters_of(torch.float32), 0.1, 1.0).load_state_dict(adam.state_dict())


def test_pickles_are_checked_too() -> None:
    optimizer = ClippedSGD(parameters_of(torch.float32), 0.1, Soft(1.0), momentum=0.9, dampening=0.5, maximize=True)
    run(optimizer, range(2))
    other = pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, other):
        run(each, range(2, 4))
    assert bits(other) == bits(optimizer)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr is -1\.0"):
        copy.deepcopy(optimizer)


# ---- Steps that fail have done nothing ----


class Refuses(Rule):
    """A rule that cannot tell."""

    def coefficient(self, norm: Any) -> Any:
        raise ArithmeticError("no rule")

    multiplier = coefficient


@pytest.mark.parametrize("place", ["rust", "device"], indirect=True)
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda optimizer: optimizer.param_groups[0].update(lr=-1.0), ValueError, r"param_groups\[0\]: lr is -1.0"),
        (lambda optimizer: optimizer.param_groups[0].update(lr=torch.tensor(math.nan)), ValueError, r"param_groups\[0\]: lr is nan"),
        (lambda optimizer: optimizer.param_groups[0].update(nesterov=True), ValueError, r"param_groups\[0\]: nesterov needs"),
        (lambda optimizer: setattr(optimizer, "rule", Refuses()), ArithmeticError, "no rule"),
    ],
    ids=["negative", "NaN", "nesterov", "rule"],
)
def test_a_step_that_is_refused(place: None, spoil: Any, error: type[Exception], message: str) -> None:
    optimizer = ClippedSGD(parameters_of(torch.float32), 0.1, AutoClip(), momentum=0.9, dampening=0.5)
    run(optimizer, range(2))
    rule, noted, norm = optimizer.rule, optimizer.rule.state_dict(), optimizer.last_norm
    spoil(optimizer)
    before = bits(optimizer)
    with pytest.raises(error, match=message):
        run(optimizer, range(2, 3))
    assert (bits(optimizer), rule.state_dict(), optimizer.last_norm) == (before, noted, norm)


class WriteError(Exception):
    """What a write fails with, once all was checked."""


@pytest.mark.parametrize("make", [lambda: AutoClip(10), lambda: ZClip(warmup=2)])
def test_a_step_that_fails_has_noted_nothing(make: Callable[[], Threshold], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DeviceStep, coefficient: Any, settings: Any) -> NoReturn:
        raise WriteError

    optimizer = ClippedSGD(parameters_of(torch.float32), 0.1, make(), momentum=0.9)
    run(optimizer, range(3))
    noted, limit, norm = optimizer.rule.state_dict(), optimizer.rule.last_limit, optimizer.last_norm
    monkeypatch.setattr(DeviceStep, "step_", fail)
    optimizer.state.clear()
    with serving(Served(rust=(), triton=())), pytest.raises(WriteError):
        run(optimizer, range(3, 4))
    assert (optimizer.rule.state_dict(), optimizer.rule.last_limit, optimizer.last_norm) == (noted, limit, norm)
    assert not optimizer.state


@pytest.mark.parametrize("make", [lambda: AutoClip(10), lambda: ZClip(warmup=2)])
def test_a_step_of_zeros_teaches_a_threshold_nothing(make: Callable[[], Threshold]) -> None:
    """Such as the one that torch.distributed.checkpoint takes to have states made."""
    parameters = parameters_of(torch.float32)
    optimizer = ClippedSGD(parameters, 0.1, make(), momentum=0.9)
    noted = copy.deepcopy(optimizer.rule.state_dict())
    get_optimizer_state_dict(nn.ParameterList(parameters), optimizer)
    assert (optimizer.last_norm, optimizer.last_coefficient) == (0.0, 1.0)
    assert optimizer.state[parameters[0]]["momentum_buffer"].shape == parameters[0].shape
    assert optimizer.rule.state_dict() == noted


@by_clipping
def test_clipping_that_fails_has_noted_nothing(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensors: Any) -> None:
        if tensors:
            raise WriteError

    rule, adagc, (weight,) = AutoClip(10), AdaGC(warmup=1), parameters_of(torch.float32, sizes=((3, 3),))
    for seed in range(2):
        set_gradients([weight], seed)
        clip(weight, rule)
        adagc.clip_([weight])
    noted, limit, norms = rule.state_dict(), rule.last_limit, adagc.state_dict()
    for module in ("clip", "clip_grads", "thresholds.adagc"):
        monkeypatch.setattr(f"normclip.{module}.mark_written", broken)
    assert isinstance(weight, nn.Parameter)
    weight.grad = 100.0 * torch.ones(3, 3)
    with pytest.raises(WriteError):
        clip(weight, rule)
    with pytest.raises(WriteError):
        adagc.clip_([weight])
    assert (rule.state_dict(), rule.last_limit, adagc.state_dict()) == (noted, limit, norms)
