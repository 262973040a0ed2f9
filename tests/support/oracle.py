"""Norms to compare with, exact to about 1e-18.

Everything is computed in NumPy's widest float relative to the element that counts most, so that no power overflows and none that
matters underflows. On x86-64 that float has 64 significant bits, on aarch64 113. `test_oracle.py` holds it against rational arithmetic.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from support.tensors import as_array

# What normclip promises: relative, at any size.
TOLERANCE = 1e-12


def exact_norm(tensors: Sequence[Any], order: float = 2.0) -> float:
    """The norm of all elements as one vector: NaN if one is NaN, 0 if there are none."""
    sizes = np.concatenate([magnitudes(tensor) for tensor in tensors]) if tensors else np.empty(0, np.longdouble)
    with np.errstate(all="ignore"):
        return float(_norm(sizes, order))


def magnitudes(tensor: Any) -> np.ndarray:
    """The absolute values of all elements, in one dimension."""
    array = as_array(tensor)
    wide = array.astype(np.clongdouble if np.iscomplexobj(array) else np.longdouble).ravel()
    if not np.iscomplexobj(wide):
        return np.abs(wide)
    # C's hypot(inf, NaN) is inf, and here NaN wins.
    return np.where(np.isnan(wide), np.nan, np.hypot(wide.real, wide.imag))


def _norm(sizes: np.ndarray, order: float) -> Any:
    if sizes.size == 0:
        return 0.0
    if np.isnan(sizes).any():
        return math.nan
    if order == 0.0:
        return np.count_nonzero(sizes)
    most = sizes.max() if order > 0.0 else sizes.min()
    if math.isinf(order) or most in (0.0, math.inf):
        return most
    return most * ((sizes / most) ** np.longdouble(order)).sum() ** (1 / np.longdouble(order))


def assert_norm(measured: Any, tensors: Sequence[Any], order: float = 2.0) -> None:
    """Check value, type and dtype of what normclip returned for these tensors."""
    exact = exact_norm(tensors, order)
    of_torch = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if of_torch:
        double = any(tensor.dtype in (torch.float64, torch.complex128, np.float64, np.complex128) for tensor in tensors)
        assert isinstance(measured, torch.Tensor)
        assert (measured.shape, measured.device.type) == ((), "cpu")
        assert measured.dtype is (torch.float64 if double else torch.float32)
        rounding: type[np.floating] = np.float64 if double else np.float32
    else:
        assert type(measured) is float
        rounding = np.float64
    assert_near(float(measured), exact, rounding)


def assert_near(measured: float, exact: float, rounding: type[np.floating] = np.float64) -> None:
    """Check that a number is what one within the promised tolerance is rounded to."""
    if math.isnan(exact):
        assert math.isnan(measured)
        return
    # A subnormal result has too few bits for the tolerance: its last one may differ.
    slack = TOLERANCE * exact + (math.ulp(0.0) if exact < np.finfo(np.float64).smallest_normal else 0.0)
    with np.errstate(over="ignore", under="ignore"):
        least, most = (rounding(bound) for bound in ((exact - slack, exact + slack) if exact < math.inf else (exact, exact)))
    assert least <= measured <= most, f"{measured!r} is not {exact!r}: off by {abs(measured - exact) / exact if exact else measured:.1e}"
