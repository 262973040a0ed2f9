"""The theory's functions against its numbers, its inequalities, and what is known in closed form."""

import doctest
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normclip
from normclip import rules, theory

REAL_STEPS = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("name", ["descent", "flows", "probe", "smoothness"])
def test_doctests(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(f"normclip.theory.{name}"))
    assert failed == 0
    assert attempted > 0


def test_every_name_is_documented() -> None:
    assert theory.__all__ == sorted(theory.__all__)
    for name in theory.__all__:
        assert getattr(theory, name).__doc__, name


# ---- Descent ----


def test_predicted_descent_is_the_derivative_along_the_step() -> None:
    x = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64, requires_grad=True)
    loss = x.sin().sum()
    loss.backward()
    assert x.grad is not None
    update, lr = torch.linspace(0.5, -0.25, 7, dtype=torch.float64), 1e-6
    descent = loss.item() - (x.detach() - lr * update).sin().sum().item()
    assert theory.predicted_descent([update], [x.grad], lr) == pytest.approx(descent, rel=1e-5)


@given(st.lists(st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=50), REAL_STEPS)
def test_descents_agree(values: list[float], lr: float) -> None:
    gradient = np.array(values)
    figures = normclip.stats(gradient)
    assert theory.sgd_descent(figures.l2, lr) == pytest.approx(theory.predicted_descent(gradient, gradient, lr), rel=1e-12)
    by_sign = theory.sign_descent(figures.l1, lr)
    assert by_sign == pytest.approx(theory.predicted_descent(np.sign(gradient), gradient, lr), rel=1e-12)
    assert by_sign == pytest.approx(lr * math.sqrt(figures.count) * figures.l2 * figures.sign_cosine, rel=1e-12)


@given(st.integers(1, 10**12), st.integers(1, 10**12), REAL_STEPS, st.floats(0.1, 1.0))
def test_the_rate_keeps_the_descent(elements: int, reference: int, norm: float, cosine: float) -> None:
    def descent(elements: int, lr: float) -> float:
        return theory.sign_descent(math.sqrt(elements) * norm * cosine, lr)

    scaled = theory.rate_scaling(elements, reference)
    assert descent(elements, scaled) == pytest.approx(descent(reference, 1.0), rel=1e-12)
    assert theory.rate_scaling(4 * elements, elements) == 0.5


@pytest.mark.parametrize(
    "function",
    [
        lambda x: theory.sgd_descent(x, 0.5),
        lambda x: theory.implicit_penalty(x, 2.0),
        lambda x: theory.guaranteed_descent(x, 1.0, 1.0),
        lambda x: theory.stable_step(x, 0.0, 4.0 / 27.0),
    ],
)
def test_kinds_of_numbers(function: Callable[[Any], Any]) -> None:
    assert type(function(3.0)) is float
    assert type(function(np.float32(3.0))) is np.float32
    assert function(torch.tensor(3.0)).dtype == torch.float32
    assert function(torch.zeros((), device="meta")).device.type == "meta"  # is not waited for
    assert function(3.0) == function(np.float32(3.0)) == function(torch.tensor(3.0)) == 4.5


def _gaussian_with_zeros(generator: np.random.Generator, count: int) -> Any:
    return generator.standard_normal(count) * (generator.random(count) >= 0.25)


@pytest.mark.parametrize(
    ("draw", "over_all", "cosine"),
    [
        (lambda generator, count: generator.standard_normal(count), math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)),
        (lambda generator, count: generator.laplace(size=count), math.sqrt(1 / 2), math.sqrt(1 / 2)),
        (lambda generator, count: generator.uniform(-1.0, 1.0, count), math.sqrt(3) / 2, math.sqrt(3) / 2),
        (_gaussian_with_zeros, 0.691, 0.798),
        (lambda generator, count: np.eye(1, count), 1e-3, 1.0),
    ],
    ids=["Gaussian", "Laplace", "uniform", "a quarter of zeros", "one-hot"],
)
def test_sign_cosines(draw: Any, over_all: float, cosine: float) -> None:
    figures = normclip.stats(draw(np.random.default_rng(0), 1_000_000))
    assert figures.sign_cosine == pytest.approx(cosine, abs=2e-3)
    assert figures.l1 / (math.sqrt(figures.count) * figures.l2) == pytest.approx(over_all, abs=2e-3)
    assert figures.density == pytest.approx(over_all**2, abs=4e-3)


