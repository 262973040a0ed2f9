"""Policies that remember: their formulas, what they note and what not, and that they go on where they were saved."""

import copy
import doctest
import importlib
import io
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normclip
from normclip.optim import ClippedSGD
from normclip.rules import Hard
from normclip.thresholds import AGC, AdaGC, AutoClip, Threshold, ZClip
from support.training import by_clipping

NORMS = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60)


@pytest.mark.parametrize("name", ["", ".adagc", ".agc", ".autoclip", ".zclip"])
def test_doctests(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(f"normclip.thresholds{name}"))
    assert failed == 0
    assert attempted > 0


# ---- AutoClip ----


def test_the_percentile_of_four() -> None:
    rule = AutoClip(10)
    assert [rule.observe(norm) for norm in (1.0, 2.0, 3.0, 4.0)] == pytest.approx([1.0, 1.1, 1.2, 1.3], rel=1e-15)
    assert rule.observe(4.0) == pytest.approx(np.percentile([1.0, 2.0, 3.0, 4.0, 4.0], 10))


@given(NORMS, st.floats(0.0, 100.0))
def test_autoclip_is_numpys_percentile(norms: list[float], percentile: float) -> None:
    rule = AutoClip(percentile)
    for count, norm in enumerate(norms, 1):
        told = rule.threshold(norm)
        assert told == rule.observe(norm) == pytest.approx(np.percentile(norms[:count], percentile), rel=1e-12, abs=1e-300)
        assert min(norms[:count]) <= told <= max(norms[:count])


# ---- ZClip ----


@given(NORMS, st.floats(0.5, 0.99), st.floats(0.5, 4.0), st.integers(1, 10))
def test_zclip_is_the_formula(norms: list[float], alpha: float, z: float, warmup: int) -> None:
    rule = ZClip(alpha, z, warmup)
    first, rest = norms[:warmup], norms[warmup:]
    assert [rule.observe(norm) for norm in first] == [math.inf] * len(first)
    mean, variance = float(np.mean(first)), float(np.var(first))
    for norm in rest:
        deviation = math.sqrt(variance)
        limit = rule.observe(norm)
        if norm - mean > z * deviation * (1 + 1e-6) + 1e-6:
            score = (norm - mean) / deviation if deviation > 0.0 else math.inf
            assert limit == pytest.approx(mean + z * deviation / (score / z), rel=1e-6, abs=1e-6)
        elif norm - mean < z * deviation * (1 - 1e-6) - 1e-6:
            assert limit == math.inf
        norm = min(norm, limit)
        mean = alpha * mean + (1 - alpha) * norm
        variance = alpha * variance + (1 - alpha) * (norm - mean) ** 2


def test_further_outliers_are_clipped_more() -> None:
    rule = ZClip(warmup=2)
    rule.observe(9.0)
    rule.observe(11.0)
    limits = [rule.threshold(norm) for norm in (12.5, 12.6, 15.0, 100.0, math.inf)]
    assert limits[0] == math.inf
    assert limits[1:] == sorted(limits[1:], reverse=True)
    assert limits[2] == pytest.approx(10.0 + 2.5 * 1.0 / (5.0 / 2.5))
    assert limits[-1] == 10.0


def test_zclip_does_not_overflow() -> None:
    rule = ZClip(warmup=2)
    for norm in (1e300, 1e308, 1.7e308, 1e-300, 1.0):
        rule.observe(norm)
    assert all(map(math.isfinite, (rule.state_dict()["mean"], rule.state_dict()["deviation"])))


# ---- Both, through the functions that clip ----

POLICIES: list[Callable[[], Threshold]] = [lambda: AutoClip(30), lambda: ZClip(alpha=0.8, z=1.5, warmup=3)]
SEQUENCE = [1.0, 4.0, 0.5, 30.0, 2.0, 0.0, 7.0, 3.0, 90.0, 1.0]


def _gradients(norm: float) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    weight.grad = torch.tensor([0.6, 0.8], dtype=torch.float64) * norm
    return weight


@pytest.mark.parametrize("make", POLICIES)
@by_clipping
def test_each_call_is_one_step(make: Callable[[], Threshold], clip: Any) -> None:
    rule, twin = make(), make()
    clipped = 0
    for norm in SEQUENCE:
        weight = _gradients(norm)
        assert weight.grad is not None
        clip(weight, rule)
        limit = twin.observe(normclip.total_norm(_gradients(norm).grad).item())
        assert rule.state_dict() == twin.state_dict()
        assert weight.grad.norm().item() == pytest.approx(min(norm, limit), rel=1e-12)
        clipped += norm > limit
    assert 0 < clipped < len(SEQUENCE)


