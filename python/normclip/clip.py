"""Clipping, scaling and clamping in place. All or nothing: every argument is checked before the first byte is written."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

from normclip._arguments import TORCH_EPSILON, check_limit, check_number, check_order, import_torch
from normclip._backends import AnyNorm, Batch, clip_grads, collect, collect_grads, warn_caller
from normclip._results import as_given, as_tensor, check_finite, mark_written
from normclip.rules import Hard, Rule, as_rule
from normclip.typing import Order, Parameters, Tensors

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["clamp_", "clip_", "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "scale_"]


@overload
def clip_(tensors: npt.NDArray[Any], rule: Rule | float, ord: Order = 2.0) -> float: ...
@overload
def clip_(tensors: Parameters, rule: Rule | float, ord: Order = 2.0) -> torch.Tensor: ...
@overload
def clip_(tensors: Iterable[npt.NDArray[Any]], rule: Rule | float, ord: Order = 2.0) -> float: ...
@overload
def clip_(tensors: Tensors, rule: Rule | float, ord: Order = 2.0) -> torch.Tensor | float: ...
def clip_(tensors: Tensors, rule: Rule | float, ord: Order = 2.0) -> torch.Tensor | float:
    """Scale tensors in place so that their norm is at most a limit, or by another rule.

        x ← x · c(‖x‖ₚ),  c(n) = min(1, γ/n) for a number γ

    Unlike torch's formula there is no epsilon: a norm above the limit γ becomes γ within rounding. If the norm is within the limit, nothing
    is written. A norm of NaN makes all elements NaN, an infinite one makes finite elements 0, as in torch.

    Args:
        tensors: As for :func:`normclip.total_norm`, writable and without overlap. The same memory listed twice is scaled once.
        rule: The limit γ ≥ 0, in the unit of the elements, where ``inf`` measures only; or one of :mod:`normclip.rules`, which is not
            asked where there are no elements.
        ord: The order p of the norm, as for :func:`normclip.total_norm`.

    Returns:
        The norm before clipping, as :func:`normclip.total_norm` returns it.

    Raises:
        TypeError: As for :func:`normclip.total_norm`.
        ValueError: The limit is negative or NaN, or a tensor is read-only, exported as a copy, expanded or overlaps another. Nothing has
            changed.
        RuntimeError: A rule has replaced the memory of a tensor. Nothing has changed.

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013 (arXiv 1211.5063).

    Example:
        >>> import numpy as np
        >>> gradient = np.array([3.0, 4.0], dtype=np.float32)
        >>> clip_(gradient, 1.0)
        5.0
        >>> gradient
        array([0.6, 0.8], dtype=float32)
    """
    rule = _limit_or_rule("rule", rule)
    ord = check_order("ord", ord)
    batch = collect(tensors, writable=rule < math.inf if isinstance(rule, float) else rule.writes)
    norm = batch.norm(ord)
    _clip(batch, rule, norm)
    return as_given(norm, batch)


def scale_(tensors: Tensors, factor: float) -> None:
    """Multiply tensors in place: x ← c·x.

    float16, bfloat16 and float32 elements are multiplied in float32, float64 ones in float64, and rounded to nearest even.

    Args:
        tensors: As for :func:`clip_`.
        factor: The finite factor c. 1 writes nothing.

    Raises:
        TypeError: As for :func:`normclip.total_norm`.
        ValueError: ``factor`` is not finite, or a tensor cannot be written, as for :func:`clip_`. Nothing has changed.

    Example:
        >>> import numpy as np
        >>> gradient = np.array([1.0, -2.0])
        >>> scale_(gradient, 0.5)
        >>> gradient
        array([ 0.5, -1. ])
    """
    factor = check_number("factor", factor)
    if not math.isfinite(factor):
        raise ValueError(f"factor is {factor}: pass a finite number")
    batch = collect(tensors, writable=True)
    if factor != 1.0:
        mark_written(batch.scale_(factor))


def clamp_(tensors: Tensors, limit: float) -> None:
    """Clamp each element in place: xᵢ ← min(max(xᵢ, −λ), λ).

    The limit is rounded to the element type. NaN stays NaN. Only memory that holds an element beyond the limit is written.

    Args:
        tensors: As for :func:`clip_`, of real elements.
        limit: The limit λ ≥ 0; ``inf`` changes nothing.

    Raises:
        TypeError: As for :func:`normclip.total_norm`, or a tensor is complex.
        ValueError: ``limit`` is negative or NaN, or a tensor cannot be written, as for :func:`clip_`. Nothing has changed.

    Example:
        >>> import numpy as np
        >>> gradient = np.array([0.25, -2.0])
        >>> clamp_(gradient, 0.5)
        >>> gradient
        array([ 0.25, -0.5 ])
    """
    limit = check_limit("limit", limit)
    mark_written(collect(tensors, writable=True).clamp_(limit))


def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float | None = None,
    norm_type: Order = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    rule: Rule | float | None = None,
    process_groups: Sequence[ProcessGroup] | None = None,
) -> torch.Tensor:
    """Drop-in for :func:`torch.nn.utils.clip_grad_norm_`: clip the norm of all gradients together.

        g ← g · min(1, γ / (‖g‖ₚ + 1e-6))

    torch's formula with an exact norm. Gradients are written only where the coefficient is below 1. With a rule of :mod:`normclip.rules`
    instead of the limit γ they are multiplied by its coefficient, without the 1e-6.

    On a CUDA device, norm and coefficient stay on the device and the call does not wait for them. It can be captured in a CUDA graph after
    one call with the same gradients. As the host does not know whether gradients were written, every call raises their version counters.

    Inside a function that :func:`torch.compile` compiles, a call with ``max_norm`` is one operator of the graph, whose errors number the
    gradients, not the parameters. Other calls break the graph.

    Gradients that are DTensors are clipped by the norm of the whole tensors, on all ranks alike: see :mod:`normclip.distributed`.

    Args:
        parameters: A parameter or an iterable of parameters; those without a gradient are passed over. Warns if no tensor has a gradient or
            requires one, as happens if gradients are passed by mistake.
        max_norm: The limit γ ≥ 0; ``inf`` measures only.
        norm_type: The order p, a number or ``'inf'``.
        error_if_nonfinite: Raise if the norm is NaN or infinite, and leave all gradients as they are. Waits for the device.
        foreach: Ignored; accepted for compatibility with torch.
        rule: Instead of ``max_norm``, a rule; a number means :class:`normclip.rules.Hard`.
        process_groups: Groups whose ranks have different parameters, such as the stages of a pipeline: the norm is that of the gradients
            of all these ranks, and every one of them must make this call.

    Returns:
        The norm before clipping, a 0-dim tensor on the device of the first gradient; float64 if any gradient is of double precision,
        else float32.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is true, or another rank has raised an error.
        TypeError: A gradient is of an element type that is not supported.
        ValueError: A limit is negative or NaN, none or both of ``max_norm`` and ``rule`` are given, or a gradient cannot be written. In all
            cases nothing has changed.

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013 (arXiv 1211.5063).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    loaded = sys.modules.get("torch") or import_torch()
    if loaded.compiler.is_dynamo_compiling():
        from normclip import _compiled

        if max_norm is not None and rule is None and process_groups is None:
            return _compiled.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
        keywords = {"rule": rule, "process_groups": process_groups}
        return _compiled.outside(clip_grad_norm_, parameters, max_norm, norm_type, error_if_nonfinite, **keywords)
    if max_norm is not None and rule is None:
        rule, epsilon = _limit_or_rule("max_norm", max_norm), TORCH_EPSILON
    elif max_norm is None and rule is not None:
        rule, epsilon = _limit_or_rule("rule", rule), 0.0
    else:
        raise ValueError("pass either max_norm, a number, or rule, one of normclip.rules")
    norm_type = check_order("norm_type", norm_type)
    parameters = read_generator(parameters)
    if isinstance(rule, float):
        found: Any = clip_grads(parameters, rule, norm_type, epsilon, error_if_nonfinite, process_groups)
        if isinstance(found, loaded.Tensor):
            clipped: torch.Tensor = found
            return clipped
        batch = found
    else:
        batch = collect_grads(parameters, writable=rule.writes, process_groups=process_groups)
    norm = batch.norm(norm_type)
    if error_if_nonfinite:
        check_finite(norm, norm_type, batch, source="gradients from `parameters`")
    _clip(batch, rule, norm, epsilon)
    return as_tensor(norm, batch)


