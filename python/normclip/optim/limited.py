"""A limit on the predicted descent of the steps of any torch optimizer."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from normclip._arguments import check_positive
from normclip.products import dot

__all__ = ["limited"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


def limited(optimizer: AnyOptimizer, *, descent_limit: float) -> AnyOptimizer:
    """Limit the predicted descent of the steps of an optimizer, by hooks before and after its ``step``.

        η ← η · min(1, T / ⟨u, g⟩)

    for the learning rate η and the step −ηu that the optimizer takes. The optimizer takes its step, and if the limit asks for a shorter
    one, parameters are set to the point between where they were and where they are that a smaller learning rate would have led to. So
    states of the optimizer follow its own rule, and everything else about it stays: schedulers, ``state_dict``, closures. It costs a copy
    of the parameters. :class:`ClippedSGD` and :class:`ClippedAdamW` have the limit as a setting, without that copy. Copies and pickles of
    an optimizer have no hooks: limit them anew.

    Args:
        optimizer: Any torch optimizer whose step is its learning rate times a direction, which all but line searches are.
        descent_limit: The limit T > 0 on ⟨u, g⟩, in the unit of the loss per unit of the learning rate.

    Returns:
        The same optimizer, with an attribute ``last_descent``: ⟨u, g⟩ in the latest step, a float.

    Raises:
        TypeError: It is no torch optimizer, or ``LBFGS``, which takes several steps at a time.
        ValueError: The limit is not positive and finite; or, in a step, a gradient is still scaled by a ``GradScaler``, or a parameter is a
            DTensor.

    References:
        Su: kexue.fm/archives/10657.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = limited(torch.optim.SGD([weight], lr=1.0), descent_limit=5.0)
        >>> (weight @ torch.tensor([3.0, 4.0])).backward()
        >>> optimizer.step()
        >>> weight.data, optimizer.last_descent
        (tensor([-0.6000, -0.8000]), 25.0)
    """
    descent_limit = check_positive("descent_limit", descent_limit)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: pass an optimizer of torch")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer is LBFGS, which takes several steps at a time: use one whose step is its learning rate times a vector")
    before: list[dict[Tensor, Tensor]] = []

    def copy(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ValueError("the gradients are scaled: call scaler.unscale_(optimizer) before scaler.step(optimizer)")
        groups = optimizer.param_groups
        if any(hasattr(parameter, "to_local") for group in groups for parameter in group["params"]):
            raise ValueError("a parameter is a DTensor, whose other parts are on other ranks: use ClippedSGD or ClippedAdamW")
        # By parameter, so that one which is listed twice is shortened once.
        before[:] = [{parameter: parameter.detach().clone() for parameter in group["params"]} for group in groups]

    @torch.no_grad()
    def shorten(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        moved = []  # parameters that have moved, where they were, and u·g of their group
        for group, olds in zip(optimizer.param_groups, before, strict=True):
            lr = float(group["lr"])
            steps = [(new, old, new.grad) for new, old in olds.items() if new.grad is not None]
            if lr != 0.0 and steps:
                along = float(dot([old - new for new, old, _ in steps], [gradient.to_dense() for *_, gradient in steps]))
                moved.append((steps, (-along if group.get("maximize") else along) / lr))
        before.clear()
        descent = sum((along for _, along in moved), 0.0)
        if descent > descent_limit:
            for steps, _ in moved:
                for new, old, _ in steps:
                    new.copy_(old.lerp(new, descent_limit / descent))
        vars(optimizer)["last_descent"] = descent

    optimizer.register_step_pre_hook(copy)
    optimizer.register_step_post_hook(shorten)
    return optimizer