@pytest.mark.parametrize("make", POLICIES)
def test_asking_is_not_noting(make: Callable[[], Threshold]) -> None:
    rule = make()
    for norm in SEQUENCE:
        rule.observe(norm)
    state = rule.state_dict()
    for norm in (0.0, 5.0, math.inf, math.nan):
        assert rule.coefficient(norm) == pytest.approx(Hard(rule.threshold(norm)).coefficient(norm), rel=0, nan_ok=True)
    assert rule.state_dict() == state
    assert rule.coefficient(np.float32(50.0)).dtype == np.float32
    assert rule.multiplier(torch.tensor(50.0)).dtype == torch.float32
    assert rule.state_dict() != state


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_that_are_not_finite_are_not_remembered(make: Callable[[], Threshold], bad: float) -> None:
    rule, twin = make(), make()
    assert rule.multiplier(bad) == 1.0  # there is no limit yet
    for norm in SEQUENCE:
        assert rule.multiplier(norm) == twin.multiplier(norm)
        rule.multiplier(bad)
    assert rule.state_dict() == twin.state_dict()
    assert rule.multiplier(bad) == pytest.approx(math.nan if math.isnan(bad) else 0.0, nan_ok=True)


@pytest.mark.parametrize("make", POLICIES)
def test_a_refused_or_skipped_gradient_is_not_remembered(make: Callable[[], Threshold]) -> None:
    rule = make()
    weight = _gradients(math.nan)
    with pytest.raises(RuntimeError):
        normclip.clip_grad_norm_([weight], rule=rule, error_if_nonfinite=True)
    normclip.clip_grads_([weight], rule, nonfinite="skip")
    assert rule.state_dict() == make().state_dict()


# ---- AdaGC ----


def _adagc_of_the_paper(table: np.ndarray, relative: float, absolute: float, beta: float, warmup: int) -> tuple[np.ndarray, np.ndarray]:
    """Norms after clipping, and the limits' averages at the end."""
    averages, clipped = np.full(table.shape[1], np.inf), np.zeros_like(table)
    for step, norms in enumerate(table):
        if step < warmup:
            clipped[step] = norms * min(1.0, absolute / np.linalg.norm(norms))
            averages = np.minimum(averages, clipped[step])
        else:
            clipped[step] = norms * np.minimum(1.0, relative * averages / norms)
            averages = beta * averages + (1 - beta) * clipped[step]
    return clipped, averages


def _model(norms: Any) -> torch.nn.ParameterDict:
    model = torch.nn.ParameterDict({f"w{i}": torch.zeros(3, dtype=torch.float64) for i in range(len(norms))})
    for parameter, norm in zip(model.values(), norms, strict=True):
        parameter.grad = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3.0 * norm
    return model


def test_adagc_is_the_papers_algorithm() -> None:
    table = np.random.default_rng(0).lognormal(sigma=1.0, size=(30, 4))
    constants = {"relative": 1.2, "absolute": 1.5, "beta": 0.7, "warmup": 5}
    expected, averages = _adagc_of_the_paper(table, **constants)
    policy = AdaGC(**constants)  # type: ignore[arg-type]
    for step, norms in enumerate(table):
        model = _model(norms)
        clipped = policy.clip_(model)
        after = [parameter.grad.norm().item() for parameter in model.values()]
        assert after == pytest.approx(expected[step].tolist(), rel=1e-12)
        assert clipped.norm == pytest.approx(np.linalg.norm(norms))
        assert clipped.stats.per_tensor is not None
        assert clipped.stats.per_tensor.l2.tolist() == pytest.approx(norms.tolist(), rel=1e-14)
        assert list(clipped.coefficients.values()) == pytest.approx((expected[step] / norms).tolist(), rel=1e-12)
    assert list(policy.state_dict()["norms"].values()) == pytest.approx(averages.tolist(), rel=1e-12)


def test_adagc_writes_only_what_it_clips() -> None:
    policy = AdaGC(warmup=0)
    policy.clip_(_model([1.0, 1.0]))
    model = _model([1.0, 2.0])
    versions = [parameter.grad._version for parameter in model.values()]
    policy.clip_(model)
    assert [parameter.grad._version - version for parameter, version in zip(model.values(), versions, strict=True)] == [0, 1]


