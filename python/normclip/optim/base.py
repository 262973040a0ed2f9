"""The base class of optimizers that clip: the rule, the norm, checked settings of parameter groups, and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._backends import Member, Settings, optimizer_step
from normclip._results import mark_written
from normclip.rules import Hard, Rule, as_rule

__all__ = ["ClippedOptimizer"]


class ClippedOptimizer(torch.optim.Optimizer):
    """An optimizer that clips in its step. A subclass defines the settings of its formula and the tensor that it keeps between steps."""

    _defaults_if_absent: ClassVar[Mapping[str, Any]]
    """Settings that a loaded parameter group may lack, as older versions of torch did not save them, with the values to use then."""

    _buffer_name: ClassVar[str]
    """The name, in the state of a parameter, of the tensor that is kept between steps."""

    def __init__(self, params: ParamsT, rule: Rule | float, defaults: dict[str, Any]) -> None:
        self.rule: Rule = as_rule("rule", rule)
        self.last_norm: float | Tensor | None = None
        self.last_coefficient: float | Tensor | None = None
        super().__init__(params, defaults)

    @staticmethod
    @abstractmethod
    def _settings(group: Mapping[str, Any]) -> Settings:
        """Check and return the settings of a parameter group.

        Raises:
            ValueError: A setting is missing or out of its range, or two settings exclude each other.
        """

    @staticmethod
    @abstractmethod
    def _needs_buffer(group: Mapping[str, Any]) -> bool:
        """Whether the formula keeps a tensor for each parameter of this group."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any torch optimizer.

        Raises:
            TypeError, ValueError: As for the class. Nothing is added.
        """
        self._settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, parameter in enumerate(self.param_groups[-1]["params"]):
            if parameter.is_complex() or parameter.is_neg():
                del self.param_groups[-1]
                kind = f"complex ({parameter.dtype})" if parameter.is_complex() else "a lazily negated view"
                raise TypeError(f"params[{index}] is {kind}: make the real numbers parameters, such as torch.view_as_real of it")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a saved, copied or pickled state, after checking that it is one of such an optimizer."""
        groups = [{**self._defaults_if_absent, **group} for group in state["param_groups"]]
        self._settings_of(groups)
        for parameter, saved in state["state"].items():
            if isinstance(parameter, Tensor):
                self._check_saved(parameter, saved)
        super().__setstate__({**state, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle or copy: that of torch's base class, and the attributes of this one."""
        ours = {name: getattr(self, name) for name in ("rule", "last_norm", "last_coefficient")}
        return {**super().__getstate__(), **ours}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Measure the gradients and take an optimizer step.

        Args:
            closure: A function that computes the loss and the gradients anew and returns the loss.

        Returns:
            The loss that ``closure`` has returned.

        Raises:
            TypeError, ValueError: As for the class. Nothing has changed.
            RuntimeError: The rule has given a tensor other memory. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings = self._settings_of(self.param_groups)
        members = [
            self._member(number, place, parameter)
            for number, group in enumerate(self.param_groups)
            for place, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        if not members:
            self.last_norm, self.last_coefficient = 0.0, 1.0  # and the rule is not asked
            return loss
        update = optimizer_step(members)
        norm = update.norm()
        exact = cast(Any, norm if isinstance(norm, float) else norm.exact)
        with self.rule.applying(exact) as coefficient:
            if not isinstance(self.rule, Hard):
                update.check_unchanged()  # the code of a user's rule has run since the tensors were checked
            mark_written(update.step_(coefficient, settings))
        self.last_norm, self.last_coefficient = exact, coefficient
        for _, _, parameter, _, states, new in members:
            if new:
                self.state[parameter][self._buffer_name] = states[0]
        return loss

    def _member(self, group: int, place: int, parameter: Tensor) -> Member:
        gradient = cast(Tensor, parameter.grad)
        if not self._needs_buffer(self.param_groups[group]):
            return group, place, parameter, gradient, [], False
        buffer: Tensor | None = self.state[parameter].get(self._buffer_name) if parameter in self.state else None
        return group, place, parameter, gradient, [torch.zeros_like(parameter) if buffer is None else buffer], buffer is None

    def _settings_of(self, groups: list[dict[str, Any]]) -> list[Settings]:
        return [self._settings_of_group(number, group) for number, group in enumerate(groups)]

    def _settings_of_group(self, number: int, group: dict[str, Any]) -> Settings:
        try:
            return self._settings(group)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"param_groups[{number}]: {error}. Nothing has changed") from error

    def _check_saved(self, parameter: Tensor, saved: Mapping[str, Any]) -> None:
        """Check the state that was saved for a parameter.

        Raises:
            ValueError: It is of another kind of optimizer or of a parameter of another shape.
        """
        if not saved.keys() <= {self._buffer_name}:
            raise ValueError(
                f"the state of a parameter has {sorted(saved)}: load that of {type(self).__name__} or of torch's. Nothing has changed"
            )
        buffer = saved.get(self._buffer_name)
        if buffer is not None and getattr(buffer, "shape", None) != parameter.shape:
            raise ValueError(
                f"the {self._buffer_name} of a parameter of shape {tuple(parameter.shape)} has another shape: "
                "load the state of this model. Nothing has changed"
            )


def check_flag(name: str, value: Any) -> bool:
    """The value as a boolean.

    Raises:
        ValueError: It is not True, False, 0 or 1.
    """
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name} is {value!r}: pass True or False")
    return bool(value)