def read_generator(parameters: Parameters) -> Parameters:
    """The parameters, those of a generator as a list, as it can be read only once. Warns of an empty generator, as torch does."""
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warn_caller("`parameters` is an empty generator, no gradient clipping will occur.")
    return parameters


def _limit_or_rule(name: str, rule: Rule | float) -> Rule | float:
    """The limit of hard clipping, which backends apply by themselves, or another rule.

    Raises:
        TypeError, ValueError: As for :func:`normclip.rules.as_rule`.
    """
    if type(rule) is float:  # the most frequent case first: isinstance of an abstract class takes longer
        return check_limit(name, rule)
    rule = as_rule(name, rule)
    return rule.max_norm if isinstance(rule, Hard) else rule


def _clip(batch: Batch, rule: Rule | float, norm: AnyNorm, epsilon: float = 0.0) -> None:
    if isinstance(rule, float):
        # The backend computes the coefficient, so that on a device one kernel computes and applies it.
        mark_written(batch.clip_(rule, norm, epsilon))
        return
    if batch.is_empty:
        return  # a rule that remembers has seen no gradient
    exact: Any = norm if isinstance(norm, float) else norm.exact
    with rule.applying(exact) as multiplier:
        if not isinstance(multiplier, float) or multiplier != 1.0:
            batch.check_unchanged()  # the code of a user's rule has run since the tensors were checked
            mark_written(batch.scale_(multiplier))