def test_zeros_do_not_hold_a_tensor_down() -> None:
    policy = AdaGC(warmup=2, beta=0.5)
    for norms in ([0.5, 0.0], [0.5, 0.0], [0.5, 3.0], [0.0, 0.0]):
        policy.clip_(_model(norms))
    assert policy.state_dict() == {"steps": 4, "norms": {"w0": 0.5, "w1": 3.0}}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_adagc_forgets_what_is_not_finite(bad: float) -> None:
    policy = AdaGC(warmup=1)
    policy.clip_(_model([0.5, bad]))
    assert policy.state_dict()["norms"] == {}
    policy.clip_(_model([0.5, 0.25]))
    model = _model([0.5, bad])
    clipped = policy.clip_(model)
    assert clipped.found_inf
    assert policy.state_dict()["norms"] == {"w0": 0.5, "w1": 0.25}
    assert model["w0"].grad.norm().item() == pytest.approx(0.5)
    assert model["w1"].grad.isnan().all()


def test_names_belong_to_one_parameter() -> None:
    weight = _gradients(9.0)
    with pytest.raises(ValueError, match="same name"):
        AdaGC().clip_([("w", weight), ("w", _gradients(2.0))])
    assert weight.grad is not None
    assert weight.grad.norm().item() == pytest.approx(9.0)


WITHOUT_GRADIENTS: dict[str, Callable[[AutoClip], object]] = {
    "clip_": lambda rule: normclip.clip_([], rule),
    "clip_, empty": lambda rule: normclip.clip_([torch.ones(0)], rule),
    "clip_grad_norm_": lambda rule: normclip.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], rule=rule),
    "clip_grad_norm_, order 3": lambda rule: normclip.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], norm_type=3.0, rule=rule),
    "clip_grads_": lambda rule: normclip.clip_grads_([torch.nn.Parameter(torch.ones(2))], rule),
    "ClippedSGD": lambda rule: ClippedSGD([torch.nn.Parameter(torch.ones(2))], 0.1, rule).step(),
}


@pytest.mark.parametrize("way", WITHOUT_GRADIENTS)
def test_where_there_are_no_gradients_no_norm_is_noted(way: str) -> None:
    rule = AutoClip()
    before = rule.state_dict()
    WITHOUT_GRADIENTS[way](rule)
    assert rule.state_dict() == before
    normclip.clip_([torch.zeros(1)], rule)
    assert rule.state_dict() != before, "a norm of 0 is one"


# ---- AGC ----


def test_a_unit_of_agc() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[0.6, 0.8]])
    before = weight.grad.clone()
    AGC(clip=0.01).clip_([weight])
    torch.testing.assert_close(weight.grad, 0.05 * before)


def test_agc_without_room_beside_infinite_weights() -> None:
    weight = torch.nn.Parameter(torch.tensor([[math.inf, 1.0], [1.0, 1.0]]))
    weight.grad = torch.ones(2, 2)
    AGC(clip=0.0).clip_([weight])
    assert torch.equal(weight.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2), (4, 3, 2, 2), (0, 3)])
