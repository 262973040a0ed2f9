"""Rules against the formulas, inequalities and numbers of the theory, on floats, NumPy and torch, and through every function that clips."""

import contextlib
import dataclasses
import doctest
import itertools
import math
import pickle
from decimal import Decimal, localcontext
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normclip
from normclip import rules
from normclip.rules import DescentLimit, Hard, Normalize, Rule, Smoothness, Soft

ALL: list[Rule] = [
    Hard(1.5),
    Soft(1.5),
    Normalize(1.5),
    Normalize(1.5, beta=0.25),
    Smoothness(2.0, 0.5, lr=0.1),
    Smoothness(2.0, 0.5, lr=0.1, exact=True),
    DescentLimit(1.5),
]
SIZES = st.floats(1e-150, 1e150)
REAL_STEPS = st.floats(1e-6, 1e6)


def test_doctests() -> None:
    assert doctest.testmod(rules).failed == 0


# ---- THEORY §1: inequalities and numbers ----


@given(SIZES, SIZES)
def test_soft_lies_between_half_of_hard_and_hard(n: float, gamma: float) -> None:
    hard, soft = Hard(gamma).coefficient(n), Soft(gamma).coefficient(n)
    assert 0.5 * hard * (1 - 2**-51) <= soft <= hard
    assert 0.5 * (1 - 2**-51) <= soft / hard <= 1.0


@given(SIZES)
def test_soft_is_half_of_hard_at_the_limit(gamma: float) -> None:
    assert Soft(gamma).coefficient(gamma) == 0.5
    assert Hard(gamma).coefficient(gamma) == 1.0


@given(n=REAL_STEPS, eta_n=REAL_STEPS, beta=REAL_STEPS)
def test_zhangs_pairing_of_clipping_and_normalized_descent(n: float, eta_n: float, beta: float) -> None:
    # h_c = min(η_c, γη_c/n) and h_n = η_n/(n + β), with γη_c = η_n and η_c = η_n/β, so γ = β.
    clipped = eta_n / beta * Hard(beta).coefficient(n)
    normalized = Normalize(eta_n, beta).coefficient(n)
    assert 0.5 * clipped * (1 - 1e-14) <= normalized <= clipped * (1 + 1e-14)


@given(n=REAL_STEPS, l0=REAL_STEPS, l1=REAL_STEPS)
def test_smoothness_is_soft_clipping_with_the_right_constants(n: float, l0: float, l1: float) -> None:
    assert Smoothness(l0, l1, lr=1.0 / l0).coefficient(n) == pytest.approx(Soft(l0 / l1).coefficient(n), rel=1e-14)


@given(n=REAL_STEPS, l0=REAL_STEPS, l1=REAL_STEPS, lr=REAL_STEPS)
def test_the_exact_step(n: float, l0: float, l1: float, lr: float) -> None:
    exact, simple = (Smoothness(l0, l1, lr, exact=exact).coefficient(n) for exact in (True, False))
    with localcontext() as context:
        context.prec = 60
        wide_n, wide_l0, wide_l1, wide_lr = map(Decimal, (n, l0, l1, lr))
        expected = (1 + wide_l1 * wide_n / (wide_l0 + wide_l1 * wide_n)).ln() / (wide_lr * wide_l1 * wide_n)
    assert exact == pytest.approx(float(expected), rel=1e-14)
    # ln 2 ≤ ln(1 + r)/r ≤ 1 for r in (0, 1).
    assert math.log(2.0) * (1 - 1e-14) <= exact / simple <= 1.0


def test_numbers() -> None:
    assert Smoothness(16.0, 1.0, lr=1.0).coefficient(4000.0) == pytest.approx(2.49003984e-4, rel=1e-9)
    assert Smoothness(16.0, 1.0, lr=0.5, exact=True).coefficient(0.0) == 1.0 / (0.5 * 16.0)
    gradient = np.array([3.0, 4.0])
    normclip.clip_(gradient, Hard(1.0))
    assert gradient.tolist() == [0.6000000000000001, 0.8]  # 3 times the float64 next to 0.2, rounded
    narrow = np.array([3.0, 4.0], np.float32)
    normclip.clip_(narrow, Hard(1.0))
    assert narrow.tolist() == np.array([0.6, 0.8], np.float32).tolist()
    # Not monotone: gradient descent limited by its descent steps furthest, by √T, at a norm of √T.
    lengths = [DescentLimit(9.0).multiplier(n) * n for n in (1.0, 3.0, 4.0, 9.0)]
    assert lengths == [1.0, 3.0, 2.25, 1.0]


@given(n=st.floats(0.0, 1e100), limit=REAL_STEPS)
def test_the_length_of_a_descent_limited_step(n: float, limit: float) -> None:
    assert DescentLimit(limit).multiplier(n) * n == pytest.approx(min(n, limit / n if n > 0.0 else 0.0), rel=1e-14)
    longest = DescentLimit(limit).multiplier(math.sqrt(limit)) * math.sqrt(limit)
    assert DescentLimit(limit).multiplier(n) * n <= longest * (1 + 1e-14)


