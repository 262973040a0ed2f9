"""ClippedAdamW against float64 arithmetic, against clipping and torch's own optimizer, and its checkpoints, both ways."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from normclip._backends.choose import serving
from normclip._backends.protocol import Served
from normclip.optim import ClippedAdamW
from normclip.rules import Rule, Soft
from normclip.thresholds import AutoClip
from support.optim import DTYPES, LAYOUTS, bits, by_dtype, clip_and_run, parameters, parameters_of, run, set_gradients
from support.tensors import raw

SETTINGS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"weight_decay": 0.0, "maximize": True},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.5},
]
by_settings = pytest.mark.parametrize("settings", SETTINGS, ids=repr)


@pytest.fixture(params=["rust", "device"])
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the steps are taken: in Rust, or by torch operations as on a device."""
    with serving(Served(rust=(), triton=())) if request.param == "device" else nullcontext():
        yield


def pair(dtype: torch.dtype, layout: str = "contiguous", **settings: Any) -> tuple[ClippedAdamW, torch.optim.AdamW]:
    """Ours, clipping to 1, and torch's, of the same parameters."""
    settings = {"lr": 0.01, **settings}
    return ClippedAdamW(parameters_of(dtype, layout), rule=1.0, **settings), torch.optim.AdamW(parameters_of(dtype, layout), **settings)


# ---- One step, and many ----


