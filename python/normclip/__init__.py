"""Exact, fast gradient norms and gradient clipping.

- Drop-ins for :mod:`torch.nn.utils`: :func:`clip_grad_norm_`, :func:`clip_grads_with_norm_`, :func:`clip_grad_value_` and
  :func:`get_total_norm`. :func:`patch_torch` puts them in torch's place, so that frameworks use them.
- For lists of torch tensors or NumPy arrays: :func:`total_norm`, :func:`clip_`, :func:`scale_` and :func:`clamp_`.
- Many statistics from one read: :func:`stats`, :func:`grad_stats`, :class:`Moments`, :func:`dot`, and :func:`clip_grads_`, which also
  clips.
- Clip rules: :mod:`normclip.rules` has rules other than a limit on the norm, :mod:`normclip.thresholds` limits that follow training, and
  :mod:`normclip.theory` the theory behind them.
- Training: :mod:`normclip.monitor` logs gradients, :mod:`normclip.optim` has optimizers that clip in their step without writing gradients,
  and :mod:`normclip.distributed` describes clipping by many processes. :mod:`normclip.integrations` has callbacks of frameworks.
- Types for annotations of your own: :mod:`normclip.typing`.

Torch tensors may be on any device. Modules are imported when they are first used: after ``import normclip``, ``normclip.optim`` is there.
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
    return sorted({*globals(), *_MODULES})
