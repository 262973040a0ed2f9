"""Exact, fast gradient norms and gradient clipping.

- Drop-ins for ``torch.nn.utils``: ``clip_grad_norm_``, ``clip_grads_with_norm_``, ``clip_grad_value_`` and ``get_total_norm``.
  ``patch_torch`` puts them in torch's place, so that frameworks use them.
- For lists of torch tensors or NumPy arrays: ``total_norm``, ``clip_``, ``scale_`` and ``clamp_``.
- Many statistics from one read: ``stats``, ``grad_stats``, ``Moments``, ``dot``, and ``clip_grads_``, which also clips.
- Clip rules: ``normclip.rules`` has rules other than a limit on the norm, ``normclip.thresholds`` limits that follow training, and
  ``normclip.theory`` the theory behind them.
- Training: ``normclip.monitor`` logs gradients, ``normclip.optim`` has optimizers that clip in their step without writing gradients,
  ``normclip.distributed`` says how to clip in many processes, and ``normclip.integrations`` has callbacks for frameworks.
- Types for annotations of your own: ``normclip.typing``.

Torch tensors may be on any device. Modules are there after ``import normclip``, and are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from normclip._core import Moments, __version__, get_num_threads, set_num_threads
from normclip.clip import clamp_, clip_, clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, scale_
from normclip.clip_grads import Clipped, clip_grads_
from normclip.norms import get_total_norm, total_norm
from normclip.patch import Patch, patch_torch
from normclip.products import DotStats, dot, dot_stats
from normclip.statistics import PerTensor, Stats, grad_stats, stats

if TYPE_CHECKING:
    import types

    from normclip import distributed as distributed
    from normclip import integrations as integrations
    from normclip import monitor as monitor
    from normclip import optim as optim
    from normclip import rules as rules
    from normclip import theory as theory
    from normclip import thresholds as thresholds
    from normclip import typing as typing

__all__ = [
    "Clipped",
    "DotStats",
    "Moments",
    "Patch",
    "PerTensor",
    "Stats",
    "__version__",
    "clamp_",
    "clip_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_",
    "clip_grads_with_norm_",
    "dot",
    "dot_stats",
    "get_num_threads",
    "get_total_norm",
    "grad_stats",
    "patch_torch",
    "scale_",
    "set_num_threads",
    "stats",
    "total_norm",
]

_MODULES = frozenset({"distributed", "integrations", "monitor", "optim", "rules", "theory", "thresholds", "typing"})


def __getattr__(name: str) -> "types.ModuleType":
    """A public module, which is imported for this. Some need torch, which only NumPy's users may lack."""
    if name not in _MODULES:
        raise AttributeError(f"module 'normclip' has no attribute {name!r}")
    return importlib.import_module(f"normclip.{name}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
