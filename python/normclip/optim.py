"""Optimizers whose steps clip: the gradients are read for their norm and for the update, and never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._arguments import check_not_negative
from normclip._backends import optimizer_step
from normclip._results import mark_written
from normclip.rules import Rule, as_rule


class ClippedSGD(torch.optim.Optimizer):
    r"""Gradient descent with gradients that are clipped together, in one step.

    .. math::
        n &= \|g\|_2, \qquad d = c(n)\,g + \lambda\theta \\
        v &\leftarrow \mu v + d \\
        \theta &\leftarrow \theta - \eta v, \quad \text{with Nesterov's momentum } \theta - \eta\,(d + \mu v)

    What :func:`normclip.clip_grad_norm_` with a rule and then :class:`torch.optim.SGD` do, in two reads of the gradients and none of their
    writes: they stay as backward has left them. The norm is of all gradients of all groups; the other settings belong to each group. The
    first v is d.

    Everything is computed in float64, for 16-bit elements in float32, and rounded once where it is stored; parameters have the same bits
    for any number of threads and instruction set. On a device torch computes it, rounds after every operation, as its own optimizer does,
    and nothing waits for the device. A norm that is not finite spreads: NaN makes all parameters NaN, an infinite norm those whose gradient
    is not finite, and the others do not move but for momentum and weight decay. ``last_norm`` tells.

    Momentum buffers are saved and loaded with the ``state_dict``, whose format is that of :class:`torch.optim.SGD`. The rule is not in it:
    it is an attribute, and may be replaced between steps.

    Args:
        params: Parameters, named parameters or groups of them, as for every optimizer of torch. Those without a gradient are passed over.
        lr: The learning rate η ≥ 0, in the unit of parameters per unit of clipped gradient. One in a tensor is read at each step.
        rule: One of :mod:`normclip.rules`; a number means :class:`normclip.rules.Hard`.
        momentum: The factor μ ≥ 0 of the buffer v; 0 needs none.
        nesterov: Go by d + μv. Needs momentum.
        weight_decay: The factor λ ≥ 0 of the parameters, which is not clipped.

    Attributes:
        rule: The rule.
        last_norm: The norm n in the latest step, a float; on a device a 0-dim float64 tensor that stays there. None before the first step.
        last_coefficient: The coefficient c(n) of that step, likewise.

    Raises:
        TypeError: A parameter is complex; in a step, a gradient is sparse, or not of its parameter's element type.
        ValueError: A setting is out of its range; in a step, a parameter is expanded, shares memory with another or with a gradient, or is
            a DTensor, for which there is :func:`normclip.clip_grad_norm_`. Nothing has changed.

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013 (arXiv 1211.5063);
        Zhang, He, Sra, Jadbabaie: Why gradient clipping accelerates training, 2020 (arXiv 1905.11881).

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = ClippedSGD([weight], lr=0.5, rule=1.0)
        >>> (weight @ torch.tensor([3.0, 4.0])).backward()
        >>> optimizer.step()
        >>> weight.data, weight.grad
        (tensor([-0.3000, -0.4000]), tensor([3., 4.]))
        >>> optimizer.last_norm, optimizer.last_coefficient
        (5.0, 0.2)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        rule: Rule | float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.rule = as_rule("rule", rule)
        self.last_norm: float | Tensor | None = None
        self.last_coefficient: float | Tensor | None = None
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as every optimizer does.

        Raises:
            TypeError, ValueError: As for the class; nothing is added.
        """
        settings = {**self.defaults, **param_group}
        for name in ("lr", "momentum", "weight_decay"):
            check_not_negative(name, settings[name])
        if settings["nesterov"] and settings["momentum"] == 0.0:
            raise ValueError("nesterov needs a momentum above 0")
        super().add_param_group(param_group)
        for index, parameter in enumerate(self.param_groups[-1]["params"]):
            if parameter.is_complex() or parameter.is_neg():
                del self.param_groups[-1]
                kind = f"complex ({parameter.dtype})" if parameter.is_complex() else "a lazily negated view"
                raise TypeError(f"params[{index}] is {kind}: make the real numbers parameters, such as torch.view_as_real of it")

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies: torch's share, and ours."""
        ours = {name: getattr(self, name) for name in ("rule", "last_norm", "last_coefficient")}
        return {**super().__getstate__(), **ours}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Measure the gradients and take a step.

        Args:
            closure: Computes the loss and the gradients anew, and returns the loss.

        Returns:
            The loss that ``closure`` has returned.

        Raises:
            TypeError, ValueError: As for the class; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [
            (number, place, parameter, parameter.grad, self._buffer(parameter) if group["momentum"] != 0.0 else None)
            for number, group in enumerate(self.param_groups)
            for place, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        taken = optimizer_step(members)
        norm = taken.norm()
        exact = cast(Any, norm if isinstance(norm, float) else norm.exact)
        self.last_norm, self.last_coefficient = exact, self.rule.multiplier(exact)
        settings = [
            (float(group["lr"]), float(group["momentum"]), bool(group["nesterov"]), float(group["weight_decay"]))
            for group in self.param_groups
        ]
        mark_written(taken.step_(self.last_coefficient, settings))
        for _, _, parameter, _, buffer in members:
            if buffer is not None:
                self.state[parameter]["momentum_buffer"] = buffer
        return loss

    def _buffer(self, parameter: Tensor) -> Tensor:
        """The momentum buffer. A new one holds zeros, which give d to the first v."""
        buffer: Tensor | None = self.state[parameter].get("momentum_buffer") if parameter in self.state else None
        return torch.zeros_like(parameter) if buffer is None else buffer
