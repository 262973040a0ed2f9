"""``clip_grad_norm_`` inside functions that :func:`torch.compile` compiles: one custom operator, which is not traced into."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from normclip._arguments import TORCH_EPSILON, check_limit, check_order
from normclip._backends import collect
from normclip._results import as_tensor, check_finite, mark_written
from normclip.typing import Order


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: Order, error_if_nonfinite: bool) -> Tensor:
    """The version of :func:`normclip.clip_grad_norm_` with ``max_norm`` that the compiler traces."""
    items = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [item.grad for item in items if item.grad is not None]
    if not grads:
        return torch.tensor(0.0, device="cpu")
    return cast(Tensor, _operator(grads, float(max_norm), float(norm_type), error_if_nonfinite))


def _call(function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
    return function(*arguments, **keywords)


outside: Callable[..., Tensor] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
"""Calls a function outside of the compiled graph, which breaks the graph here."""


def _clip(grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    limit, order = check_limit("max_norm", max_norm), check_order("norm_type", norm_type)
    batch = collect(list(grads), writable=limit < math.inf)
    norm = batch.norm(order)
    if error_if_nonfinite:
        check_finite(norm, order, batch, source="gradients from `parameters`")
    mark_written(batch.clip_(limit, norm, TORCH_EPSILON))
    return as_tensor(norm, batch)


def _fake(grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    double = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    return grads[0].new_empty((), dtype=torch.float64 if double else torch.float32)


_operator = torch.library.custom_op("normclip::clip_grad_norm_", _clip, mutates_args=("grads",))
_operator.register_fake(_fake)
