"""Stochastic gradient descent that clips in its step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._arguments import check_not_negative, check_number
from normclip._backends import SGDSettings
from normclip.optim.base import ClippedOptimizer, check_flag
from normclip.rules import Rule

__all__ = ["ClippedSGD"]


class ClippedSGD(ClippedOptimizer):
    """Stochastic gradient descent that clips all gradients together, in one step.

    For a parameter θ with the gradient g, and with the L2 norm n of all gradients together::

        d = c(n)·g + λ·θ
        v ← μ·v + (1 − τ)·d
        θ ← θ − η·v, or with Nesterov's momentum θ − η·(d + μ·v)

    It does what :func:`normclip.clip_grad_norm_` with a rule and then :class:`torch.optim.SGD` do, but reads the gradients twice and never
    writes them, so they stay as ``backward`` has left them. The norm is of the gradients of all parameter groups; all settings other than
    the rule belong to each group. The first v is d, whatever the dampening. To maximize, d is −c(n)·g + λ·θ.

    For CPU tensors, a step is computed in float64 (in float32 for 16-bit elements) and rounded once when it is stored. Parameters get the
    same bits for any number of threads and any instruction set. On CUDA, one launch takes it, in float32 for float32. Elsewhere torch's
    operations compute it and round after every operation. A step waits for a device only for what the host decides: new buffers of DTensors
    or within a ``GradScaler``, rules that follow training, a learning rate on the device, limits on the update of DTensors, and, without
    Triton, limits and whether to skip a step. A norm of NaN makes all parameters NaN. An infinite norm makes parameters NaN where the
    gradient is not finite; elsewhere only momentum and weight decay change them. ``last_norm`` shows the norm.

    Momentum buffers are saved and loaded with the ``state_dict``, in the format of :class:`torch.optim.SGD`, so each of the two optimizers
    can load the checkpoints of the other. The settings ``foreach`` and ``fused`` are kept there without effect. The rule is not part of the
    ``state_dict``: it is an attribute, which may be replaced between steps.

    Args:
        params: Parameters, named parameters or parameter groups, as for any torch optimizer. Those without a gradient are passed over.
        lr: The learning rate η ≥ 0, in the unit of parameters per unit of clipped gradient. A tensor is read at each step.
        rule: One of :mod:`normclip.rules`, or a threshold that is a rule, such as :class:`normclip.thresholds.AutoClip`; a number means
            :class:`normclip.rules.Hard`.
        momentum: The factor μ ≥ 0 of the momentum buffer v. With 0 there is no buffer.
        nesterov: Use Nesterov's momentum, the direction d + μv. Needs momentum, and a dampening of 0.
        weight_decay: The factor λ ≥ 0 of the parameters in d. This term is not clipped.
        dampening: The share τ of d that is not added to the buffer. Must be 0 with Nesterov's momentum.
        maximize: Maximize the objective instead of minimizing it.
        descent_limit: A limit T > 0 on the predicted descent ⟨u, g⟩ of a step per unit of the learning rate, for its direction u (v, or
            with Nesterov's momentum d + μv) and the gradient g: all learning rates are multiplied by min(1, T/⟨u, g⟩).
        update_rms_limit: A limit D > 0 on the root mean square of u, a tensor at a time: its learning rate is divided by max(1, RMS(u)/D).

    Attributes:
        rule: The rule.
        last_norm: The norm n in the latest step: a float, or a 0-dim float64 tensor on the device. None before the first step.
        last_coefficient: The coefficient c(n) of that step, of the same type; 0 where the step was skipped, by a ``GradScaler`` or because
            another rank has failed, which makes the norm −inf: see :mod:`normclip.distributed`.
        descent_limit, update_rms_limit: The limits, which may be replaced between steps.
        last_descent: With a limit, ⟨u, g⟩ in the latest step, after ``update_rms_limit`` and before ``descent_limit``: a float, or a 0-dim
            float64 tensor on the device.
        last_update_rms: With a limit, RMS(u) of each parameter that had a gradient: a list, or a float64 tensor on the device.

    Raises:
        TypeError: A parameter is complex; or, in a step, a gradient is sparse or not of its parameter's element type.
        ValueError: A setting is out of its range, which each step checks again; a loaded state is not of such an optimizer; or, in a step,
            a parameter is expanded, or shares memory with another or with a gradient; or with a limit on the update, ranks list
            different DTensors. Nothing has changed, and a rule that follows training has recorded nothing.

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

    _optimizer: ClassVar[str] = "sgd"
    _names: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable")
    _states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    _defaults_if_absent: ClassVar[Mapping[str, Any]] = {
        "dampening": 0.0,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
    }

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
        descent_limit: float | None = None,
        update_rms_limit: float | None = None,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        defaults = {**given, **self._defaults_if_absent, "dampening": dampening, "maximize": maximize}
        super().__init__(params, rule, defaults, descent_limit=descent_limit, update_rms_limit=update_rms_limit)

    @staticmethod
    def _settings(group: Mapping[str, Any]) -> SGDSettings:
        """Check and return the settings of a parameter group.

        Raises:
            ValueError: A setting is missing or out of its range, or two settings exclude each other.
        """
        missing = [name for name in SGDSettings._fields if name not in group]
        if missing:
            raise ValueError(f"there is no {missing[0]}: this is not a parameter group of torch.optim.SGD or ClippedSGD")
        lr, momentum, weight_decay = (check_not_negative(name, group[name]) for name in ("lr", "momentum", "weight_decay"))
        dampening = check_number("dampening", group["dampening"])
        if not math.isfinite(dampening):
            raise ValueError(f"dampening is {dampening}: pass a finite number")
        nesterov, maximize, differentiable = (check_flag(name, group[name]) for name in ("nesterov", "maximize", "differentiable"))
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")
        if differentiable:
            raise ValueError("differentiable is True: use torch.optim.SGD to differentiate through a step")
        return SGDSettings(lr, momentum, dampening, weight_decay, nesterov, maximize)

    def _make_state(self, parameter: Tensor, name: str) -> Tensor:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