def test_units_are_indices_of_the_first_dimension(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    weight.grad = (
        (torch.randn(shape) * torch.linspace(0.001, 0.1, shape[0] if shape else 1).reshape(-1, *[1] * (len(shape) - 1)))
        .to(dtype)
        .reshape(shape)
    )
    before = weight.grad.clone()
    AGC(clip=0.05).clip_(weight)
    assert weight.grad.dtype == dtype
    units = range(shape[0]) if len(shape) > 1 else [...]
    for unit in units:
        w, g, after = (x[unit].detach().to(torch.complex128) for x in (weight, before, weight.grad))
        limit = 0.05 * max(w.norm().item(), 1e-3)
        factor = min(1.0, limit / g.norm().item())
        tolerance = 0.02 if dtype == torch.bfloat16 else 2e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(after, g * factor, rtol=tolerance, atol=1e-7)
        if factor == 1.0:
            assert torch.equal(after, g)


def test_small_weights_count_as_eps() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    AGC(clip=0.1, eps=0.5).clip_([("w", weight), ("w", weight)])
    torch.testing.assert_close(weight.grad, torch.tensor([[0.03, 0.04], [0.0, 0.0]]))


def test_agc_writes_only_where_it_clips_and_keeps_trouble_in_its_unit() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.full((2, 2), 1e-4)
    version = weight.grad._version
    AGC().clip_([weight])
    assert weight.grad._version == version
    weight.grad[0, 0] = math.nan
    AGC().clip_([weight])
    assert weight.grad[0].isnan().all()
    assert weight.grad[1].tolist() == pytest.approx([1e-4, 1e-4])


def test_agc_is_all_or_nothing() -> None:
    clipped = torch.nn.Parameter(torch.ones(2, 2))
    clipped.grad = torch.ones(2, 2)
    sparse = torch.nn.Parameter(torch.ones(2, 2))
    sparse.grad = torch.eye(2).to_sparse()
    expanded = torch.nn.Parameter(torch.ones(2, 2))
    expanded.grad = torch.ones(1, 2).expand(2, 2)
    with pytest.raises(TypeError, match="gradient of parameter s is sparse"):
        AGC().clip_([("c", clipped), ("s", sparse)])
    with pytest.raises(ValueError, match="expanded"):
        AGC().clip_([("c", clipped), ("e", expanded)])
    assert torch.equal(clipped.grad, torch.ones(2, 2))


def test_modules_and_parameters_without_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[0](torch.ones(1, 3)).sum().backward()  # the second layer has none
    AGC().clip_(model)
    assert (model[0].weight.grad.norm(dim=1) <= 0.01 * model[0].weight.norm(dim=1) * (1 + 1e-6)).all()
    policy = AdaGC()
    assert set(policy.clip_(model).coefficients) == {"0.weight", "0.bias"}
    AGC().clip_([])
    assert policy.clip_([]).coefficients == {}


def test_the_papers_constants_are_the_defaults() -> None:
    assert AutoClip().percentile == 10.0
    assert (ZClip().alpha, ZClip().z, ZClip().warmup) == (0.97, 2.5, 25)
    assert (AdaGC().relative, AdaGC().absolute, AdaGC().beta, AdaGC().warmup) == (1.05, 1.0, 0.98, 100)
    assert (AGC().clip, AGC().eps) == (0.01, 1e-3)


# ---- State ----


def _through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def _through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [*POLICIES, lambda: AdaGC(warmup=4, beta=0.9)])
@pytest.mark.parametrize("saved_at", [0, 2, 7])
@pytest.mark.parametrize("through", [_through_json, _through_torch, lambda state: state], ids=["JSON", "torch", "itself"])
def test_resumes_bit_for_bit(make: Callable[[], Any], saved_at: int, through: Callable[[Any], Any]) -> None:
    norms = np.random.default_rng(1).lognormal(size=(12, 3))

    def step(policy: Any, row: Any) -> bytes:
        model = _model(row)
        policy.clip_(model) if isinstance(policy, AdaGC) else normclip.clip_grad_norm_(model.values(), rule=policy)
        return b"".join(parameter.grad.numpy().tobytes() for parameter in model.values())

    policy = make()
    for row in norms[:saved_at]:
        step(policy, row)
    saved = policy.state_dict()
    unchanged = copy.deepcopy(saved)
    resumed = make()
    resumed.load_state_dict(through(saved))
    for row in norms[saved_at:]:
        assert step(policy, row) == step(resumed, row)
    assert policy.state_dict() == resumed.state_dict()
    assert saved == unchanged
    assert pickle.loads(pickle.dumps(policy)).state_dict() == policy.state_dict()


def test_another_policys_state_is_refused() -> None:
    rule = ZClip()
    with pytest.raises(ValueError, match=r"the state has \['history'\] and ZClip remembers"):
        rule.load_state_dict(AutoClip().state_dict())
    assert rule.state_dict() == ZClip().state_dict()
    AGC().load_state_dict(AGC().state_dict())
    assert AGC().state_dict() == {}


class Half(AutoClip):
    """Its limits are of the kind that the norms are of."""

    def threshold(self, norm: float) -> float:
        return 0.5 * norm


@pytest.mark.parametrize("make", [lambda: AutoClip(30), lambda: ZClip(warmup=2), Half])
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, lambda norm: torch.tensor(norm, dtype=torch.bfloat16)])
def test_states_are_plain_whatever_a_norm_is(make: Callable[[], Threshold], kind: Callable[[float], Any]) -> None:
    rule = make()
    for norm in SEQUENCE:
        assert type(rule.observe(kind(norm))) is float
    rule.multiplier(kind(2.0))
    state = rule.state_dict()
    assert _through_json(state) == _through_torch(state) == state
    assert type(rule.last_limit) is float


