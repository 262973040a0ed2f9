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

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normclip
from normclip.optim import ClippedSGD
from normclip.rules import Hard, Least, Rule
from normclip.thresholds import AGC, AdaClip, AdaGC, AdaGN, AutoClip, Threshold, ZClip
from support.training import by_clipping

NORMS = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60)


@pytest.mark.parametrize("name", ["", ".adagc", ".agc", ".autoclip", ".stablespam", ".zclip"])
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


@given(NORMS, st.floats(0.0, 100.0), st.integers(1, 20))
def test_a_window_is_numpys_percentile_of_the_latest(norms: list[float], percentile: float, window: int) -> None:
    rule, resumed = AutoClip(percentile, window), AutoClip(percentile, window)
    for count, norm in enumerate(norms, 1):
        before, latest = norms[max(0, count - 1 - window) : count - 1], norms[max(0, count - window) : count]
        expected = np.percentile(before, percentile) if before else math.inf
        assert rule.threshold(math.inf) == pytest.approx(expected, rel=1e-12, abs=1e-300)
        told = rule.threshold(norm)
        resumed.load_state_dict(_through_json(rule.state_dict()))
        assert told == rule.observe(norm) == resumed.observe(norm)
        assert told == pytest.approx(np.percentile(latest, percentile), rel=1e-12, abs=1e-300)
        assert rule.state_dict() == {"history": latest}


def test_a_window_forgets() -> None:
    all_of_them, latest = AutoClip(50.0), AutoClip(50.0, window=5)
    for norm in [100.0] * 50 + [1.0] * 5:
        limits = all_of_them.observe(norm), latest.observe(norm)
    assert limits == (100.0, 1.0)


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


def _zclip_of_the_authors(
    norms: list[float], alpha: float, z: float, warmup: int, max_norm: float | None, mode: str, eps: float
) -> tuple[list[float], float, float]:
    """The norms after clipping as their code computes them, without the 1e-6 in its last division, and the averages at the end."""
    buffer: list[float] = []
    after: list[float] = []
    mean = variance = 0.0
    for norm in norms:
        if len(buffer) < warmup:
            buffer.append(norm)
            mean = sum(buffer) / len(buffer)
            variance = sum((first - mean) ** 2 for first in buffer) / len(buffer)
            after.append(norm if max_norm is None else min(norm, max_norm))
            continue
        deviation = variance**0.5
        limit = None
        if mode == "percentile":
            if norm > mean + z * deviation:
                limit = mean + z * deviation
        elif (score := (norm - mean) / (deviation + eps)) > z:
            limit = mean + z * deviation / (score / z)
        effective = norm if limit is None else limit
        after.append(effective if max_norm is None else min(effective, max_norm))
        mean = alpha * mean + (1 - alpha) * effective
        variance = alpha * variance + (1 - alpha) * (effective - mean) ** 2
    return after, mean, variance**0.5


