"""AdamW that clips in its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._arguments import check_not_negative, check_number
from normclip._backends import AdamWSettings
from normclip.optim.base import ClippedOptimizer, check_flag
from normclip.rules import Rule

__all__ = ["ClippedAdamW"]


class ClippedAdamW(ClippedOptimizer):
    """AdamW that clips all gradients together, in one step.

    In step t of a parameter θ with the gradient g, and with the L2 norm n of all gradients together::

        h = c(n)·g
        m ← β₁·m + (1 − β₁)·h
        v ← β₂·v + (1 − β₂)·h²
        u = m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)
        θ ← (1 − η·λ)·θ − η·u

    It does what :func:`normclip.clip_grad_norm_` with a rule and then :class:`torch.optim.AdamW` do, but reads the gradients twice and
    never writes them, so they stay as ``backward`` has left them. The norm is of the gradients of all parameter groups; all settings other
    than the rule belong to each group. With a rule of ``inf`` it is AdamW.

    For CPU tensors, a step is computed in float32 (in float64 for float64) and rounded once when it is stored. Parameters get the same bits
    for any number of threads and any instruction set. On CUDA, one launch takes the same step, and counts it on the device. Elsewhere
    torch's operations compute it and round after every operation. A step waits for a device only for what the host decides: new states of
    DTensors or within a ``GradScaler``, rules that follow training, a learning rate on the device, limits on the update of DTensors, and,
    without Triton, limits and whether to skip a step. A norm of NaN makes all parameters NaN; ``last_norm`` shows it.

    States are saved and loaded with the ``state_dict``, in the format of :class:`torch.optim.AdamW`, so each of the two optimizers can load
    the checkpoints of the other. The settings ``foreach``, ``fused`` and ``capturable`` are kept there without effect. The rule, the limits
    and ``state_dtype`` are not part of the ``state_dict``: they are attributes, which may be replaced between steps.

    With :class:`torch.amp.GradScaler`, pass the optimizer to ``scaler.step`` without calling ``scaler.unscale_``: the norm is that of the
    unscaled gradients, and the step unscales them. A gradient that is not finite skips the step.

    Args:
        params: Parameters, named parameters or parameter groups, as for any torch optimizer. Those without a gradient are passed over.
        lr: The learning rate η ≥ 0. A tensor is read at each step.
        betas: The factors β₁ and β₂ of the averages m of the gradient and v of its square, in [0, 1).
        eps: ε ≥ 0, in the unit of the clipped gradient.
        weight_decay: The factor λ ≥ 0 of the parameters. This term is not clipped.
        amsgrad: Use the largest v so far in place of v.
        rule: One of :mod:`normclip.rules`, or a threshold that is a rule, such as :class:`normclip.thresholds.AutoClip`; a number means
            :class:`normclip.rules.Hard`.
        maximize: Maximize the objective instead of minimizing it.
        state_dtype: The element type of new and loaded states of parameters of 16-bit types: ``torch.float32``, or None for that of the
            parameter, as torch keeps them.
        descent_limit: A limit T > 0 on the predicted descent ⟨u, g⟩ of a step per unit of the learning rate, for its direction u and the
            gradient g: all learning rates are multiplied by min(1, T/⟨u, g⟩).
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
        Loshchilov, Hutter: Decoupled weight decay regularization, 2019 (arXiv 1711.05101);
        Reddi, Kale, Kumar: On the convergence of Adam and beyond, 2018 (arXiv 1904.09237);
        Shazeer, Stern: Adafactor, 2018 (arXiv 1804.04235), for the limit on RMS(u); Su: kexue.fm/archives/10657, for that on ⟨u, g⟩.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ClippedAdamW([weight], lr=0.5, weight_decay=0.0, rule=1.0)
        >>> (weight @ torch.tensor([3.0, 4.0])).backward()
        >>> optimizer.step()
        >>> weight.data, weight.grad
        (tensor([0.5000, 0.5000]), tensor([3., 4.]))
        >>> optimizer.last_norm, optimizer.last_coefficient
        (5.0, 0.2)
    """

    _optimizer: ClassVar[str] = "adamw"
    _names: ClassVar[tuple[str, ...]] = (
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "amsgrad",
        "maximize",
        "differentiable",
        "decoupled_weight_decay",
    )
    _states: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _kept: ClassVar[tuple[str, ...]] = (*ClippedOptimizer._kept, "state_dtype")
    _defaults_if_absent: ClassVar[Mapping[str, Any]] = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        rule: Rule | float,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        descent_limit: float | None = None,
        update_rms_limit: float | None = None,
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype is {state_dtype}: pass torch.float32, or None for the element type of each parameter")
        self.state_dtype = state_dtype
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults = {**given, **self._defaults_if_absent, "amsgrad": amsgrad, "maximize": maximize}
        super().__init__(params, rule, defaults, descent_limit=descent_limit, update_rms_limit=update_rms_limit)

    @staticmethod
    def _settings(group: Mapping[str, Any]) -> AdamWSettings:
        """Check and return the settings of a parameter group.

        Raises:
            ValueError: A setting is missing or out of its range.
        """
        missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
        if missing:
            raise ValueError(f"there is no {missing[0]}: this is not a parameter group of torch.optim.AdamW or ClippedAdamW")
        lr, eps, weight_decay = (check_not_negative(name, group[name]) for name in ("lr", "eps", "weight_decay"))
        try:
            first, second = group["betas"]
        except (TypeError, ValueError) as error:
            raise ValueError(f"betas is {group['betas']!r}: pass two numbers") from error
        first, second = (check_number(f"betas[{place}]", beta) for place, beta in enumerate((first, second)))
        for place, beta in enumerate((first, second)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{place}] is {beta}: pass a number from 0 to below 1")
        amsgrad, maximize = (check_flag(name, group.get(name, False)) for name in ("amsgrad", "maximize"))
        if check_flag("differentiable", group.get("differentiable", False)):
            raise ValueError("differentiable is True: use torch.optim.AdamW to differentiate through a step")
        if not check_flag("decoupled_weight_decay", group.get("decoupled_weight_decay", True)):
            raise ValueError(
                "decoupled_weight_decay is False: this is the state of torch.optim.Adam, whose weight decay is another. "
                "If its weight_decay is 0, set decoupled_weight_decay to True in its param_groups"
            )
        return AdamWSettings(lr, first, second, eps, weight_decay, amsgrad, maximize)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a saved, copied or pickled state, after checking that it is one of such an optimizer."""
        super().__setstate__(state)
        for parameter, kept in self.state.items():
            if "step" in kept and isinstance(parameter, Tensor):
                # Old versions of torch counted by a number, and its fused step counts on the parameter's device.
                kept["step"] = torch.as_tensor(kept["step"], dtype=_counting(kept["step"]), device="cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as for any torch optimizer. States keep the digits that ``state_dtype`` has.

        Raises:
            ValueError: It is not of such an optimizer and model. Nothing has changed.
        """
        if self.state_dtype is None:
            super().load_state_dict(state_dict)
            return
        loaded: dict[str, Any] = {}
        # What is loaded is what hooks have made of the argument, and other hooks look at what has been loaded.
        before = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        after = self.register_load_state_dict_post_hook(lambda _: self._widen(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _widen(self, loaded: dict[str, Any]) -> None:
        """Take states of 16-bit parameters from what was loaded: the base class has rounded them to the parameters' type."""
        saved = [index for group in loaded["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            for name, value in loaded["state"].get(index, {}).items():
                if name != "step" and parameter.dtype.itemsize == 2:
                    self.state[parameter][name] = value.to(device=parameter.device, dtype=self.state_dtype)

    def _make_state(self, parameter: Tensor, name: str) -> Tensor:
        if name == "step":
            return torch.zeros((), dtype=_counting(), device="cpu")  # whatever the default device is
        dtype = self.state_dtype if parameter.dtype.itemsize == 2 else None
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)


def _counting(steps: Any = None) -> torch.dtype:
    """The element type of a number of steps, which torch chooses so for a new one. Narrower types could not count far."""
    if isinstance(steps, Tensor) and steps.dtype in (torch.float32, torch.float64):
        return steps.dtype
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
