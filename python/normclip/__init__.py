"""Exact, fast gradient norms and gradient clipping.

Drop-ins for :mod:`torch.nn.utils`: :func:`clip_grad_norm_`, :func:`clip_grads_with_norm_`, :func:`clip_grad_value_` and
:func:`get_total_norm`. For plain lists of torch tensors or NumPy arrays: :func:`total_norm`, :func:`clip_`, :func:`scale_` and
:func:`clamp_`.
"""

from normclip._core import __version__, get_num_threads, set_num_threads
from normclip.clip import clamp_, clip_, clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, scale_
from normclip.norms import get_total_norm, total_norm

__all__ = [
    "__version__",
    "clamp_",
    "clip_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_num_threads",
    "get_total_norm",
    "scale_",
    "set_num_threads",
    "total_norm",
]
