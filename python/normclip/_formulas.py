"""Formulas of one scalar, written once for floats, NumPy and torch: scalar → float64 → the scalar's type, rounded once.

What has no number on the way, 0 times infinity or a product that overflows, has its limit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from normclip._core import strictly

if TYPE_CHECKING:
    import torch

Scalar = TypeVar("Scalar", float, "np.floating[Any]", "torch.Tensor")
"""A float, a NumPy scalar or a torch tensor, which may be on a device and stays there."""


def evaluate(formula: Callable[[Any, Any], Any], scalar: Scalar) -> Scalar:
    """A formula of the functions of numpy or torch and a scalar, computed in float64 where there is that, in the scalar's type.

    By numpy in IEEE arithmetic, whatever the thread is set to.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(scalar, torch.Tensor):
        found = formula(torch, scalar.float() if scalar.device.type == "mps" else scalar.double())
        return cast("Scalar", found.to(scalar.dtype) if scalar.is_floating_point() else found)
    return cast("Scalar", strictly(_by_numpy, formula, scalar))


def _by_numpy(formula: Callable[[Any, Any], Any], scalar: Any) -> Any:
    with np.errstate(all="ignore"):  # quotients by 0 are infinite, as in torch
        found = np.asarray(formula(np, np.float64(scalar)))
        return found.astype(scalar.dtype)[()] if isinstance(scalar, np.floating) else float(found)


class Fraction:
    """p/(s·(q + r·n)), within a few roundings wherever p, q, r and s are: no product in between overflows or underflows.

    p and s are positive, q and r at least one of them; the other may be 0, and leaves out its term, also where n is infinite.
    """

    def __init__(self, p: float, q: float, r: float, s: float = 1.0) -> None:
        self._level = _quotient([p], [s, q]) if q > 0.0 else []  # p/(s·q), what it is where n is small
        self._slope = _quotient([p], [s, r]) if r > 0.0 else []  # p/(s·r), what it is over n where n is large
        self._rise = _quotient([r], [q]) if q > 0.0 and r > 0.0 else []

    def at(self, xp: Any, n: Any) -> Any:
        """The fraction."""
        if not self._slope:
            return xp.full_like(n, _product(1.0, self._level))
        ratio = _product(n, self._rise) if self._level else math.inf
        large = _product(self._slope[0] / (1.0 + 1.0 / ratio) / n, self._slope[1:])
        if not self._level:
            return large
        return xp.where(ratio <= 1.0, _product(self._level[0] / (1.0 + ratio), self._level[1:]), large)

    def share(self, xp: Any, n: Any) -> Any:
        """r·n/(q + r·n)."""
        if not self._rise:
            return xp.full_like(n, 1.0 if self._slope else 0.0)
        ratio = _product(n, self._rise)
        return xp.where(ratio <= 1.0, ratio / (1.0 + ratio), 1.0 / (1.0 + 1.0 / ratio))


def _quotient(above: list[float], below: list[float]) -> list[float]:
    """The quotient of two products as factors: the first has its digits, and no product with them overflows but where all of it does."""
    digits, exponent = 1.0, 0
    for factor in above:
        digit, power = math.frexp(factor)
        digits, exponent = digits * digit, exponent + power
    for factor in below:
        digit, power = math.frexp(factor)
        digits, exponent = digits / digit, exponent - power
    powers = [max(-1000, min(exponent, 1000))]
    while exponent != sum(powers):
        powers.append(max(-1000, min(exponent - sum(powers), 1000)))
    return [math.ldexp(digits, powers[0]), *(2.0**power for power in powers[1:])]


def _product(x: Any, factors: Iterable[float]) -> Any:
    for factor in factors:
        x = x * factor
    return x


def times(xp: Any, n: Any, factor: float) -> Any:
    """A product of which nothing is left where the factor is 0, even of an infinite n."""
    return n * factor if factor != 0.0 else xp.where(n == n, 0.0, n)


def square(xp: Any, n: Any, factor: float) -> Any:
    """The same of n², whose square alone may overflow."""
    return n * factor * n if factor != 0.0 else times(xp, n, factor)
