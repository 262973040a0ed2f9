"""Backends: lists of tensors → batches that measure and change themselves, wherever the tensors are.

This is the door through which the rest of the package comes. The architecture document has a line for each module.
"""

from normclip._backends.choose import collect, collect_grads, dot, failing_together, optimizer_step
from normclip._backends.local import listed
from normclip._backends.protocol import NORMS, AnyNorm, Batch, Member, Norm, Settings, Step

__all__ = [
    "NORMS",
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
    "listed",
    "optimizer_step",
]
