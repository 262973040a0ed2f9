"""Formulas of one scalar, written once for floats, NumPy and torch: scalar → float64 → the scalar's type, rounded once.

Where plain arithmetic would give NaN (0 times infinity) or overflow on the way to a finite result, these return the mathematical limit.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np

from normclip._core import strictly
from normclip.typing import Scalar


def evaluate(formula: Callable[[Any, Any], Any], scalar: Scalar) -> Scalar:
    """Evaluate a formula in float64 (float32 on MPS) and return the result in the scalar's type, on its device.

    Args:
        formula: Called with numpy or torch, whose functions it uses, and the scalar as float64. May return a plain number.
        scalar: The scalar, or an array or tensor of several. All but tensors are computed in IEEE arithmetic, even if this thread flushes
            subnormal numbers to 0.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(scalar, torch.Tensor):
        wide = scalar.float() if scalar.device.type == "mps" else scalar.double()
        found = formula(torch, wide)
        found = found if isinstance(found, torch.Tensor) else torch.full_like(wide, found)
        return cast("Scalar", found.to(scalar.dtype) if scalar.is_floating_point() else found)
    return cast("Scalar", strictly(_by_numpy, formula, scalar))


def _by_numpy(formula: Callable[[Any, Any], Any], scalar: Any) -> Any:
    with np.errstate(all="ignore"):  # a quotient by 0 is infinite without a warning, as in torch
        if isinstance(scalar, np.ndarray):
            each = [float(formula(np, n)) for n in scalar.astype(np.float64).flat]
            return np.array(each).reshape(scalar.shape).astype(scalar.dtype if scalar.dtype.kind == "f" else np.float64)
        found = np.asarray(formula(np, np.float64(scalar)), np.float64)
        return found.astype(scalar.dtype)[()] if isinstance(scalar, np.floating) else float(found)


def least(scalars: Sequence[Any]) -> Any:
    """The smallest of scalars of one type, or of each place in arrays or tensors of one type; NaN if one is NaN."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(scalars[0], torch.Tensor):
        return functools.reduce(torch.minimum, scalars)
    found = strictly(functools.reduce, np.minimum, scalars)  # subnormal numbers are none the smaller where this thread flushes them
    return found if isinstance(scalars[0], (np.floating, np.ndarray)) else float(found)


class Fraction:
    """p/(s·(q + r·n)), within a few roundings for any p, q, r and s: no intermediate product overflows or underflows.

    p and s must be positive, and at least one of q and r. The other may be 0; then its term is left out, even where n is infinite.
    """

    def __init__(self, p: float, q: float, r: float, s: float = 1.0) -> None:
        self._level = _quotient([p], [s, q]) if q > 0.0 else []  # p/(s·q), which the fraction tends to for n → 0
        self._slope = _quotient([p], [s, r]) if r > 0.0 else []  # p/(s·r), which n times the fraction tends to for n → ∞
        self._rise = _quotient([r], [q]) if q > 0.0 and r > 0.0 else []

    def at(self, xp: Any, n: Any) -> Any:
        """The fraction at n, by the functions of ``xp``, which is numpy or torch."""
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
    """The quotient of two products, as factors to multiply by one after the other.

    The first holds the digits and the others are powers of 2, so that multiplying by all of them overflows only if the result does.
    """
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
    """n·factor, which is 0 where the factor is 0, even for an infinite n. NaN stays NaN."""
    return n * factor if factor != 0.0 else xp.where(n == n, 0.0, n)


def square(xp: Any, n: Any, factor: float) -> Any:
    """n²·factor, which overflows only if the result does, and is 0 where the factor is 0, as in :func:`times`."""
    return n * factor * n if factor != 0.0 else times(xp, n, factor)
