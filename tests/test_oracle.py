"""The oracle itself, against arithmetic with fractions, which has no error at all."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from support.oracle import exact_norm
from support.tensors import REAL_DTYPES, Recipe


def is_root(root: float, order: int, power: Fraction, tolerance: float) -> bool:
    """Whether a number is the root of this order within a relative tolerance, decided without rounding."""
    slack = Fraction(tolerance)
    bounds = sorted((Fraction(root) * factor) ** order for factor in (1 - slack, 1 + slack))
    return bounds[0] <= power <= bounds[1]


@pytest.mark.parametrize("order", [1, 2, 3, 7, -1, -2])
@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("exponents", ["all", "small", "large"])
def test_integer_orders_agree_with_fractions(dtype: str, order: int, exponents: str) -> None:
    least = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1000}[dtype]
    span = {"all": (least, -least // 2), "small": (least, least + 3), "large": (-least - 8, -least - 4)}[exponents]
    values = Recipe(dtype, size=30, library="torch", exponents=span).values()
    power = sum((abs(Fraction(value)) ** order for value in values.tolist()), start=Fraction(0))
    assert is_root(exact_norm([values[:11], values[11:]], order), order, power, 2**-52)


def test_broken_orders_agree_with_integer_ones_of_powers() -> None:
    # Σ|x|^2.5 of fourth powers is Σ|y|^10.
    y = np.arange(1.0, 50.0)
    assert exact_norm([y**4], 2.5) == pytest.approx(exact_norm([y], 10.0) ** 4, rel=1e-15)


def test_complex_numbers_count_by_their_modulus() -> None:
    values = np.array([3 + 4j, 0, -5j, 1e200 + 1e200j])
    assert exact_norm([values[:3]], 1) == 10.0
    assert exact_norm([values[:3]], 2) == math.sqrt(50.0)
    assert exact_norm([values], math.inf) == pytest.approx(math.sqrt(2) * 1e200, rel=1e-15)
    assert exact_norm([values], -math.inf) == 0.0
    assert exact_norm([values], 0) == 3.0


@pytest.mark.parametrize(
    ("values", "order", "expected"),
    [
        ([], 2.0, 0.0),
        ([], -math.inf, 0.0),
        ([math.nan, math.inf, 0.0], 0.0, math.nan),
        ([math.nan, 1.0], -math.inf, math.nan),
        ([math.inf, 1.0], 2.0, math.inf),
        ([math.inf, 0.0, 1.0], 0.0, 2.0),
        ([math.inf, 2.0], -1.0, 2.0),
        ([math.inf, math.inf], -1.0, math.inf),
        ([0.0, 2.0], -1.0, 0.0),
        ([0.0, 0.0], 2.5, 0.0),
    ],
)
def test_special_values(values: list[float], order: float, expected: float) -> None:
    for tensor in (np.array(values), torch.tensor(values)):
        np.testing.assert_equal(exact_norm([tensor], order), expected)
