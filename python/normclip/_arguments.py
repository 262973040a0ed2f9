"""Checks of arguments, which raise an error that names the argument and what to pass instead."""

from __future__ import annotations

import math
import types
from typing import Any

from normclip._core import strictly
from normclip.typing import Order

TORCH_EPSILON = 1e-6
"""The number that torch's clipping adds to the norm before dividing by it."""


def import_torch() -> types.ModuleType:
    """Torch.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("this needs torch, which is not installed: pip install 'normclip[torch]'") from error
    return torch


def check_number(name: str, value: Any, expected: str = "a number", *, text: bool = False) -> float:
    """A number, or what can be converted to one, as a float. Text only where torch takes it, too.

    Raises:
        TypeError, ValueError: It cannot be; the message names it.
    """
    if type(value) is float:
        return value
    try:
        if isinstance(value, (str, bytes)) and not text:
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is torch's
        if isinstance(value, type):
            given = f"the class {value.__name__}"
        elif isinstance(value, (str, bytes, int)):
            given = repr(value) if len(str(value)) < 100 else "too long"
        else:
            shape = getattr(value, "shape", None)
            given = f"a {type(value).__name__}" + ("" if shape is None else f" of shape {list(shape)}")
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} is {given}: pass {expected}") from error


def check_order(name: str, value: Order) -> float:
    """The order of a norm as a float.

    Raises:
        TypeError, ValueError: It is no number, or NaN.
    """
    value = check_number(name, value, "a number, inf or -inf", text=True)
    if math.isnan(value):
        raise ValueError(f"{name} is NaN: pass a number, inf or -inf")
    return value


def check_limit(name: str, value: float) -> float:
    """An upper limit as a float.

    Raises:
        TypeError, ValueError: It is no number, negative or NaN.
    """
    value = check_number(name, value, text=True)
    if not value >= 0.0:
        raise ValueError(f"{name} is {value}: pass a number that is not negative, or inf for no limit")
    return abs(value)  # a coefficient of -0 would turn signs round


def check_positive(name: str, value: float) -> float:
    """A positive number as a float.

    Raises:
        TypeError, ValueError: It is no number, not positive, or not finite.
    """
    value = check_number(name, value)
    # Once more in IEEE arithmetic: a thread may be set to take subnormal numbers for 0.
    if not (_is_positive(value) or strictly(_is_positive, value)):
        raise ValueError(f"{name} is {value}: pass a positive, finite number")
    return value


def _is_positive(value: float) -> bool:
    return 0.0 < value < math.inf


def check_not_negative(name: str, value: float) -> float:
    """A number that may be 0 as a float.

    Raises:
        TypeError, ValueError: It is no number, negative, or not finite.
    """
    value = check_number(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: pass a finite number that is not negative")
    return value


def check_smoothness(L0: float, L1: float) -> tuple[float, float]:
    """The constants of an (L0, L1)-smooth function as floats.

    Raises:
        TypeError, ValueError: One is no number, negative, or not finite, or both are 0.
    """
    L0, L1 = check_not_negative("L0", L0), check_not_negative("L1", L1)
    if L0 == L1 == 0.0:
        raise ValueError("L0 and L1 are both 0, which allows steps of any length: pass a positive number for one of them")
    return L0, L1


def check_count(name: str, value: int, least: int = 0) -> int:
    """A whole number as an int.

    Raises:
        TypeError, ValueError: It is no number, not whole, or below the least that is allowed.
    """
    number = check_number(name, value, "a whole number")
    if not number >= least or not number.is_integer():
        raise ValueError(f"{name} is {value}: pass a whole number, at least {least}")
    return int(number)


def check_share(name: str, value: float) -> float:
    """A number between 0 and 1, exclusive, as a float.

    Raises:
        TypeError, ValueError: It is no number, or not between 0 and 1.
    """
    value = check_number(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is {value}: pass a number above 0 and below 1")
    return value
