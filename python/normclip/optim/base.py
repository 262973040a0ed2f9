"""What optimizers that clip have in common: a rule and a norm, groups whose settings are checked, and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._backends import Member, Settings, optimizer_step
from normclip._results import mark_written
from normclip.rules import Rule, as_rule


class ClippedOptimizer(torch.optim.Optimizer):
    """An optimizer whose steps clip. A subclass has the settings of its formula, and names what that keeps from step to step."""

    _later: ClassVar[Mapping[str, Any]]
    """Settings that not every saved group has, and what they are there."""

    _kept: ClassVar[str]
    """The name of the tensor that the state of a parameter may have."""

    def __init__(self, params: ParamsT, rule: Rule | float, defaults: dict[str, Any]) -> None:
        self.rule = as_rule("rule", rule)
        self.last_norm: float | Tensor | None = None
        self.last_coefficient: float | Tensor | None = None
        super().__init__(params, defaults)

    @staticmethod
    @abstractmethod
    def _settings(group: Mapping[str, Any]) -> Settings:
        """The settings of a group of parameters, checked.

        Raises:
            ValueError: One of them is missing, out of its range, or does not go with another.
        """

    @staticmethod
    @abstractmethod
    def _keeps(group: Mapping[str, Any]) -> bool:
        """Whether the formula keeps a tensor for parameters of this group."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as every optimizer does.

        Raises:
            TypeError, ValueError: As for the class; nothing is added.
        """
        self._settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, parameter in enumerate(self.param_groups[-1]["params"]):
            if parameter.is_complex() or parameter.is_neg():
                del self.param_groups[-1]
                kind = f"complex ({parameter.dtype})" if parameter.is_complex() else "a lazily negated view"
                raise TypeError(f"params[{index}] is {kind}: make the real numbers parameters, such as torch.view_as_real of it")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was saved, copied or pickled, once it is known to be of such an optimizer."""
        groups = [{**self._later, **group} for group in state["param_groups"]]
        self._settings_of(groups)
        for parameter, saved in state["state"].items():
            if isinstance(parameter, Tensor):
                self._check_saved(parameter, saved)
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
        settings = self._settings_of(self.param_groups)
        members = [
            self._member(number, place, parameter)
            for number, group in enumerate(self.param_groups)
            for place, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        taken = optimizer_step(members)
        norm = taken.norm()
        exact = cast(Any, norm if isinstance(norm, float) else norm.exact)
        with self.rule.applying(exact) as coefficient:
            mark_written(taken.step_(coefficient, settings))
        self.last_norm, self.last_coefficient = exact, coefficient
        for _, _, parameter, _, states, new in members:
            if new:
                self.state[parameter][self._kept] = states[0]
        return loss

    def _member(self, group: int, place: int, parameter: Tensor) -> Member:
        gradient = cast(Tensor, parameter.grad)
        if not self._keeps(self.param_groups[group]):
            return group, place, parameter, gradient, [], False
        kept: Tensor | None = self.state[parameter].get(self._kept) if parameter in self.state else None
        return group, place, parameter, gradient, [torch.zeros_like(parameter) if kept is None else kept], kept is None

    def _settings_of(self, groups: list[dict[str, Any]]) -> list[Settings]:
        return [self._settings_of_group(number, group) for number, group in enumerate(groups)]

    def _settings_of_group(self, number: int, group: dict[str, Any]) -> Settings:
        try:
            return self._settings(group)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"param_groups[{number}]: {error}. Nothing has changed") from error

    def _check_saved(self, parameter: Tensor, saved: Mapping[str, Any]) -> None:
        """Refuse what belongs to another optimizer or another parameter.

        Raises:
            ValueError: It is not what is kept for the parameter.
        """
        if not saved.keys() <= {self._kept}:
            raise ValueError(
                f"the state of a parameter has {sorted(saved)}: load that of {type(self).__name__} or of torch's. Nothing has changed"
            )
        buffer = saved.get(self._kept)
        if buffer is not None and getattr(buffer, "shape", None) != parameter.shape:
            raise ValueError(
                f"the {self._kept} of a parameter of shape {tuple(parameter.shape)} has another shape: load the state of this model. "
                "Nothing has changed"
            )


def check_flag(name: str, value: Any) -> bool:
    """A boolean.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name} is {value!r}: pass True or False")
    return bool(value)
