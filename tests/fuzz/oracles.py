"""References that share nothing with normclip: sums in NumPy's widest float, and rounding as IEEE 754 has it.

The widest float has at least 64 significant bits and 15 of exponent: no product of two float64 overflows or underflows in it, and the sum
of 200 000 terms of one sign is within 2e-14 of the exact one.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fuzz.tensors import Lot
from support.oracle import TOLERANCE, exact_norm, magnitudes

FIGURES = ("count", "zeros", "nans", "infs", "l1", "l2", "linf", "rms", "mean_abs", "sign_cosine", "density")
TINY = math.ulp(0.0)
_NORMAL = float(np.finfo(np.float64).smallest_normal)
_EPSILON = float(np.finfo(np.float64).eps)
_LARGEST = float(np.finfo(np.float64).max)


def near(found: float, exact: Any, tolerance: float = TOLERANCE, slack: float = 0.0) -> bool:
    """Whether a float64 is a number of any precision within a relative tolerance, and what rounding to float64 costs."""
    if np.isnan(exact):
        return math.isnan(found)
    if np.isinf(exact):
        return found == exact
    if math.isinf(found):
        return abs(exact) * (1 + tolerance) >= _LARGEST
    allowed = tolerance * abs(exact) + slack + (TINY if abs(exact) <= 2 * _NORMAL else 0.0)
    return bool(abs(np.longdouble(found) - exact) <= allowed)


def near_norm(found: Any, exact: Any, mode: str = "nearest") -> bool:
    """As `near`, for what may be a tensor of float32, which other floating-point modes may have rounded otherwise."""
    if isinstance(found, float) or found.dtype == torch.float64:
        return near(float(found), exact)
    if not np.isfinite(exact):
        return near(float(found), exact)
    slack = TOLERANCE * exact
    with np.errstate(all="ignore"):
        least, most = np.float32(exact - slack), np.float32(exact + slack)
    if mode != "nearest":
        least = np.float32(0.0) if least < np.finfo(np.float32).smallest_normal else np.nextafter(least, np.float32(0))
        most = np.nextafter(most, np.float32(np.inf))
    return bool(least <= np.float32(found.item()) <= most)


def norm(made: Sequence[Lot], order: float = 2.0) -> float:
    """The norm of tensors as one vector, rounded once."""
    return exact_norm([each.array() for each in made], order)


def figures(arrays: Sequence[np.ndarray]) -> dict[str, Any]:
    """All statistics of arrays as one vector."""
    sizes = np.concatenate([magnitudes(array) for array in arrays]) if arrays else np.empty(0, np.longdouble)
    count, zeros = sizes.size, int(np.count_nonzero(sizes == 0))
    nans, infs = int(np.count_nonzero(np.isnan(sizes))), int(np.count_nonzero(np.isinf(sizes)))
    with np.errstate(all="ignore"):
        l1, l2 = sizes.sum(), np.sqrt((sizes * sizes).sum())
        linf = sizes.max() if count else np.longdouble(0)
        rms, mean = l2 / np.sqrt(np.longdouble(count)), l1 / np.longdouble(count)
        directed = np.isfinite(l2) and l2 > 0
        cosine = l1 / (np.sqrt(np.longdouble(count - zeros)) * l2) if directed else np.longdouble(np.nan)
        density = l1 / l2 * (l1 / l2) / count if directed else np.longdouble(np.nan)
    values = (count, zeros, nans, infs, l1, l2, linf, rms, mean, cosine, density)
    return dict(zip(FIGURES, values, strict=True))


def wrong_figures(found: Any, exact: dict[str, Any]) -> list[str]:
    """Which figures are not what they should be. Those that a norm beyond float64 leads to may be anything."""
    names = FIGURES
    if np.isfinite(exact["l2"]) and exact["l2"] >= _LARGEST:
        names = tuple(name for name in names if name not in ("rms", "mean_abs", "sign_cosine", "density"))
    pairs = [(name, float(getattr(found, name)), exact[name]) for name in names]
    return [f"{name} is {value!r}, not {true!r}" for name, value, true in pairs if not near(value, true)]


def scaled(array: np.ndarray, dtype: str, factor: float) -> np.ndarray:
    """The elements times a factor: multiplied in float32 (of wide types in float64), and rounded to nearest even."""
    if np.iscomplexobj(array):
        real = "float32" if dtype == "complex64" else "float64"
        return scaled(np.ascontiguousarray(array).view(real), real, factor).view(array.dtype).reshape(array.shape)
    with np.errstate(all="ignore"):
        if dtype == "float64":
            return array * np.float64(factor)
        size = abs(factor)
        fits = size == 0.0 or float(np.finfo(np.float32).smallest_normal) <= size <= float(np.finfo(np.float32).max)
        # A product of two float32 is exact in float64.
        wide = array.astype(np.float64) * (np.float64(np.float32(factor)) if fits else np.float64(factor))
        return rounded(wide.astype(np.float32), dtype)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to an element type; bfloat16 as float32."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array)).to(torch.bfloat16).float().numpy().reshape(array.shape)
    return array.astype(dtype)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """The same bits, with NaN as one value."""
    if np.iscomplexobj(a):
        a, b = (np.stack([x.real, x.imag]) for x in (a, b))
    equal = (a == b) & (np.signbit(a) == np.signbit(b))
    return bool((equal | (np.isnan(a) & np.isnan(b))).all())


def between(found: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether each number lies between two, NaN where they are."""
    if np.iscomplexobj(found):
        found, low, high = (np.stack([x.real, x.imag]) for x in (found, low, high))
    with np.errstate(all="ignore"):
        inside = (np.minimum(low, high) <= found) & (found <= np.maximum(low, high))
    return bool((inside | (np.isnan(found) & np.isnan(low))).all())


def coefficients(limit: float, norm: float, epsilon: float = 0.0) -> tuple[float, float]:
    """The least and the largest that min(1, limit/(norm + epsilon)) may be when the norm is within its tolerance."""

    def at(norm: float) -> float:
        total = np.longdouble(norm) + epsilon
        with np.errstate(all="ignore"):
            return 1.0 if total <= limit or limit == math.inf else float(limit / total)

    if math.isnan(norm):
        return (1.0, 1.0) if limit == math.inf else (math.nan, math.nan)
    slack = TOLERANCE * norm + (TINY if norm <= 2 * _NORMAL else 0.0) if 0.0 < norm < math.inf else 0.0
    low, high = at(norm + slack), at(max(norm - slack, 0.0))
    # Sum and quotient are rounded, in any direction.
    low = low if low == 1.0 else max(0.0, low * (1 - 4 * _EPSILON) - TINY)
    return low, min(1.0, high * (1 + 4 * _EPSILON) + (TINY if high > 0.0 else 0.0))


def wrongly_clipped(each: Lot, before: np.ndarray, bounds: tuple[float, float]) -> str | None:
    """What is wrong with a tensor that was clipped by a coefficient within bounds, if anything."""
    low, high = bounds
    after = each.array().copy()
    if low == 1.0 and not each.untouched:
        return "it was written though nothing had to be clipped"
    if high == 1.0 and each.untouched:
        return None
    if not between(after, scaled(before, each.dtype, low), scaled(before, each.dtype, high)):
        return f"it is {after!r} and was {before!r}: the coefficient is from {low!r} to {high!r}"
    return wrongly_placed(each)


def wrongly_placed(each: Lot) -> str | None:
    """Whether memory around a tensor was written: with the old elements put back, all is as it was."""
    each.restore()
    return None if each.untouched else "memory around it was written"