@pytest.mark.parametrize("mode", ["zscore", "percentile"])
@pytest.mark.parametrize("max_norm", [None, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_zclip_is_the_authors_code(mode: Any, max_norm: float | None, seed: int) -> None:
    norms = np.random.default_rng(seed).lognormal(sigma=1.0, size=60).tolist()
    after, mean, deviation = _zclip_of_the_authors(norms, 0.9, 1.5, 6, max_norm, mode, eps=0.0)
    limit = math.inf if max_norm is None else max_norm
    rule, beside = ZClip(0.9, 1.5, 6, limit, mode), Least(ZClip(0.9, 1.5, 6, mode=mode), limit)
    found, same = [rule.multiplier(norm) * norm for norm in norms], [beside.multiplier(norm) * norm for norm in norms]
    assert found == same == pytest.approx(after, rel=1e-9)
    assert after != norms
    state = rule.state_dict()
    assert (state["mean"], state["deviation"]) == pytest.approx((mean, deviation), rel=1e-9)
    assert state == beside.rules[0].state_dict()  # type: ignore[attr-defined]


def test_what_the_authors_epsilon_does() -> None:
    """It is in the docstring: with it, fewer small norms are outliers, and these are clipped less."""
    norms = [1e-6, 3e-6, 7e-6]
    clipped = [_zclip_of_the_authors(norms, 0.97, 2.5, 2, None, "zscore", eps)[0][-1] for eps in (0.0, 1e-6, 1e-5)]
    assert clipped[0] == pytest.approx(3.25e-6)
    assert clipped[0] < clipped[1] <= clipped[2] == norms[-1]


def test_the_limit_of_zclip_is_the_largest_there_is() -> None:
    rule = ZClip(warmup=2, max_norm=2.0)
    assert [rule.threshold(norm) for norm in (1.0, 5.0, math.inf)] == [2.0] * 3
    assert rule.multiplier(math.inf) == 0.0
    assert rule.state_dict()["first"] == []
    assert rule.observe(5.0) == rule.last_limit == 2.0
    assert rule.state_dict()["first"] == [5.0]


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

POLICIES: list[Callable[[], Threshold]] = [
    lambda: AutoClip(30),
    lambda: AutoClip(30, window=3),
    lambda: ZClip(alpha=0.8, z=1.5, warmup=3),
    lambda: ZClip(alpha=0.8, z=1.5, warmup=3, mode="percentile"),
]
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
    assert (AdaGN().gamma1, AdaGN().gamma2, AdaGN().eps, AdaClip().theta) == (0.7, 0.9, 1e-8, 0.999)


# ---- Stable-SPAM ----


Named = dict[str, np.ndarray]


def _adagn(**_: Any) -> AdaGN:
    return AdaGN()


def _adaclip(**_: Any) -> AdaClip:
    return AdaClip()


@given(NORMS, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_adagn_is_the_authors_formula(norms: list[float], gamma1: float, gamma2: float) -> None:
    rule = AdaGN(gamma1, gamma2)
    with mpmath.workdps(60):
        m = v = mpmath.mpf(0)
        for step, norm in enumerate(norms, 1):
            m = gamma1 * m + (1 - mpmath.mpf(gamma1)) * norm
            v = gamma2 * v + (1 - mpmath.mpf(gamma2)) * mpmath.mpf(norm) ** 2
            corrected = m / (1 - mpmath.mpf(gamma1) ** step), mpmath.sqrt(v / (1 - mpmath.mpf(gamma2) ** step))
            exact = corrected[0] / (corrected[1] + mpmath.mpf(1e-8)) / norm if norm else mpmath.mpf(1)
            asked, found = rule.coefficient(norm), rule.multiplier(norm)
            assert found == (asked if norm and asked < math.inf else 1.0)
            if norm > 1e-290:
                assert abs(found - exact) <= 1e-12 * exact
                assert found * norm <= 1.0 + 1e-12 or gamma1 != gamma2


def test_adagn_makes_small_gradients_large_and_spikes_small() -> None:
    rule = AdaGN()
    after = [rule.multiplier(norm) * norm for norm in (1e-3, 2e-3, 1e-3, 1.0, 1e-3, 1e200, 1e-3)]
    assert all(0.01 < norm < 2.0 for norm in after[:6])
    assert all(map(math.isfinite, rule.state_dict().values()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_adagn_forgets_what_is_not_finite(bad: float) -> None:
    rule, twin = AdaGN(), AdaGN()
    for norm in [None, *SEQUENCE]:
        if norm is not None:
            assert rule.multiplier(norm) == twin.multiplier(norm)
        assert rule.multiplier(bad) == pytest.approx(math.nan if math.isnan(bad) else 0.0, nan_ok=True)
    assert rule.state_dict() == twin.state_dict()
    with pytest.raises(ValueError, match=r"norm is -1\.0"):
        rule.multiplier(-1.0)


@by_clipping
def test_each_call_is_one_step_of_adagn(clip: Any) -> None:
    rule, twin = AdaGN(), AdaGN()
    for norm in SEQUENCE:
        weight = _gradients(norm)
        assert weight.grad is not None
        before, measured = weight.grad.clone(), normclip.total_norm(weight.grad).item()
        clip(weight, rule)
        torch.testing.assert_close(weight.grad, before * twin.multiplier(measured), rtol=1e-13, atol=0.0)
        assert rule.state_dict() == twin.state_dict()


def _stable_spam_of_the_authors(gradients: list[Named], theta: float) -> tuple[list[Named], list[Named]]:
    """Gradients after the element threshold, and then after the norm rule, each by tensor."""
    clipped, normed, state = [], [], {name: [0.0, 0.0, 0.0] for name in gradients[0]}
    for step, named in enumerate(gradients, 1):
        clipped.append({name: gradient.copy() for name, gradient in named.items()})
        normed.append({})
        for name, gradient in clipped[-1].items():
            maximum, m, v = state[name]
            most = abs(gradient).max()
            maximum = theta * maximum + (1 - theta) * most
            limit = maximum / (1 - theta**step)
            beyond = abs(gradient) > limit * (1 + 1e-12)  # in the first step the limit is the maximum, within rounding
            gradient[beyond] = gradient[beyond] / most * limit
            norm = np.linalg.norm(gradient)
            m, v = 0.7 * m + 0.3 * norm, 0.9 * v + 0.1 * norm**2
            normed[-1][name] = gradient / norm * (m / (1 - 0.7**step)) / (math.sqrt(v / (1 - 0.9**step)) + 1e-8)
            state[name] = [maximum, m, v]
    return clipped, normed


def test_stable_spam_is_the_authors_code() -> None:
    generator = np.random.default_rng(0)
    sizes = {"a": (3, 4), "b": (5,), "c": ()}
    gradients = [
        {name: generator.standard_normal(size) * generator.lognormal(sigma=1.5) for name, size in sizes.items()} for _ in range(25)
    ]
    clipped, normed = _stable_spam_of_the_authors([{name: np.atleast_1d(g) for name, g in step.items()} for step in gradients], theta=0.9)
    parameters = [(name, torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))) for name, size in sizes.items()]
    policy, rules = AdaClip(theta=0.9), {name: AdaGN() for name in sizes}
    written = 0
    for step, named in enumerate(gradients):
        for name, parameter in parameters:
            parameter.grad = torch.from_numpy(np.array(named[name]))
        versions = [parameter.grad._version for _, parameter in parameters]
        stats = policy.clip_(parameters)
        assert stats.per_tensor is not None
        assert stats.per_tensor.linf.tolist() == [abs(named[name]).max() for name in sizes]
        for (name, parameter), version in zip(parameters, versions, strict=True):
            np.testing.assert_allclose(np.atleast_1d(parameter.grad.numpy()), clipped[step][name], rtol=1e-12)
            touched = parameter.grad._version > version
            assert touched == (not np.array_equal(parameter.grad.numpy(), named[name]))
            written += touched
        normclip.clip_grads_(parameters, limits=rules, groups=lambda name: name)
        for name, parameter in parameters:
            np.testing.assert_allclose(np.atleast_1d(parameter.grad.numpy()), normed[step][name], rtol=1e-12)
    assert 10 < written < 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_elements_of_every_type(dtype: torch.dtype) -> None:
    policy, weight = AdaClip(theta=0.5), torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    for gradient in ([[1.0, 0.5], [0.0, 0.0]], [[7.0, -6.0], [5.5, 2.0]]):
        weight.grad = torch.tensor(gradient, dtype=dtype).t()  # not contiguous
        policy.clip_([weight])
    expected = torch.tensor([[5.0, -30 / 7], [27.5 / 7, 2.0]], dtype=torch.float64).t().to(dtype)
    torch.testing.assert_close(weight.grad, expected, rtol=torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_left_alone(bad: float) -> None:
    policy = AdaClip(theta=0.5)
    model = _model([1.0, 1.0])
    policy.clip_(model)
    model["w0"].grad = torch.tensor([bad, 8.0, 1.0], dtype=torch.float64)
    model["w1"].grad = torch.tensor([0.0, 8.0, 1.0], dtype=torch.float64)
    stats = policy.clip_(model)
    assert stats.nans + stats.infs == 1
    assert model["w0"].grad[1:].tolist() == [8.0, 1.0]
    assert model["w1"].grad[1] < 8.0
    assert [steps for steps, _ in policy.state_dict()["maxima"].values()] == [1, 2]


def test_adaclip_is_all_or_nothing() -> None:
    policy, weight = AdaClip(), _gradients(9.0)
    policy.clip_([("w", weight)])
    before, state = _gradients(99.0).grad, policy.state_dict()
    assert before is not None
    others = {
        "sparse": torch.eye(2).to_sparse(),
        "complex": torch.ones(2, 2, dtype=torch.complex64),
        "expand": torch.ones(1, 2).expand(2, 2),
    }
    for message, gradient in others.items():
        weight.grad = before.clone()
        other = torch.nn.Parameter(torch.ones(2, 2, dtype=gradient.dtype))
        other.grad = gradient
        with pytest.raises((TypeError, ValueError), match=message):
            policy.clip_([("w", weight), ("o", other)])
        assert torch.equal(weight.grad, before)
        assert policy.state_dict() == state
    with pytest.raises(ValueError, match="same name"):
        policy.clip_([("w", weight), ("w", _gradients(1.0))])
    policy.clip_([("w", weight), ("none", torch.nn.Parameter(torch.ones(2)))])
    assert policy.state_dict()["maxima"].keys() == {"w"}


# ---- State ----


def _through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def _through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [*POLICIES, lambda: AdaGC(warmup=4, beta=0.9), lambda: AdaGN(), lambda: AdaClip(0.5)])
@pytest.mark.parametrize("saved_at", [0, 2, 7])
@pytest.mark.parametrize("through", [_through_json, _through_torch, lambda state: state], ids=["JSON", "torch", "itself"])
def test_resumes_bit_for_bit(make: Callable[[], Any], saved_at: int, through: Callable[[Any], Any]) -> None:
    norms = np.random.default_rng(1).lognormal(size=(12, 3))

    def step(policy: Any, row: Any) -> bytes:
        model = _model(row)
        policy.clip_(model) if isinstance(policy, (AdaGC, AdaClip)) else normclip.clip_grad_norm_(model.values(), rule=policy)
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
        (lambda **_: AutoClip(window=12), {"history": [1.0] * 13}, "history in the state has 13 norms, and window is 12"),
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
        (_adagn, {"steps": -1}, "steps in the state is -1"),
        (_adagn, {"mean": math.inf}, "mean in the state holds inf"),
        (_adagn, {"root": -1.0}, "root in the state holds -1.0"),
        (_adaclip, {"maxima": [1.0]}, "maxima in the state is not a dict"),
        (_adaclip, {"maxima": {"w0": 1.0}}, "maxima in the state does not hold a number of steps and a maximum"),
        (_adaclip, {"maxima": {"w0": [1, 2.0, 3.0]}}, "maxima in the state does not hold"),
        (_adaclip, {"maxima": {"w0": [1.5, 2.0]}}, "maxima in the state is 1.5"),
        (_adaclip, {"maxima": {"w0": [1, math.nan]}}, "maxima in the state holds nan"),
    ],
)
def test_bad_states_change_nothing(make: Callable[..., Any], spoiled: dict[str, Any], message: str) -> None:
    policy = make() if make is AutoClip else make(warmup=3)
    for norm in SEQUENCE:
        policy.multiplier(norm) if isinstance(policy, Rule) else policy.clip_(_model([norm]))
    before = policy.state_dict()
    other = {"history": [9.0], "first": [9.0], "mean": 9.0, "deviation": 9.0, "steps": 9, "norms": {"w0": 9.0}}
    other |= {"root": 9.0, "maxima": {"w0": [9, 9.0]}}
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
        (lambda: AutoClip("ten"), "percentile is 'ten'"),
        (lambda: AutoClip(window=0), "window is 0: pass a whole number, at least 1"),
        (lambda: AutoClip(window=2.5), "window is 2.5: pass a whole number"),
        (lambda: ZClip(alpha="a"), "alpha is 'a'"),
        (lambda: ZClip(warmup=2.5), "warmup is 2.5"),
        (lambda: ZClip(max_norm=-1.0), "max_norm is -1.0"),
        (lambda: ZClip(mode="mean"), "mode is 'mean': choose 'zscore' or 'percentile'"),
        (lambda: AdaGN(gamma1=1.0), "gamma1 is 1.0"),
        (lambda: AdaGN(gamma2=0.0), "gamma2 is 0.0"),
        (lambda: AdaGN(eps=0.0), "eps is 0.0"),
        (lambda: AdaClip(theta=1.0), "theta is 1.0"),
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
