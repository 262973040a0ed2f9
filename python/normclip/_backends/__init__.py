"""Backends: lists of tensors → batches that measure and change themselves, wherever the tensors are.

This is the door through which the rest of the package comes. The architecture document has a line for each module.
"""

from normclip._backends.choose import collect, collect_grads, dot, failing_together, moments, optimizer_step, warn_caller
from normclip._backends.protocol import AnyNorm, Batch, Member, Norm, Settings, Step
from normclip._backends.totals import hard_coefficient

__all__ = [
    "AnyNorm",
    "Batch",
    "Member",
    "Norm",
    "Settings",
    "Step",
    "collect",
    "collect_grads",
    "dot",
    "failing_together",
    "hard_coefficient",
    "moments",
    "optimizer_step",
    "warn_caller",
]