def test_a_norm_is_not_negative() -> None:
    rule = AutoClip()
    for ask in (rule.observe, rule.multiplier):
        with pytest.raises(ValueError, match=r"norm is -1\.0"):
            ask(-1.0)
    assert rule.state_dict() == {"history": []}


@pytest.mark.parametrize(
    ("make", "spoiled", "message"),
    [
        (AutoClip, {"history": [1.0, 3.0, 2.0]}, "history in the state is not sorted"),
        (AutoClip, {"history": [1.0, math.nan]}, "history in the state holds nan"),
        (AutoClip, {"history": [-1.0]}, "history in the state holds -1.0"),
        (AutoClip, {"history": ["1.0"]}, "history in the state holds '1.0'"),
        (AutoClip, {"history": [torch.tensor(1.0)]}, "history in the state holds tensor"),
        (AutoClip, {"history": [10**400]}, "history in the state .* too large"),
        (AutoClip, {"history": 1.0}, "history in the state is a float"),
        (AutoClip, {"history": "12"}, "history in the state is a str"),
        (ZClip, {"first": [1.0] * 4}, "first in the state has 4 norms, and warmup is 3"),
        (ZClip, {"first": [math.inf]}, "first in the state holds inf"),
        (ZClip, {"mean": -1.0}, "mean in the state holds -1.0"),
        (ZClip, {"mean": None}, "mean in the state holds None"),
        (ZClip, {"deviation": math.nan}, "deviation in the state holds nan"),
        (ZClip, {"deviation": True}, "deviation in the state holds True"),
        (AdaGC, {"steps": -1}, "steps in the state is -1"),
        (AdaGC, {"steps": 2.5}, "steps in the state is 2.5"),
        (AdaGC, {"steps": True}, "steps in the state is True"),
        (AdaGC, {"norms": [1.0]}, "norms in the state is not a dict"),
        (AdaGC, {"norms": {0: 1.0}}, "norms in the state is not a dict by the names"),
        (AdaGC, {"norms": {"w0": 0.0}}, "norms in the state holds a norm of 0"),
        (AdaGC, {"norms": {"w0": math.inf}}, "norms in the state holds inf"),
        (AdaGC, {"norms": {"w0": None}}, "norms in the state holds None"),
    ],
)
def test_bad_states_change_nothing(make: Callable[..., Any], spoiled: dict[str, Any], message: str) -> None:
    policy = make() if make is AutoClip else make(warmup=3)
    for norm in SEQUENCE:
        policy.clip_(_model([norm])) if make is AdaGC else policy.observe(norm)
    before = policy.state_dict()
    other = {"history": [9.0], "first": [9.0], "mean": 9.0, "deviation": 9.0, "steps": 9, "norms": {"w0": 9.0}}
    with pytest.raises(ValueError, match=f"{message}.*Nothing has changed"):
        policy.load_state_dict({**{name: other[name] for name in before}, **spoiled})
    assert policy.state_dict() == before


def test_a_state_is_a_mapping() -> None:
    with pytest.raises(ValueError, match="the state is a list"):
        AutoClip().load_state_dict(["history"])  # type: ignore[arg-type]


def test_a_loaded_state_is_a_copy() -> None:
    rule, state = AutoClip(), {"history": [np.float64(1.0), 2]}
    rule.load_state_dict(state)
    rule.observe(3.0)
    assert state == {"history": [1.0, 2]}
    assert [type(norm) for norm in rule.state_dict()["history"]] == [float] * 3


def test_the_deviation_of_huge_norms_is_finite() -> None:
    rule = ZClip(warmup=25)
    for _ in range(12):
        rule.observe(1.7e308)
        rule.observe(0.0)
    assert rule.state_dict()["deviation"] == pytest.approx(0.85e308)
    rule.load_state_dict(rule.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoClip(-1), "percentile is -1.0"),
        (lambda: AutoClip(math.nan), "percentile is nan"),
        (lambda: ZClip(alpha=1.0), "alpha is 1.0"),
        (lambda: ZClip(z=0.0), "z is 0.0"),
        (lambda: ZClip(warmup=0), "warmup is 0"),
        (lambda: AdaGC(relative=0.0), "relative is 0.0"),
        (lambda: AdaGC(absolute=-1.0), "absolute is -1.0"),
        (lambda: AdaGC(beta=0.0), "beta is 0.0"),
        (lambda: AdaGC(warmup=-1), "warmup is -1"),
        (lambda: AGC(clip=-0.1), "clip is -0.1"),
        (lambda: AGC(eps=0.0), "eps is 0.0"),
    ],
)
def test_bad_constants(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
