"""Backends: a list of tensors, on any device → a :class:`Batch`, which measures and changes them.

The rest of the package imports from here, and from no module below. The architecture document has a line for each of these modules.
"""

from normclip._backends.choose import (
    clip_grads,
    collect,
    collect_grads,
    dot,
    moments,
    optimizer_step,
    share_error,
    sharing_errors,
    warn_caller,
)
from normclip._backends.protocol import AdamWSettings, AnyNorm, Batch, Norm, Settings, SGDSettings, Step
from normclip._backends.totals import hard_coefficient
from normclip._core import Stepper

__all__ = [
    "AdamWSettings",
    "AnyNorm",
    "Batch",
    "Norm",
    "SGDSettings",
    "Settings",
    "Step",
    "Stepper",
    "clip_grads",
    "collect",
    "collect_grads",
    "dot",
    "hard_coefficient",
    "moments",
    "optimizer_step",
    "share_error",
    "sharing_errors",
    "warn_caller",
]