# ---- Bounds ----


def test_the_popular_bounds_are_loose() -> None:
    # θ⁴ at 0 with L0 = 16: beyond 2 the gradient changes by more than L0·d.
    for distance in (2.1, 3.0, 10.0):
        assert 4.0 * distance**3 > 16.0 * distance
        assert theory.gradient_bound(16.0, 1.0, 0.0, distance) >= 4.0 * distance**3
        assert theory.descent_bound(16.0, 1.0, 0.0, distance) >= distance**4
    assert 4.0 * 1.9**3 < 16.0 * 1.9
    # eˣ − x − 1 from 0 to 1.
    assert math.e - 2.0 > 0.5
    assert theory.descent_bound(1.0, 1.0, 0.0, 1.0) == pytest.approx(math.e - 2.0, rel=1e-15)
    assert round(theory.descent_bound(1.0, 1.0, 0.0, 1.0), 3) == 0.718


@given(st.floats(-10.0, 10.0), st.floats(-10.0, 10.0), st.sampled_from([(64.0, 0.5), (16.0, 1.0), (4.0, 2.0), (1.0, 4.0)]))
def test_bounds_hold_for_a_fourth_power(x: float, y: float, constants: tuple[float, float]) -> None:
    norm, distance = 4 * abs(x) ** 3, abs(y - x)
    assert abs(4 * y**3 - 4 * x**3) <= theory.gradient_bound(*constants, norm, distance) * (1 + 1e-9) + 1e-9
    above = (y - x) ** 2 * (y**2 + 2 * x * y + 3 * x**2)  # y⁴ − x⁴ − 4x³(y − x)
    assert above <= theory.descent_bound(*constants, norm, distance) * (1 + 1e-9) + 1e-9


@given(st.floats(-20.0, 20.0), st.floats(-20.0, 20.0))
def test_bounds_hold_for_cosh(x: float, y: float) -> None:
    norm, distance = abs(math.sinh(x)), abs(y - x)
    assert abs(math.sinh(y) - math.sinh(x)) <= theory.gradient_bound(1.0, 1.0, norm, distance) * (1 + 1e-9)
    above = math.cosh(y) - math.cosh(x) - math.sinh(x) * (y - x)
    assert above <= theory.descent_bound(1.0, 1.0, norm, distance) * (1 + 1e-9) + 1e-9 * math.cosh(x)


@given(REAL_STEPS, REAL_STEPS, REAL_STEPS)
def test_the_exact_step_is_best_by_the_exact_bound(l0: float, l1: float, norm: float) -> None:
    def descent(step: float) -> float:
        return step * norm**2 - theory.descent_bound(l0, l1, norm, step * norm)

    simple, exact = (rules.Smoothness(l0, l1, lr=1.0, exact=exact).coefficient(norm) for exact in (False, True))
    assert descent(exact) >= max(descent(0.999 * exact), descent(1.001 * exact), descent(simple)) * (1 - 1e-12)
    # The simple step descends, by less than the half that the quadratic bound claims.
    assert 0.0 < descent(simple) < 0.5 * simple * norm**2


@pytest.mark.parametrize("t", [0.0, 1e-300, 1e-12, 1e-3, 0.4999, 0.5001, 3.0, 700.0])
def test_the_bound_is_exact_at_all_distances(t: float) -> None:
    with mpmath.workdps(700):
        expected = 3 * (mpmath.exp(t) - t - 1)
    assert theory.descent_bound(1.0, 1.0, 2.0, t) == pytest.approx(float(expected), rel=1e-15)


def test_bounds_at_the_ends() -> None:
    assert theory.gradient_bound(3.0, 0.0, 5.0, 2.0) == 6.0
    assert theory.descent_bound(3.0, 0.0, 5.0, 2.0) == 6.0
    assert theory.gradient_bound(3.0, 1.0, 5.0, 1e6) == theory.descent_bound(3.0, 1.0, 5.0, 1e6) == math.inf


ENDS = (0.0, 1e-310, 1e-160, 1e-9, 1.0, 1000.0, 1e160, 1.7e308)


