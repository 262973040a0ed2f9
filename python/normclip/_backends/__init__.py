"""Backends: a list of tensors, on any device → a :class:`Batch`, which measures and changes them.

The rest of the package imports from here, and from no module below. The architecture document has a line for each of these modules.
"""

from normclip._backends.choose import collect, collect_grads, dot, optimizer_step, sharing_errors
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
    "listed",
    "optimizer_step",
    "sharing_errors",
]