@pytest.mark.parametrize("descent", [0.0, -3.0, -math.inf])
def test_no_predicted_descent_is_not_limited(descent: float) -> None:
    assert DescentLimit(0.5).coefficient(descent) == 1.0


# ---- Edges ----


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_edges(rule: Rule) -> None:
    assert rule.multiplier(0.0) == 1.0
    assert rule.multiplier(math.inf) == 0.0
    assert math.isnan(rule.multiplier(math.nan))
    assert math.isnan(rule.coefficient(math.nan))
    for tiny in (5e-324, 1e-308):
        assert math.isfinite(rule.multiplier(tiny))
    assert math.isfinite(rule.multiplier(1.7e308))


ENDS = (1e-310, 1e-300, 1e-160, 0.7, 1.0, 1e160, 1e300, 1.7e308)
CONSTANTS = (0.0, *ENDS, math.inf, math.nan)


def _at(rule: Any, n: float) -> Any:
    """The formula in 700 digits, with its limit where the norm is infinite."""
    if math.isinf(n):
        unlimited = rule.max_norm == math.inf if isinstance(rule, Hard) else isinstance(rule, Smoothness) and rule.L1 == 0.0
        return _at(rule, 1.0) if unlimited else mpmath.mpf(0)
    n = mpmath.mpf(n)
    match rule:
        case Hard(gamma) | DescentLimit(gamma):
            return mpmath.mpf(1) if n <= gamma else gamma / n
        case Soft(gamma):
            return gamma / (n + gamma)
        case Normalize(norm, beta):
            return norm / (n + beta) if n + beta else mpmath.inf
        case Smoothness(l0, l1, lr, exact):
            growth = mpmath.mpf(l1) * n
            step = 1 / (lr * (l0 + growth))
            share = growth / (l0 + growth)
            return step * mpmath.log1p(share) / share if exact and share else step
    raise AssertionError


def _rules_of(kind: type[Rule], constants: tuple[float, ...]) -> list[Rule]:
    """All that can be made of these constants."""
    found = []
    for values in itertools.product(constants, repeat=3 if kind is Smoothness else 2 if kind is Normalize else 1):
        for more in [(False,), (True,)] if kind is Smoothness else [()]:
            with contextlib.suppress(ValueError):
                found.append(kind(*values, *more))  # type: ignore[call-arg]
    return found


@pytest.mark.parametrize("kind", [Hard, Soft, Normalize, Smoothness, DescentLimit])
def test_every_constant_and_every_norm(kind: type[Rule]) -> None:
    with mpmath.workdps(700):
        for rule in _rules_of(kind, CONSTANTS):
            for n in (0.0, 5e-324, *ENDS, math.inf):
                coefficient, multiplier = rule.coefficient(n), rule.multiplier(n)
                assert _close(coefficient, _at(rule, n)), (rule, n)
                if isinstance(rule, DescentLimit):
                    assert _close(multiplier, 1 if mpmath.mpf(n) ** 2 <= rule.limit else mpmath.mpf(rule.limit) / n / n), (rule, n)
                else:
                    assert multiplier == (1.0 if n == 0.0 or coefficient == math.inf else coefficient), (rule, n)
            assert math.isnan(rule.coefficient(math.nan)) == math.isnan(rule.multiplier(math.nan)) == rule.writes


def _close(found: float, exact: Any) -> bool:
    largest = 2 * mpmath.mpf(2) ** 1023
    if found == math.inf:
        return bool(exact > largest * (1 - 1e-15))
    return bool(abs(found - exact) <= 1e-15 * abs(exact) + 2e-323)


@pytest.mark.parametrize("kind", [Hard, Soft, Normalize, Smoothness, DescentLimit])
def test_narrow_norms_have_wide_coefficients(kind: type[Rule]) -> None:
    for rule in _rules_of(kind, (1e-200, 1e-30, 1.0, 1e30, 1e200)):
        for n in (0.0, 1e-44, 1e-30, 1.0, 3e38, math.inf):
            narrow = np.float32(n)
            with np.errstate(over="ignore"):
                expected = np.float32(rule.coefficient(float(narrow)))
            assert rule.coefficient(narrow) == expected, (rule, n)
            assert rule.coefficient(torch.tensor(narrow)).item() == pytest.approx(expected, rel=1e-6, abs=1e-44), (rule, n)


