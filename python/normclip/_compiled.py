"""``clip_grad_norm_`` inside functions that :func:`torch.compile` compiles: one operator, which the compiler does not look into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from normclip import clip


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """What is traced in the place of :func:`normclip.clip_grad_norm_` with a limit."""
    items = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [item.grad for item in items if item.grad is not None]
    if not grads:
        return torch.tensor(0.0, device="cpu")
    return cast(Tensor, _operator(grads, float(max_norm), float(norm_type), error_if_nonfinite))


outside: Callable[..., Tensor] = torch.compiler.disable(clip.clip_grad_norm_)  # type: ignore[no-untyped-call]
"""The function itself, for which the graph is broken."""


def _clip(grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    parameters = cast("list[Tensor]", [SimpleNamespace(grad=grad) for grad in grads])
    return clip.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)


def _fake(grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    double = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    return grads[0].new_empty((), dtype=torch.float64 if double else torch.float32)


_operator = torch.library.custom_op("normclip::clip_grad_norm_", _clip, mutates_args=("grads",))
_operator.register_fake(_fake)