def _is(found: float, exact: Any) -> bool:
    """Rounded, and infinite where it is too large for a float."""
    return bool(exact >= sys.float_info.max * (1 - 1e-15)) if found == math.inf else bool(abs(found - exact) <= 1e-15 * abs(exact) + 5e-324)


def _bounds(l0: float, l1: float, norm: float, distance: float) -> tuple[Any, Any]:
    curvature, t = l0 + mpmath.mpf(l1) * norm, mpmath.mpf(l1) * distance
    if curvature == 0 or t > 1e5:
        return (mpmath.mpf(0 if curvature == 0 else mpmath.inf),) * 2
    if t == 0:
        return curvature * distance, curvature * distance * distance / 2
    return curvature * mpmath.expm1(t) / l1, curvature * (mpmath.exp(t) - t - 1) / mpmath.mpf(l1) ** 2


def test_bounds_of_every_size() -> None:
    with mpmath.workdps(1300):
        for constants in itertools.product(ENDS, repeat=4):
            by_gradient, by_descent = _bounds(*constants)
            assert _is(theory.gradient_bound(*constants), by_gradient), constants
            assert _is(theory.descent_bound(*constants), by_descent), constants


def test_constants_of_every_size() -> None:
    mpf, most = mpmath.mpf, mpmath.inf
    with mpmath.workdps(1300):
        for l0, l1, norm in itertools.product(ENDS[1:], ENDS, ENDS):
            wide0, wide1, wide_norm = map(mpf, (l0, l1, norm))
            assert _is(theory.fixed_gd(l0, l1, norm), 1 / (2 * (wide_norm * wide1 + wide0)))
            lr, gamma = theory.clipped_gd(l0, l1)
            assert _is(lr, 1 / (10 * wide0))
            assert _is(gamma, min(10 * wide0, wide0 / wide1 if l1 else most))
            assert _is(theory.rate_scaling(l0, max(norm, 1e-310)), mpmath.sqrt(max(norm, 1e-310) / wide0))
            for steps in (1, 10**9):
                growth = wide1 * (wide_norm + wide0)
                assert _is(theory.fixed_sgd(l1, norm, l0, steps), min(1 / mpmath.sqrt(steps), 1 / growth if growth else most))
                if l1:
                    eta = min(1 / (20 * wide0), 1 / (128 * wide1 * norm) if norm else most, 1 / mpmath.sqrt(steps))
                    lr, gamma = theory.clipped_sgd(l0, l1, norm, steps)
                    assert _is(lr, eta)
                    assert _is(gamma, 1 / (16 * eta * wide1))


@pytest.mark.parametrize("function", [theory.sgd_descent, theory.sign_descent, theory.implicit_penalty])
@pytest.mark.parametrize("kind", [float, np.float64, np.float32, torch.tensor])
def test_a_step_of_no_length_has_no_descent(function: Callable[..., Any], kind: Callable[[float], Any]) -> None:
    for norm in (0.0, 3.0, math.inf):
        assert float(function(kind(norm), 0.0)) == 0.0
    assert math.isnan(function(kind(math.nan), 0.0))
    assert float(function(kind(math.inf), 0.5)) == math.inf
    narrow = 2.0**100  # whose square has no float32
    assert float(function(kind(narrow), 2.0**-90)) == function(narrow, 2.0**-90) > 0.0


@given(
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.floats(0.0, 10.0),
)
def test_the_guarantee_is_attained_by_a_parabola(x: float, curvature: float, steps: float) -> None:
    lr = steps / curvature
    found = theory.guaranteed_descent(abs(curvature * x), lr, curvature)
    with mpmath.workdps(50):
        point, slope = mpmath.mpf(x), mpmath.mpf(curvature)
        exact = slope / 2 * (point**2 - (point - lr * slope * point) ** 2)
    assert found == pytest.approx(float(exact), rel=1e-13, abs=1e-12 * curvature * x * x)
    norm, stable = abs(curvature * x), theory.stable_step(abs(curvature * x), curvature)
    assert stable == 2.0 / curvature
    if norm > 1e-100:
        assert theory.guaranteed_descent(norm, 0.999 * stable, curvature) > 0.0 > theory.guaranteed_descent(norm, 1.001 * stable, curvature)
        assert theory.guaranteed_descent(norm, lr, curvature) <= theory.sgd_descent(norm, lr)


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=5), st.floats(0.0, 5.0))
def test_the_guarantee_holds(point: list[float], lr: float) -> None:
    """For Σ log cosh x, whose curvature is at most 1, from any point."""
    x = np.array(point)
    gradient = np.tanh(x)
    norm = normclip.total_norm(gradient)
    descent = float(np.log(np.cosh(x)).sum() - np.log(np.cosh(x - lr * gradient)).sum())
    assert descent >= theory.guaranteed_descent(norm, lr, smoothness=1.0) - 1e-12