def test_hard_limits_at_the_ends() -> None:
    assert Hard(math.inf).coefficient(math.inf) == Hard(math.inf).coefficient(math.nan) == 1.0
    assert Hard(0.0).coefficient(0.0) == 1.0
    assert Hard(0.0).coefficient(5.0) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hard(-1.0), "max_norm is -1.0"),
        (lambda: Hard(math.nan), "max_norm is nan"),
        (lambda: Soft(0.0), "max_norm is 0.0: pass a positive"),
        (lambda: Soft(math.inf), "max_norm is inf"),
        (lambda: Normalize(0.0), "norm is 0.0"),
        (lambda: Normalize(1.0, beta=-1.0), "beta is -1.0"),
        (lambda: Smoothness(0.0, 1.0, 0.1), "L0 is 0.0"),
        (lambda: Smoothness(1.0, -1.0, 0.1), "L1 is -1.0"),
        (lambda: Smoothness(1.0, 1.0, 0.0), "lr is 0.0"),
        (lambda: DescentLimit(0.0), "limit is 0.0"),
        (lambda: DescentLimit(math.nan), "limit is nan"),
    ],
)
def test_bad_constants(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_rules_are_values(rule: Rule) -> None:
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert len({rule, dataclasses.replace(rule)}) == 1  # type: ignore[type-var]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.max_norm = 2.0  # type: ignore[attr-defined]


# ---- One formula, three kinds of numbers ----


@pytest.mark.parametrize("rule", ALL, ids=repr)
@pytest.mark.parametrize("method", ["coefficient", "multiplier"])
@pytest.mark.parametrize("value", [0.0, 1e-9, 0.7, 1.5, 40.0, 1e30, math.inf, math.nan])
def test_kinds_of_numbers(rule: Rule, method: str, value: float) -> None:
    call = getattr(rule, method)
    plain = call(value)
    assert type(plain) is float
    assert type(call(np.float64(value))) is np.float64
    assert type(call(np.float32(value))) is np.float32
    assert call(np.float64(value)) == pytest.approx(plain, rel=0, abs=0, nan_ok=True)
    assert call(np.float32(value)) == pytest.approx(plain, rel=1e-5, nan_ok=True)
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-5)):
        scalar = call(torch.tensor(value, dtype=dtype))
        assert (scalar.dtype, scalar.shape) == (dtype, ())
        assert scalar.item() == pytest.approx(plain, rel=tolerance, nan_ok=True)


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_scalars_on_a_device_are_not_waited_for(rule: Rule) -> None:
    scalar = torch.zeros((), device="meta")  # has no value that could be asked for
    assert rule.coefficient(scalar).device.type == rule.multiplier(scalar).device.type == "meta"


# ---- Through the functions that clip ----


@pytest.mark.parametrize("rule", ALL, ids=repr)
@pytest.mark.parametrize("order", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 1e6])
def test_every_function_takes_every_rule(rule: Rule, order: float, scale: float) -> None:
    values = torch.tensor([3.0, -4.0, 0.5], dtype=torch.float64) * scale
    norm = torch.linalg.vector_norm(values, order).item()
    expected = values * rule.multiplier(norm)

    clipped = values.clone()
    assert normclip.clip_(clipped, rule, order).item() == pytest.approx(norm, rel=1e-15)
    torch.testing.assert_close(clipped, expected, rtol=1e-14, atol=0.0)

    array = values.numpy().copy()
    normclip.clip_(array, rule, order)
    assert array.tobytes() == clipped.numpy().tobytes()

    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    weight.grad = values.clone()
    normclip.clip_grad_norm_([weight], norm_type=order, rule=rule)
    assert torch.equal(weight.grad, clipped)

    weight.grad = values.clone()
    result = normclip.clip_grads_([("w", weight)], rule, norm_type=order)
    assert torch.equal(weight.grad, clipped)
    assert result.coefficient == pytest.approx(rule.multiplier(norm), rel=1e-14)

    weight.grad = values.clone()
    result = normclip.clip_grads_([("w", weight)], limits={"rest": rule}, groups={}, norm_type=order)
    assert torch.equal(weight.grad, clipped)


def test_a_number_means_hard() -> None:
    for number in (1.0, np.float32(1.0), 1):
        gradient = np.array([3.0, 4.0])
        normclip.clip_(gradient, number)
        other = np.array([3.0, 4.0])
        normclip.clip_(other, Hard(1.0))
        assert gradient.tobytes() == other.tobytes()


@pytest.mark.parametrize("arguments", [{}, {"max_norm": 1.0, "rule": Hard(1.0)}])
def test_a_limit_or_a_rule(arguments: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(ValueError, match="either max_norm, a number, or rule"):
        normclip.clip_grad_norm_([weight], **arguments)
    assert weight.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("argument", "expected"), [("max_norm", 0.5e-6), ("rule", 1e-6)])
def test_torchs_epsilon_belongs_to_its_formula_alone(argument: str, expected: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.tensor([1e-6], dtype=torch.float64)
    normclip.clip_grad_norm_([weight], **{argument: 1e-6})
    assert weight.grad.item() == pytest.approx(expected, rel=1e-12)


def test_unlimited_hard_clipping_only_reads() -> None:
    array = np.array([3.0, 4.0])
    array.flags.writeable = False
    assert normclip.clip_(array, Hard(math.inf)) == 5.0
    with pytest.raises(ValueError, match="read-only"):
        normclip.clip_(array, Soft(1.0))