def clip_grads_with_norm_(parameters: Parameters, max_norm: float, total_norm: torch.Tensor | float, foreach: bool | None = None) -> None:
    """Drop-in for :func:`torch.nn.utils.clip_grads_with_norm_`: clip gradients by a norm that was computed before.

        g ← g · min(1, γ / (n + 1e-6))

    Args:
        parameters: As for :func:`clip_grad_norm_`.
        max_norm: The limit γ ≥ 0; ``inf`` changes nothing.
        total_norm: The norm n of the gradients, as from :func:`normclip.get_total_norm`. NaN makes the gradients NaN, as in torch. A norm
            on a device stays there and is not checked.
        foreach: Ignored; accepted for compatibility with torch.

    Raises:
        TypeError: As for :func:`clip_grad_norm_`.
        ValueError: ``max_norm`` is negative or NaN, ``total_norm`` is negative, or a gradient cannot be written. Nothing has changed.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_([weight], max_norm=1.0, total_norm=torch.tensor(5.0))
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    max_norm = check_limit("max_norm", max_norm)
    if hasattr(total_norm, "full_tensor"):
        total_norm = total_norm.full_tensor()  # torch's own norm of DTensors
    # Checking a norm on a device would wait for the device. A fake tensor has no value, although its device may be the CPU.
    unchecked = getattr(total_norm, "is_cpu", True) is False or hasattr(total_norm, "fake_mode")
    norm = total_norm if unchecked else check_number("total_norm", total_norm)
    if isinstance(norm, float) and norm < 0.0:
        raise ValueError(f"total_norm is {norm}: a norm is not negative")
    mark_written(collect_grads(parameters, writable=max_norm < math.inf).clip_(max_norm, norm, TORCH_EPSILON))


def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """Drop-in for :func:`torch.nn.utils.clip_grad_value_`: clamp each element of each gradient.

        gᵢ ← min(max(gᵢ, −λ), λ)

    Args:
        parameters: As for :func:`clip_grad_norm_`.
        clip_value: The limit λ ≥ 0; ``inf`` changes nothing.
        foreach: Ignored; accepted for compatibility with torch.

    Raises:
        TypeError: As for :func:`clip_grad_norm_`, or a gradient is complex.
        ValueError: ``clip_value`` is negative or NaN, or a gradient cannot be written. Nothing has changed.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([0.25, -2.0])
        >>> clip_grad_value_([weight], 0.5)
        >>> weight.grad
        tensor([ 0.2500, -0.5000])
    """
    clip_value = check_limit("clip_value", clip_value)
    mark_written(collect_grads(parameters, writable=True).clamp_(clip_value))