def test_guarantees_and_stable_steps_of_every_size() -> None:
    with mpmath.workdps(1300):
        for norm, lr, curvature in itertools.product(ENDS, repeat=3):
            exact = (mpmath.mpf(lr) - mpmath.mpf(curvature) * lr * lr / 2) * mpmath.mpf(norm) ** 2
            found = theory.guaranteed_descent(norm, lr, curvature)
            factor = exact / mpmath.mpf(norm) ** 2 if norm else 0
            if factor == 0 or 1e-307 < abs(factor) < sys.float_info.max:  # else the factor has no float
                assert _near(found, exact), (norm, lr, curvature)
            if lr or curvature:
                step = mpmath.mpf(lr) + mpmath.mpf(curvature) * norm
                assert _near(theory.stable_step(norm, lr, curvature), 2 / step if step else mpmath.inf), (norm, lr, curvature)
    assert math.isnan(theory.stable_step(math.nan, 1.0))
    assert theory.stable_step(math.inf, 0.5) == 4.0
    assert theory.stable_step(math.inf, 0.5, 1.0) == 0.0


def _near(found: float, exact: Any) -> bool:
    if math.isinf(found):
        return bool(abs(exact) >= sys.float_info.max * (1 - 1e-14)) and (found > 0) == (exact > 0)
    return bool(abs(found - exact) <= 1e-14 * abs(exact) + 1e-320)


@given(st.floats(0.1, 1e3), st.floats(0.01, 1.0), st.floats(1e-6, 1.0))
def test_the_penalty_of_a_clipped_step(norm: float, lr: float, limit: float) -> None:
    """The step that was taken is that of gradient descent with a shorter rate, so it has the penalty of that step."""
    coefficient = rules.Hard(limit * norm).coefficient(norm)
    gradient = np.array([0.6, 0.8]) * norm
    clipped = gradient.copy()
    normclip.clip_(clipped, limit * norm)
    step = float(np.linalg.norm(lr * clipped)) / norm  # the h for which the step is h·g
    assert theory.implicit_penalty(norm, lr=coefficient * lr) == pytest.approx(step / 4 * norm**2, rel=1e-12, abs=1e-300)


def test_predicted_descent_of_no_step() -> None:
    assert theory.predicted_descent(np.array([math.inf]), np.array([1.0]), 0.0) == 0.0
    assert math.isnan(theory.predicted_descent(np.array([math.nan]), np.array([1.0]), 0.0))


# ---- Zhang's theorems ----


def _iterations(derivative: Callable[[float], float], step: Callable[[float], float], x: float) -> int:
    for count in itertools.count():
        if abs(derivative(x)) <= 0.01:
            return count
        x -= step(abs(derivative(x))) * derivative(x)
    raise AssertionError


@pytest.mark.parametrize(
    ("derivative", "l0", "clipped", "simple", "exact", "fixed"),
    [(lambda x: 4.0 * x**3, 16.0, 1109, 110, 112, 6993), (math.sinh, 1.0, 84, 8, 11, 791)],
    ids=["x⁴", "cosh"],
)
def test_iterations(derivative: Callable[[float], float], l0: float, clipped: int, simple: int, exact: int, fixed: int) -> None:
    start, choice = 5.0, theory.clipped_gd(l0, 1.0)
    hard = rules.Hard(choice.max_norm)
    assert _iterations(derivative, lambda n: choice.lr * hard.coefficient(n), start) == clipped
    for count, kind in ((simple, False), (exact, True)):
        assert _iterations(derivative, rules.Smoothness(l0, 1.0, lr=1.0, exact=kind).coefficient, start) == count
    step = theory.fixed_gd(l0, 1.0, derivative(start))
    assert _iterations(derivative, lambda _: step, start) == fixed


