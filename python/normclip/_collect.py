"""What the user passes, checked, and norms → what the user gets back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from normclip import _core
from normclip._backend import AnyNorm, Batch

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


def as_tensor(norm: AnyNorm, tensors: Batch) -> torch.Tensor:
    """A norm as torch returns it: without dimensions, float64 if any of the tensors is, else float32. On the CPU, or where it is."""
    if not isinstance(norm, float):
        return norm.rounded
    import torch

    if tensors.is_double:
        return torch.tensor(norm, dtype=torch.float64, device="cpu")
    # To the nearest float32, subnormal ones too, whatever this thread is set to.
    return _core.strictly(torch.tensor, norm, dtype=torch.float32, device="cpu")


def as_given(norm: AnyNorm, tensors: Batch) -> torch.Tensor | float:
    """A norm in the terms of its tensors: a torch tensor for theirs, a float for others."""
    return norm if isinstance(norm, float) and not tensors.is_torch else as_tensor(norm, tensors)


def mark_written(tensors: list[Any]) -> None:
    """Let torch's autograd know that these tensors have changed."""
    if tensors:
        import torch

        torch.autograd.graph.increment_version(tensors)


def check_finite(norm: AnyNorm, norm_type: float, tensors: Batch, *, source: str) -> None:
    """Refuse a norm that is not finite, as torch does. Waits for the device that computes it.

    Raises:
        RuntimeError: It is NaN or infinite; the message names the first tensors with such elements.
    """
    if math.isfinite(float(norm)):
        return
    found = [f"{name} ({nans} NaN, {infs} inf)" for name, nans, infs in tensors.nonfinite()]
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise RuntimeError(
        f"The total norm of order {norm_type} for {source} is non-finite, so it cannot be clipped. To disable this error and scale "
        f"the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`. Non-finite: {shown or 'the norm itself'}"
    )
