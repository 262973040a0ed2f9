"""What users pass, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch


class SupportsDLPack(Protocol):
    """An array or tensor that shares its memory by the DLPack protocol."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


Tensors: TypeAlias = "SupportsDLPack | Iterable[SupportsDLPack]"
Parameters: TypeAlias = "torch.Tensor | Iterable[torch.Tensor]"


def check_order(name: str, value: float) -> float:
    """The order of a norm as a float.

    Raises:
        ValueError: It is NaN.
    """
    value = float(value)
    if math.isnan(value):
        raise ValueError(f"{name} is NaN: pass a number, inf or -inf")
    return value


def check_limit(name: str, value: float) -> float:
    """An upper limit as a float.

    Raises:
        ValueError: It is negative or NaN.
    """
    value = float(value)
    if not value >= 0.0:
        raise ValueError(f"{name} is {value}: pass a number that is not negative, or inf for no limit")
    return abs(value)  # a coefficient of -0 would turn signs round


def check_positive(name: str, value: float) -> float:
    """A positive number as a float.

    Raises:
        ValueError: It is not positive, or not finite.
    """
    value = float(value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value}: pass a positive, finite number")
    return value


def check_not_negative(name: str, value: float) -> float:
    """A number that may be 0 as a float.

    Raises:
        ValueError: It is negative, or not finite.
    """
    value = float(value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: pass a finite number that is not negative")
    return value