@given(REAL_STEPS, REAL_STEPS, REAL_STEPS, REAL_STEPS, st.integers(1, 10**9))
def test_what_the_constants_are_for(l0: float, l1: float, norm: float, noise: float, steps: int) -> None:
    lr, gamma = theory.clipped_gd(l0, l1)
    assert lr * gamma <= min(1.0, 0.1 / l1) * (1 + 1e-15)  # the longest step
    lr, gamma = theory.clipped_sgd(l0, l1, noise, steps)
    assert lr <= 1 / math.sqrt(steps) * (1 + 1e-15)
    assert lr <= 0.05 / l0 * (1 + 1e-15)
    assert 128 * l1 * noise * lr <= 1 + 1e-15
    longest = lr * rules.Hard(gamma).coefficient(norm + noise) * norm
    assert longest <= 1 / (16 * l1) * (1 + 1e-15)
    lr = theory.fixed_sgd(l1, norm, noise, steps)
    assert lr <= 1 / math.sqrt(steps) * (1 + 1e-15)
    assert lr * (norm + noise) <= 1 / l1 * (1 + 1e-15)
    assert theory.fixed_gd(l0, l1, norm) == pytest.approx(0.5 / (l0 + l1 * norm), rel=1e-15)


def test_without_growth() -> None:
    assert theory.clipped_gd(0.1, 0.0) == (1.0, 1.0)
    assert theory.fixed_gd(0.5, 0.0, 100.0) == 1.0
    assert theory.fixed_sgd(0.0, 100.0, 1.0, 4) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.clipped_gd(0.0, 1.0), "L0 is 0.0"),
        (lambda: theory.clipped_gd(1.0, -1.0), "L1 is -1.0"),
        (lambda: theory.fixed_gd(1.0, 1.0, math.inf), "max_gradient is inf"),
        (lambda: theory.clipped_sgd(1.0, 0.0, 1.0, 10), "L1 is 0.0"),
        (lambda: theory.clipped_sgd(1.0, 1.0, 1.0, 0), "steps is 0.0"),
        (lambda: theory.fixed_sgd(1.0, 1.0, -1.0, 10), "noise is -1.0"),
        (lambda: theory.descent_bound(1.0, 1.0, math.nan, 1.0), "norm is nan"),
        (lambda: theory.gradient_bound(1.0, 1.0, 1.0, -1.0), "distance is -1.0"),
        (lambda: theory.rate_scaling(0, 1), "elements is 0.0"),
        (lambda: theory.stable_step(1.0, 0.0), "L0 and L1 are both 0"),
        (lambda: theory.stable_step(1.0, -1.0), "L0 is -1.0"),
        (lambda: theory.guaranteed_descent(1.0, -0.1, 1.0), "lr is -0.1"),
        (lambda: theory.guaranteed_descent(1.0, 0.1, math.inf), "smoothness is inf"),
        (lambda: theory.sgd_descent(1.0, "fast"), "lr is 'fast': pass a number"),
        (lambda: theory.implicit_penalty(1.0, "fast"), "lr is 'fast': pass a number"),
        (lambda: theory.fit_l0_l1([1.0], [1.0, 2.0]), "1 values of smoothness for 2 norms"),
        (lambda: theory.fit_l0_l1([], []), "no point"),
        (lambda: theory.fit_l0_l1([math.nan], [1.0]), "no point"),
        (lambda: theory.fit_l0_l1([-1.0], [1.0]), "negative"),
        (lambda: theory.fit_l0_l1([1.0], [1.0], quantile=0.0), "quantile is 0.0"),
        (lambda: theory.fit_l0_l1([1.0], [1.0], quantile="most"), "quantile is 'most': pass a number"),
        (lambda: theory.modified_flow(torch.sum, torch.ones(1), "slow"), "lr is 'slow': pass a number"),
        (lambda: theory.next_order_flow(torch.sum, torch.ones(1), "slow"), "lr is 'slow': pass a number"),
        (lambda: theory.explicit_penalty(torch.ones(1), [], "strong"), "strength is 'strong': pass a number"),
        (lambda: theory.SmoothnessProbe(torch.nn.Linear(1, 1), ()), "fractions is"),
        (lambda: theory.SmoothnessProbe(torch.nn.Linear(1, 1), (0.0, 1.0)), "fractions is"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- Fitting ----


@pytest.mark.parametrize(("l0", "l1"), [(64.0, 0.5), (16.0, 1.0), (4.0, 2.0), (1.0, 4.0)])
def test_a_fourth_power_satisfies_the_condition_exactly(l0: float, l1: float) -> None:
    x = np.linspace(0.0, 10.0, 100_001)
    rest = l0 + l1 * 4 * x**3 - 12 * x**2
    assert rest.min() == pytest.approx(0.0, abs=1e-6)
    assert rest.min() >= -1e-9
    # A fit to points around the one where the two touch finds the pair.
    near = np.linspace(0.9, 1.1, 2001) * 2.0 / l1
    fit = theory.fit_l0_l1(12 * near**2, 4 * near**3)
    assert math.isclose(fit.L0 * fit.L1**2, 16.0, rel_tol=1e-3)
    assert fit.slope == pytest.approx(2.0 / 3.0, rel=1e-9)
    assert fit.correlation == pytest.approx(1.0, rel=1e-9)


def test_cosh_is_1_1_smooth() -> None:
    x = np.linspace(0.0, 10.0, 1001)
    assert (np.cosh(x) <= 1.0 + np.sinh(x) + 1e-9).all()
    fit = theory.fit_l0_l1(np.cosh(x), np.sinh(x))
    assert math.hypot(fit.L0 - 1.0, fit.L1 - 1.0) < 0.01


def _cost(l0: float, l1: float, smoothness: Any, norms: Any, quantile: float) -> float:
    rest = smoothness - l0 - l1 * norms
    if quantile == 1.0:
        return math.inf if rest.max() > 1e-9 * smoothness.max() else l0 + l1 * norms.mean()
    return float(np.where(rest > 0, quantile * rest, (quantile - 1.0) * rest).sum())


POINTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


@settings(deadline=None)
@given(POINTS, st.sampled_from([1.0, 0.9, 0.75, 0.5, 0.1]))
def test_no_pair_is_smaller(points: list[tuple[int, int]], quantile: float) -> None:
    smoothness, norms = (np.array(column, float) for column in zip(*points, strict=True))
    fit = theory.fit_l0_l1(smoothness, norms, quantile)
    assert fit.L0 >= 0.0
    assert fit.L1 >= 0.0
    above = np.count_nonzero(smoothness > fit.L0 + fit.L1 * norms + 1e-9)
    assert above <= (1.0 - quantile) * len(points) + 1e-9
    # The least cost is that of a line through two points, or one point and the origin, or level.
    candidates = [(level, 0.0) for level in {0.0, *smoothness}]
    corners = [*points, (0, 0)]
    for (y, x), (other_y, other_x) in itertools.combinations(corners, 2):
        if x != other_x:
            slope = (other_y - y) / (other_x - x)
            candidates.append((y - slope * x, slope))
    best = min(_cost(l0, l1, smoothness, norms, quantile) for l0, l1 in candidates if l0 >= -1e-12 and l1 >= 0.0)
    assert _cost(fit.L0, fit.L1, smoothness, norms, quantile) <= best + 1e-7 * (1.0 + best)


@pytest.mark.parametrize("quantile", [1.0, 0.75])
@pytest.mark.parametrize(("unit", "unit_n"), [(1010, 1010), (-1050, -1050), (1010, 0), (0, -1000), (-500, 500)])
def test_fits_of_every_size(quantile: float, unit: int, unit_n: int) -> None:
    generator = np.random.default_rng(0)
    norms = generator.integers(1, 1 << 12, 300).astype(float)
    smoothness = np.rint(2.0 + 3.0 * norms * generator.random(300))
    fit, scaled = (
        theory.fit_l0_l1(smoothness, norms, quantile),
        theory.fit_l0_l1(np.ldexp(smoothness, unit), np.ldexp(norms, unit_n), quantile),
    )
    assert fit.L1 > 0.0
    assert np.ldexp(fit.L0, unit) == scaled.L0
    assert pytest.approx(np.ldexp(fit.L1, unit - unit_n), rel=1e-15) == scaled.L1


def test_a_fit_with_a_norm_next_to_nothing() -> None:
    fit = theory.fit_l0_l1([1.0, 1.0, 5.0, 9.0], [1e-310, 1.0, 2.0, 4.0])
    assert pytest.approx((1.0, 2.0)) == (fit.L0, fit.L1)


def test_points_without_a_logarithm_and_without_a_value() -> None:
    fit = theory.fit_l0_l1([1.0, 2.0, 4.0, 0.0, math.nan, 9.0], [1.0, 2.0, 4.0, 0.0, 1.0, math.inf])
    assert (fit.L0, fit.correlation, fit.slope) == pytest.approx((0.0, 1.0, 1.0), abs=1e-12)
    assert math.isnan(theory.fit_l0_l1([1.0, 1.0], [1.0, 2.0]).slope)
    assert theory.fit_l0_l1([1.0, 1.0], [1.0, 2.0]).L1 == 0.0


# ---- Implicit regularization ----


def _saddle(point: torch.Tensor) -> torch.Tensor:
    return (0.6 - point[0] * point[1]) ** 2 / 2


def _follow(velocity: Callable[[torch.Tensor], torch.Tensor], point: torch.Tensor, time: float, steps: int) -> torch.Tensor:
    """Runge and Kutta's method of order 4."""
    h = time / steps
    for _ in range(steps):
        k1 = velocity(point)
        k2 = velocity(point + h / 2 * k1)
        k3 = velocity(point + h / 2 * k2)
        k4 = velocity(point + h * k3)
        point = point + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return point


def _distances(loss: Callable[[torch.Tensor], torch.Tensor], start: list[float], h: float, steps: int) -> tuple[torch.Tensor, list[float]]:
    first = descended = torch.tensor(start, dtype=torch.float64)
    for _ in range(round(1.0 / h)):
        descended = descended + h * theory.gradient_flow(loss, descended)
    flows = (
        lambda x: theory.gradient_flow(loss, x),
        lambda x: theory.modified_flow(loss, x, h),
        lambda x: theory.next_order_flow(loss, x, h),
    )
    return descended, [torch.linalg.vector_norm(_follow(flow, first, 1.0, steps) - descended).item() for flow in flows]


def test_distances_on_a_parabola() -> None:
    descended, distances = _distances(lambda x: x.square().sum() / 2, [1.0], 0.1, 50)
    assert descended.item() == pytest.approx(0.3486784, abs=5e-8)
    assert distances == pytest.approx([1.9201e-2, 1.2593e-3, 9.479e-5], rel=5e-5)


def test_global_orders() -> None:
    coarse, fine = (_distances(_saddle, [2.8, 0.4], h, 160)[1] for h in (0.0125, 0.00625))
    assert [math.log2(a / b) for a, b in zip(coarse, fine, strict=True)] == pytest.approx([1.04, 2.00, 3.00], abs=0.005)


def test_the_gradient_of_the_penalty() -> None:
    point = torch.tensor([1.3, -0.7], dtype=torch.float64, requires_grad=True)
    theory.explicit_penalty(_saddle(point), point, strength=4.0).backward()
    assert point.grad is not None
    assert point.grad.tolist() == pytest.approx([10.53678, -11.75082], abs=5e-6)
    # −g − (h/2)·Hg is the gradient of the loss with the penalty.
    with_penalty = torch.autograd.grad(_saddle(point) + theory.explicit_penalty(_saddle(point), point, 0.1), point)[0]
    torch.testing.assert_close(theory.modified_flow(_saddle, point, 0.1), -with_penalty)


def test_penalties_agree() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    unused = torch.nn.Parameter(torch.ones(2))
    loss = model(torch.ones(2, 3)).square().sum()
    explicit = theory.explicit_penalty(loss, [*model.parameters(), unused], strength=0.2)
    loss.backward(retain_graph=True)
    norm = normclip.clip_grad_norm_(model.parameters(), math.inf)
    assert explicit.item() == pytest.approx(theory.implicit_penalty(norm, 0.2).item(), rel=1e-6)
    explicit.backward()


def test_flows_of_flat_functions() -> None:
    point = torch.ones(2)
    for loss in (lambda x: x.sum(), lambda x: torch.ones(())):
        velocity = theory.next_order_flow(loss, point, 0.1)
        assert torch.equal(velocity, theory.gradient_flow(loss, point))
    assert not point.requires_grad