@given(
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    rule=st.sampled_from([0.3, math.inf, Soft(0.5)]),
    lr=st.floats(0.0, 2.0),
    betas=st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.99, 0.999])),
    eps=st.sampled_from([1e-8, 0.1]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_steps_are_rounded_once(
    dtype: torch.dtype, layouts: Any, rule: Any, lr: float, betas: Any, eps: float, weight_decay: float, amsgrad: bool, maximize: bool,
    wide: bool, seed: int,
) -> None:  # fmt: skip
    models = parameters_of(dtype, layouts[0], seed, ((7, 9), (3, 3)))
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
    optimizer = ClippedAdamW(models, rule=rule, maximize=maximize, state_dtype=torch.float32 if wide else None, **settings)
    for step in range(1, 4):
        set_gradients(models, seed + step)
        for model in models:
            model.grad = LAYOUTS[layouts[1]](model.grad)
        zero = torch.zeros((), dtype=torch.float64)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        before = [
            [model.detach().double().clone()] + [optimizer.state[model].get(name, zero).double().clone() for name in names]
            for model in models
        ]
        optimizer.step()
        coefficient = -optimizer.last_coefficient if maximize else optimizer.last_coefficient
        for model, (x, m, v, largest) in zip(models, before, strict=True):
            state = optimizer.state[model]
            assert state["step"].item() == step
            g = coefficient * model.grad.double()
            m = betas[0] * m + (1.0 - betas[0]) * g
            v = betas[1] * v + (1.0 - betas[1]) * g * g
            largest = torch.maximum(largest, v)
            first, second = (float(1 - Fraction(beta) ** step) for beta in betas)
            u = m / first / (((largest if amsgrad else v) / second).sqrt() + eps)
            assert_rounded(state["exp_avg"], m, g.abs() + m.abs())
            assert_rounded(state["exp_avg_sq"], v, v)
            if amsgrad:
                assert_rounded(state["max_exp_avg_sq"], largest, largest)
            # The numerator of u may cancel.
            terms = u.abs() * (g.abs() + m.abs()) / m.abs().clamp_min(1e-30)
            assert_rounded(model, (1.0 - lr * weight_decay) * x - lr * u, (1.0 + lr * weight_decay) * x.abs() + lr * terms)
            assert state["exp_avg"].dtype == (torch.float32 if wide and dtype.itemsize == 2 else dtype)


def assert_rounded(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Off by half a unit in the last place, and what the arithmetic before costs, in units of the largest terms."""
    limits = torch.finfo(found.dtype)
    work = 2.0**-53 if found.dtype == torch.float64 else 2.0**-24
    bound = 0.5 * limits.eps * exact.abs() + 24 * work * (terms + exact.abs()) + limits.smallest_normal * limits.eps
    assert bool(((found.double() - exact).abs() <= bound).all())


@by_dtype
@by_settings
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_clipping_and_torchs_optimizer(place: None, dtype: torch.dtype, settings: dict[str, Any], layout: str) -> None:
    if dtype == torch.float16 and "eps" not in settings:
        pytest.skip("averages of squares are subnormal or 0 in float16, and 0/0 depends on where they are rounded")
    ours, theirs = pair(dtype, layout, **settings)
    run(ours, range(6))
    clip_and_run(theirs, range(6))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=16 * eps, atol=16 * eps)


def test_a_thousand_steps_of_torchs_fused_optimizer() -> None:
    ours = ClippedAdamW(parameters_of(torch.float32), 1e-3, rule=math.inf)
    theirs = torch.optim.AdamW(parameters_of(torch.float32), 1e-3, fused=True)
    run(ours, range(1000))
    run(theirs, range(1000))
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_torch_operations_do_the_same(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    device, rust = (
        ClippedAdamW(parameters_of(dtype, "transposed"), 0.01, rule=Soft(1.0), amsgrad=True, state_dtype=state_dtype) for _ in range(2)
    )
    with serving(Served(rust=(), triton=())):
        run(device, range(5))
    run(rust, range(5))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(parameters(device), parameters(rust), rtol=2 * eps, atol=2 * eps)
    assert float(device.last_norm) == pytest.approx(rust.last_norm, rel=1e-12)


@by_dtype
@pytest.mark.parametrize("amsgrad", [False, True])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, amsgrad: bool, set_threads: Callable[[int], None]) -> None:
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        optimizer = ClippedAdamW(
            parameters_of(dtype, sizes=((700, 900), (3, 5), (1, 65_537))), 0.1, rule=1.0, amsgrad=amsgrad, descent_limit=1.0
        )
        run(optimizer, range(2))
        found.append((bits(optimizer), optimizer.last_descent))
    assert all(others == found[0] for others in found)


@by_dtype
def test_gradients_stay_as_they_are(dtype: torch.dtype) -> None:
    optimizer = ClippedAdamW(parameters_of(dtype), rule=0.01)
    set_gradients(parameters(optimizer), 0)
    before = [(raw(parameter.grad), parameter.grad._version) for parameter in parameters(optimizer)]
    optimizer.step()
    assert [(raw(parameter.grad), parameter.grad._version) for parameter in parameters(optimizer)] == before


def test_not_finite() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([math.nan, 2.0])
    optimizer = ClippedAdamW([parameter], rule=1.0)
    optimizer.step()
    np.testing.assert_array_equal(parameter.detach(), [math.nan, math.nan])
    assert math.isnan(optimizer.last_norm)


def test_version_counters_rise() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ClippedAdamW([parameter], rule=1.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    tensors = [parameter, *optimizer.state[parameter].values()]
    versions = [tensor._version for tensor in tensors]
    optimizer.step()
    assert [tensor._version for tensor in tensors] == [version + 1 for version in versions]


# ---- Everything that an optimizer has to be ----


def test_groups_have_their_own_settings_and_one_norm() -> None:
    own = [{"lr": 0.3, "betas": (0.5, 0.5), "amsgrad": True}, {"weight_decay": 0.1, "eps": 0.1}]
    groups = [[{"params": [p], **settings} for p, settings in zip(parameters_of(torch.float64), own, strict=True)] for _ in range(2)]
    ours, theirs = ClippedAdamW(groups[0], 0.1, rule=1.0), torch.optim.AdamW(groups[1], 0.1)
    run(ours, range(5))
    clip_and_run(theirs, range(5))
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
def test_schedulers(lr: float | Tensor) -> None:
    ours, theirs = pair(torch.float64)
    for group in ours.param_groups:
        group["lr"] = copy.copy(lr)
    for group in theirs.param_groups:
        group["lr"] = 0.1
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.5, total_steps=12) for each in (ours, theirs)]
    for step in range(8):
        run(ours, range(step, step + 1))
        clip_and_run(theirs, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-11, atol=1e-12)


def test_a_model_learns_with_closures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = ClippedAdamW(model.named_parameters(), 0.03, rule=1.0)
    x = torch.randn(64, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: Callable[[ClippedAdamW], ClippedAdamW]) -> None:
    optimizer = ClippedAdamW(
        parameters_of(torch.bfloat16), 0.1, rule=Soft(1.0), amsgrad=True, state_dtype=torch.float32, descent_limit=2.0, update_rms_limit=0.5
    )
    run(optimizer, range(3))
    other = copied(optimizer)
    assert vars(other).keys() >= {"rule", "state_dtype", "descent_limit", "update_rms_limit", "last_descent"}
    for each in (optimizer, other):
        run(each, range(3, 5))
    assert bits(other) == bits(optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"eps": math.nan}, "eps is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"betas": 0.9}, "betas is 0.9: pass two numbers"),
        ({"amsgrad": "yes"}, "amsgrad is 'yes'"),
        ({"rule": -1.0}, "rule is -1.0"),
        ({"state_dtype": torch.float64}, "state_dtype is torch.float64"),
        ({"descent_limit": 0.0}, "descent_limit is 0.0"),
        ({"update_rms_limit": math.inf}, "update_rms_limit is inf"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClippedAdamW(parameters_of(torch.float32), **{"rule": 1.0, **settings})


# ---- Checkpoints, both ways ----


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def handed_over(saved: torch.optim.Optimizer, to: torch.optim.Optimizer, through: Callable[[Any], Any]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(parameters(to), parameters(saved))
    to.load_state_dict(through(saved.state_dict()))


@by_settings
@pytest.mark.parametrize("through", [copy.deepcopy, through_a_file])
def test_either_goes_on_where_the_other_was(place: None, settings: dict[str, Any], through: Any) -> None:
    alone = torch.optim.AdamW(parameters_of(torch.float64), 0.01, **settings)
    run(alone, range(9))
    first = torch.optim.AdamW(parameters_of(torch.float64), 0.01, **settings)
    run(first, range(3))
    ours = ClippedAdamW(parameters_of(torch.float64, seed=1), 1.0, rule=math.inf)  # of other settings until it has loaded
    handed_over(first, ours, through)
    run(ours, range(3, 6))
    last = torch.optim.AdamW(parameters_of(torch.float64, seed=2), 1.0)
    handed_over(ours, last, through)
    run(last, range(6, 9))
    torch.testing.assert_close(parameters(last), parameters(alone), rtol=1e-12, atol=1e-13)
    assert last.state_dict()["param_groups"] == alone.state_dict()["param_groups"]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_format_is_torchs(amsgrad: bool) -> None:
    ours, theirs = pair(torch.float32, amsgrad=amsgrad)
    run(ours, range(1))
    run(theirs, range(1))
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    kind = [{name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} for state in found["state"].values()]
    assert kind == [{name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} for state in expected["state"].values()]
    assert [list(state) for state in found["state"].values()] == [list(state) for state in expected["state"].values()]


def test_float32_states_are_loaded_with_all_digits() -> None:
    def make() -> ClippedAdamW:
        return ClippedAdamW(parameters_of(torch.bfloat16), rule=1.0, state_dtype=torch.float32)

    through, resumed = make(), make()
    run(through, range(4))
    handed_over(through, resumed, through_a_file)
    for each in (through, resumed):
        run(each, range(4, 8))
    assert bits(resumed) == bits(through)
    theirs = torch.optim.AdamW(parameters_of(torch.bfloat16))
    run(theirs, range(2))
    handed_over(theirs, resumed, copy.deepcopy)
    assert {state["exp_avg"].dtype for state in resumed.state.values()} == {torch.float32}
    run(resumed, range(1))


def test_amsgrad_may_be_switched_on() -> None:
    optimizer = ClippedAdamW(parameters_of(torch.float32), rule=1.0)
    run(optimizer, range(2))
    optimizer.param_groups[0]["amsgrad"] = True
    run(optimizer, range(2, 3))
    for state in optimizer.state.values():
        assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("steps", [3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.bfloat16)])
def test_steps_that_are_other_numbers(steps: Any) -> None:
    ours, other = (ClippedAdamW(parameters_of(torch.float32), rule=1.0) for _ in range(2))
    run(ours, range(3))
    state = copy.deepcopy(ours.state_dict())
    for each in state["state"].values():
        each["step"] = steps
    handed_over(ours, other, lambda _: state)
    for each in (ours, other):
        run(each, range(3, 4))
    assert bits(other) == bits(ours)


def test_states_of_other_optimizers_are_refused() -> None:
    for theirs, message in (
        (torch.optim.SGD(parameters_of(torch.float32), 0.1, momentum=0.9), "there is no betas"),
        (torch.optim.Adam(parameters_of(torch.float32)), "If its weight_decay is 0, set decoupled_weight_decay to True"),
        (torch.optim.NAdam(parameters_of(torch.float32)), "decoupled_weight_decay is False|has "),
    ):
        run(theirs, range(1))
        ours = ClippedAdamW(parameters_of(torch.float32), rule=1.0)
        run(ours, range(1))
        before = bits(ours)
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(theirs.state_dict())
        assert bits(ours) == before


def test_a_state_without_its_number_of_steps_changes_nothing() -> None:
    optimizer = ClippedAdamW(parameters_of(torch.float32), rule=1.0)
    run(optimizer, range(2))
    before, state = bits(optimizer), copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"].zero_()
    state["state"][1]["step"] = None
    with pytest.raises(ValueError, match="the step of a parameter"):
        optimizer.load_state_dict(state)
    assert bits(optimizer) == before


@pytest.mark.parametrize("steps", [torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(1.5), torch.tensor([1.0, 2.0])])
def test_a_wrong_number_of_steps_is_refused(steps: Tensor) -> None:
    optimizer = ClippedAdamW(parameters_of(torch.float32), rule=AutoClip())
    run(optimizer, range(2))
    optimizer.state[parameters(optimizer)[1]]["step"] = steps
    before = bits(optimizer)
    with pytest.raises((ValueError, TypeError), match=r"the step of param_groups\[0\]\['params'\]\[1\]"):
        run(optimizer, range(2, 3))
    assert bits(optimizer) == before


class Refuses(Rule):
    """A rule that cannot tell."""

    def coefficient(self, norm: Any) -> Any:
        raise ArithmeticError("no rule")

    multiplier = coefficient


def test_a_first_step_that_fails_leaves_no_states(place: None) -> None:
    optimizer = ClippedAdamW(parameters_of(torch.float32), rule=Refuses())
    before = bits(optimizer)
    with pytest.raises(ArithmeticError):
        run(optimizer, range(1))
    assert bits(optimizer) == before
    assert not optimizer.state
