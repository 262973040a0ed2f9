"""Optimizers whose steps clip: the gradients are read for their norm and for the update, and never written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._backend import Member, Settings, descent
from normclip._collect import check_not_negative, mark_written
from normclip.rules import Rule, as_rule


class ClippedSGD(torch.optim.Optimizer):
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
        *,
        dampening: float = 0.0,
        maximize: bool = False,
    ) -> None:
        self.rule = as_rule("rule", rule)
        self.last_norm: float | Tensor | None = None
        self.last_coefficient: float | Tensor | None = None
        given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**given, **_LATER, "dampening": dampening, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as every optimizer does.

        Raises:
            TypeError, ValueError: As for the class; nothing is added.
        """
        _settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, parameter in enumerate(self.param_groups[-1]["params"]):
            if parameter.is_complex() or parameter.is_neg():
                del self.param_groups[-1]
                kind = f"complex ({parameter.dtype})" if parameter.is_complex() else "a lazily negated view"
                raise TypeError(f"params[{index}] is {kind}: make the real numbers parameters, such as torch.view_as_real of it")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was saved, copied or pickled, once it is known to be of such an optimizer."""
        groups = [{**_LATER, **group} for group in state["param_groups"]]
        _settings_of(groups)
        for parameter, saved in state["state"].items():
            if isinstance(parameter, Tensor):
                _check_saved(parameter, saved)
        super().__setstate__({**state, "param_groups": groups})

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
        settings = _settings_of(self.param_groups)
        members = [
            self._member(number, place, parameter)
            for number, group in enumerate(self.param_groups)
            for place, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        taken = descent(members)
        norm = taken.norm()
        exact = cast(Any, norm if isinstance(norm, float) else norm.exact)
        with self.rule.applying(exact) as coefficient:
            mark_written(taken.step_(coefficient, settings))
        self.last_norm, self.last_coefficient = exact, coefficient
        for _, _, parameter, _, buffer, new in members:
            if new:
                self.state[parameter]["momentum_buffer"] = buffer
        return loss

    def _member(self, group: int, place: int, parameter: Tensor) -> Member:
        gradient = cast(Tensor, parameter.grad)
        if self.param_groups[group]["momentum"] == 0.0:
            return group, place, parameter, gradient, None, False
        buffer: Tensor | None = self.state[parameter].get("momentum_buffer") if parameter in self.state else None
        return (group, place, parameter, gradient, torch.zeros_like(parameter) if buffer is None else buffer, buffer is None)


_LATER = {"dampening": 0.0, "maximize": False, "foreach": None, "differentiable": False, "fused": None}
"""Settings of :class:`torch.optim.SGD` that not every state has, and what they are there."""


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
    nesterov, maximize, differentiable = (_flag(name, group[name]) for name in ("nesterov", "maximize", "differentiable"))
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")
    if differentiable:
        raise ValueError("differentiable is True: a step that can be differentiated takes torch.optim.SGD")
    return Settings(lr, momentum, dampening, weight_decay, nesterov, maximize)


def _settings_of(groups: list[dict[str, Any]]) -> list[Settings]:
    return [_settings_of_group(number, group) for number, group in enumerate(groups)]


def _settings_of_group(number: int, group: dict[str, Any]) -> Settings:
    try:
        return _settings(group)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"param_groups[{number}]: {error}. Nothing has changed") from error


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name} is {value!r}: pass True or False")
    return bool(value)


def _check_saved(parameter: Tensor, saved: Mapping[str, Any]) -> None:
    """Refuse what belongs to another optimizer or another parameter.

    Raises:
        ValueError: It is no momentum buffer of the parameter.
    """
    if not saved.keys() <= {"momentum_buffer"}:
        raise ValueError(f"the state of a parameter has {sorted(saved)}: load that of ClippedSGD or torch.optim.SGD. Nothing has changed")
    buffer = saved.get("momentum_buffer")
    if buffer is not None and getattr(buffer, "shape", None) != parameter.shape:
        raise ValueError(
            f"the momentum buffer of a parameter of shape {tuple(parameter.shape)} has another shape: load the state of this model. "
            "Nothing has changed"
        )
