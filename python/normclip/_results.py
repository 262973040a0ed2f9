"""Turns the norms that backends return into what users get, and reports what was written to autograd."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from normclip import _core
from normclip._arguments import import_torch
from normclip._backends import AnyNorm, Batch

if TYPE_CHECKING:
    from torch import Tensor


mark_written = _core.mark_written
"""Raises the version counters of torch tensors that were written, so that autograd notices the change."""


def as_tensor(norm: AnyNorm, tensors: Batch) -> Tensor:
    """A norm as torch returns it: a 0-dim tensor, float64 if any of the tensors is of double precision, else float32.

    A norm on a device stays there; a float becomes a CPU tensor.
    """
    if not isinstance(norm, float):
        return norm.rounded
    import_torch()
    return _core.as_tensor(norm, tensors.is_double)


def as_given(norm: AnyNorm, tensors: Batch) -> Tensor | float:
    """A norm in the kind of its tensors: a torch tensor for torch tensors, else a float."""
    return norm if isinstance(norm, float) and not tensors.is_torch else as_tensor(norm, tensors)


def check_finite(norm: AnyNorm, norm_type: float, tensors: Batch, *, source: str) -> None:
    """Raise if a norm is not finite, as torch does. Waits for the device of the norm.

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
