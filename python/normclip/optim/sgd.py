"""Gradient descent that clips in its step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._arguments import check_not_negative
from normclip._backends import Settings
from normclip.optim.base import ClippedOptimizer, check_flag
from normclip.rules import Rule


class ClippedSGD(ClippedOptimizer):
    r"""Gradient descent with gradients that are clipped together, in one step.

    .. math::
        n &= \|g\|_2, \qquad d = c(n)\,g + \lambda\theta \\
        v &\leftarrow \mu v + (1 - \tau)\,d \\
        \theta &\leftarrow \theta - \eta v, \quad \text{with Nesterov's momentum } \theta - \eta\,(d + \mu v)

    What :func:`normclip.clip_grad_norm_` with a rule and then :class:`torch.optim.SGD` do, in two reads of the gradients and none of their
    writes: they stay as backward has left them. The norm is of all gradients of all groups; the other settings belong to each group. The
    first v is d, dampened or not. To maximize, d is :math:`-c(n)\,g + \lambda\theta`.

    Everything is computed in float64, for 16-bit elements in float32, and rounded once where it is stored; parameters have the same bits
    for any number of threads and instruction set. On a device torch computes it, rounds after every operation, as its own optimizer does,
    and nothing waits for the device. A norm that is not finite spreads: NaN makes all parameters NaN, an infinite norm those whose gradient
    is not finite, and the others do not move but for momentum and weight decay. ``last_norm`` tells.

    Momentum buffers are saved and loaded with the ``state_dict``, whose format is that of :class:`torch.optim.SGD`: either goes on where
    the other was saved. Its settings ``foreach`` and ``fused`` are kept without effect. The rule is not in it: it is an attribute, and may
    be replaced between steps.

    Args:
        params: Parameters, named parameters or groups of them, as for every optimizer of torch. Those without a gradient are passed over.
        lr: The learning rate η ≥ 0, in the unit of parameters per unit of clipped gradient. One in a tensor is read at each step.
        rule: One of :mod:`normclip.rules`; a number means :class:`normclip.rules.Hard`.
        momentum: The factor μ ≥ 0 of the buffer v; 0 needs none.
        nesterov: Go by d + μv. Needs momentum, and no dampening.
        weight_decay: The factor λ ≥ 0 of the parameters, which is not clipped.
        dampening: The share τ of d that does not enter the buffer. Not with Nesterov's momentum.
        maximize: Go up, not down.

    Attributes:
        rule: The rule.
        last_norm: The norm n in the latest step, a float; on a device a 0-dim float64 tensor that stays there. None before the first step.
        last_coefficient: The coefficient c(n) of that step, likewise.

    Raises:
        TypeError: A parameter is complex; in a step, a gradient is sparse, or not of its parameter's element type.
        ValueError: A setting is out of its range, which each step looks at again, or what is loaded is no state of such an optimizer; in a
            step, a parameter is expanded, shares memory with another or with a gradient, or is a DTensor, for which there is
            :func:`normclip.clip_grad_norm_`. Nothing has changed, nor has a rule that remembers noted anything.

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013 (arXiv 1211.5063);
        Zhang, He, Sra, Jadbabaie: Why gradient clipping accelerates training, 2020 (arXiv 1905.11881).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = ClippedSGD([weight], lr=0.5, rule=1.0)
        >>> (weight @ torch.tensor([3.0, 4.0])).backward()
        >>> optimizer.step()
        >>> weight.data, weight.grad
        (tensor([-0.3000, -0.4000]), tensor([3., 4.]))
        >>> optimizer.last_norm, optimizer.last_coefficient
        (5.0, 0.2)
    """

    _later: ClassVar[Mapping[str, Any]] = {
        "dampening": 0.0,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
    }
    _kept: ClassVar[str] = "momentum_buffer"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        rule: Rule | float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        dampening: float = 0.0,
        maximize: bool = False,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, rule, {**given, **self._later, "dampening": dampening, "maximize": maximize})

    @staticmethod
    def _settings(group: Mapping[str, Any]) -> Settings:
        """The settings of a group of parameters, checked.

        Raises:
            ValueError: One of them is missing, out of its range, or does not go with another.
        """
        missing = [name for name in Settings._fields if name not in group]
        if missing:
            raise ValueError(f"there is no {missing[0]}: this is not a group of gradient descent's")
        lr, momentum, weight_decay = (check_not_negative(name, group[name]) for name in ("lr", "momentum", "weight_decay"))
        dampening = float(group["dampening"])
        if not math.isfinite(dampening):
            raise ValueError(f"dampening is {dampening}: pass a finite number")
        nesterov, maximize, differentiable = (check_flag(name, group[name]) for name in ("nesterov", "maximize", "differentiable"))
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")
        if differentiable:
            raise ValueError("differentiable is True: a step that can be differentiated takes torch.optim.SGD")
        return Settings(lr, momentum, dampening, weight_decay, nesterov, maximize)

    @staticmethod
    def _keeps(group: Mapping[str, Any]) -> bool:
        return bool(group["momentum"] != 0.0)
