"""Norms of backends → what users get."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from normclip import _core
from normclip._arguments import import_torch
from normclip._backends import AnyNorm, Batch

if TYPE_CHECKING:
    from torch import Tensor


def as_tensor(norm: AnyNorm, tensors: Batch) -> Tensor:
    """A norm as torch returns it: without dimensions, float64 if any of the tensors is, else float32. On the CPU, or where it is."""
    if not isinstance(norm, float):
        return norm.rounded
    torch = import_torch()
    found: Tensor
    if tensors.is_double:
        found = torch.tensor(norm, dtype=torch.float64, device="cpu")
    else:
        # To the nearest float32, subnormal ones too, whatever this thread is set to.
        found = _core.strictly(torch.tensor, norm, dtype=torch.float32, device="cpu")
    return found


def as_given(norm: AnyNorm, tensors: Batch) -> Tensor | float:
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
