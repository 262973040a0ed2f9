"""The base class of optimizers that clip: the rule, the norm, limits on the update, settings of parameter groups, and checkpoints."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from operator import is_, itemgetter, truediv
from typing import Any, ClassVar, ParamSpec, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from normclip._arguments import check_positive
from normclip._backends import Settings, Step, Stepper, hard_coefficient, optimizer_step, share_error, sharing_errors
from normclip._core import strictly
from normclip._results import mark_written
from normclip.rules import Formula, Hard, Rule, as_rule

try:
    from torch._C._autograd import _profiler_enabled
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
except ImportError:  # private names, which a later torch may not have: each step then goes torch's way

    def _profiler_enabled() -> bool:
        return True


__all__ = ["ClippedOptimizer"]

_IMMUTABLE = (float, int, bool, type(None))

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Limits: TypeAlias = "tuple[float | None, float | None]"
"""The limits on ⟨u, g⟩ and on RMS(u)."""


class ClippedOptimizer(torch.optim.Optimizer):
    """An optimizer that clips in its step. A subclass defines the settings of its formula and the tensors that it keeps between steps."""

    _optimizer: ClassVar[str]
    """What the backends call the formula."""

    _names: ClassVar[tuple[str, ...]]
    """The names of the settings in a parameter group that a step looks at."""

    _defaults_if_absent: ClassVar[Mapping[str, Any]]
    """Settings that a loaded parameter group may lack, as older versions of torch did not save them, with the values to use then."""

    _states: ClassVar[tuple[str, ...]]
    """The names of all tensors that may be kept for a parameter."""

    _kept: ClassVar[tuple[str, ...]] = ("rule", "descent_limit", "update_rms_limit", "last_norm", "last_coefficient", "last_descent")
    """The attributes that are pickled and copied besides those of torch's base class."""

    _known: tuple[list[Any], list[Settings], list[int]] | None
    """The values of the settings of all groups in the last step, what was made of them, and how many states each has."""

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves unscaling to the step

    rule: Rule
    descent_limit: float | None = None
    update_rms_limit: float | None = None
    last_norm: float | Tensor | None = None
    last_coefficient: float | Tensor | None = None
    last_descent: float | Tensor | None = None
    last_update_rms: list[float] | Tensor | None = None

    def __init__(
        self,
        params: ParamsT,
        rule: Rule | float,
        defaults: dict[str, Any],
        *,
        descent_limit: float | None = None,
        update_rms_limit: float | None = None,
    ) -> None:
        self.rule = as_rule("rule", rule)
        self.descent_limit = _check_limit("descent_limit", descent_limit)
        self.update_rms_limit = _check_limit("update_rms_limit", update_rms_limit)
        self._forget()
        super().__init__(params, defaults)

    @staticmethod
    @abstractmethod
    def _settings(group: Mapping[str, Any]) -> Settings:
        """Check and return the settings of a parameter group.

        Raises:
            ValueError: A setting is missing or out of its range, or two settings exclude each other.
        """

    @abstractmethod
    def _make_state(self, parameter: Tensor, name: str) -> Tensor:
        """A new tensor to keep for a parameter."""

    @staticmethod
    def profile_hook_step(func: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        """As torch has it: the step with hooks, and with a label for the profiler.

        A label takes longer than the step of a small model, and is seen only where a profiler runs. So without one, and without hooks, it
        is left out. In a function that :func:`torch.compile` compiles, the step is not traced into: one break of the graph, not several.
        """
        labelled = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            optimizer: Any = args[0]
            if torch.compiler.is_dynamo_compiling():
                from normclip import _compiled

                return cast("_Result", _compiled.outside(step, *args, **kwargs))
            if (
                _profiler_enabled()
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or optimizer._optimizer_step_pre_hooks
                or optimizer._optimizer_step_post_hooks
            ):
                return labelled(*args, **kwargs)
            return func(*args, **kwargs)

        return step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as for any torch optimizer.

        Raises:
            TypeError, ValueError: As for the class. Nothing is added.
        """
        if isinstance(param_group, dict):  # torch refuses others
            self._settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, parameter in enumerate(self.param_groups[-1]["params"]):
            if isinstance(parameter, torch.nn.UninitializedParameter):
                continue  # of a lazy module that has not run yet: steps check what becomes of it
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
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle or copy: that of torch's base class, and the attributes of this one."""
        own = vars(self)
        return {**super().__getstate__(), **{name: own[name] for name in (*self._kept, "last_update_rms") if name in own}}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Measure the gradients and take an optimizer step.

        Args:
            closure: A function that computes the loss and the gradients anew and returns the loss.

        Returns:
            The loss that ``closure`` has returned.

        Raises:
            TypeError, ValueError: As for the class. Nothing has changed.
            RuntimeError: The rule has given a tensor other memory, or another rank has raised an error. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            settings, counts = self._settings_now()
            limits = self._limits()
        except ValueError as error:
            share_error(self.param_groups, error)
            raise
        step = optimizer_step(self._stepper, self.param_groups, self.state, counts, self._make_state, limited=limits is not None)
        norm: Any = step.norm()
        found_inf = self.__dict__.get("found_inf")
        on_device = not isinstance(norm, float) and self._leaves_to_device(step, found_inf)
        unsettled = on_device and norm.settle is not None  # only the device knows whether another rank has failed
        if not unsettled and step.is_empty:
            self.last_norm, self.last_coefficient = 0.0, 1.0  # and the rule is not asked
            return loss
        exact: Any = norm if isinstance(norm, float) else norm.exact
        taken = exact != -math.inf if unsettled else None
        scale = self.__dict__.get("grad_scale")
        if scale is not None:
            exact = _over(exact, scale)
        if found_inf is not None:
            if on_device:
                taken = (found_inf.to(exact.device, non_blocking=True) == 0.0) & exact.isfinite()
            elif not (float(found_inf) == 0.0 and math.isfinite(exact)):
                self.last_norm, self.last_coefficient = exact, 0.0  # nothing is written, and the rule is not asked
                return loss
        if taken is not None:
            step.skip_unless(taken)  # type: ignore[attr-defined] # of steps on devices
        if limits is None:
            coefficient = self._take(step, exact, scale, settings, None)
        else:
            with sharing_errors(step):  # of ranks, which limits make wait for each other
                coefficient = self._take(step, exact, scale, settings, limits)
        self.last_norm, self.last_coefficient = exact, coefficient if taken is None else torch.where(taken, coefficient, 0.0)
        for parameter, name, tensor in step.fresh:
            self.state[parameter][name] = tensor
        return loss

    def _leaves_to_device(self, step: Step, found_inf: Any) -> bool:
        """Whether a device can find out by itself if there is a step: nothing on the host, such as what a rule records, depends on it."""
        is_free = isinstance(self.rule, Formula) and not step.fresh
        return is_free and hasattr(step, "skip_unless") and (found_inf is None or isinstance(found_inf, Tensor))

    def _take(self, step: Step, norm: Any, scale: Tensor | None, settings: list[Settings], limits: _Limits | None) -> Any:
        """Take the step by the rule. Returns the coefficient."""
        if type(self.rule) is Hard:
            coefficient = hard_coefficient(self.rule.max_norm, norm)
            self._move(step, coefficient, scale, settings, limits)
        elif _remembers(self.rule) and float(norm) == 0.0:
            # There is nothing to clip, nor to learn from, such as in the step by which torch.distributed.checkpoint has states made.
            coefficient = 1.0
            self._move(step, coefficient, scale, settings, limits)
        else:
            with torch.no_grad(), as_rule("rule", self.rule).applying(norm) as coefficient:  # a number may have been assigned
                step.check_unchanged()  # the code of a user's rule has run since the tensors were checked
                self._move(step, coefficient, scale, settings, limits)
        return coefficient

    def _move(self, step: Step, coefficient: Any, scale: Tensor | None, settings: list[Settings], limits: _Limits | None) -> None:
        """Take the step within the limits."""
        if scale is not None:
            coefficient = _over(coefficient, scale)
        if limits is None:
            mark_written(step.step_(coefficient, settings))
            return
        written, descent, rms = step.step_within(coefficient, settings, *limits, 1.0 if scale is None else scale)
        mark_written(written)
        self.last_descent, self.last_update_rms = descent, rms

    def _limits(self) -> _Limits | None:
        """The checked limits on the update, if there are any."""
        if self.descent_limit is None and self.update_rms_limit is None:
            return None
        return _check_limit("descent_limit", self.descent_limit), _check_limit("update_rms_limit", self.update_rms_limit)

    def _settings_now(self) -> tuple[list[Settings], list[int]]:
        """The checked settings of all groups, and how many states a parameter of each has.

        Settings that are the same objects as in the last step, of types that cannot change, are not checked again.
        """
        try:
            values = [value for group in self.param_groups for value in self._values(group)]
        except KeyError:
            values = []
        known = self._known
        if known is None or len(values) != len(known[0]) or not all(map(is_, values, known[0])):
            settings = self._settings_of(self.param_groups)
            known = values, settings, [group.states for group in settings]
            fixed = all(_is_immutable(value) for value in values)
            self._known = known if fixed and values else None
        return known[1], known[2]

    def _forget(self) -> None:
        """Look anew at what was checked for the last step."""
        self._stepper = Stepper(self._optimizer)
        self._values = itemgetter(*self._names)
        self._known = None

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
        if not saved.keys() <= set(self._states):
            raise ValueError(
                f"the state of a parameter has {sorted(saved)}: load that of {type(self).__name__} or of torch's. Nothing has changed"
            )
        for name, tensor in saved.items():
            shape = () if name == "step" else parameter.shape
            if name == "step" and isinstance(tensor, (int, float)):
                continue
            if (tensor is not None or name == "step") and getattr(tensor, "shape", None) != shape:
                raise ValueError(
                    f"the {name} of a parameter of shape {tuple(parameter.shape)} has another shape: "
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


def _over(number: Any, scale: Tensor) -> Any:
    """A number over the scale, where the number is."""
    if isinstance(number, float):
        return strictly(truediv, number, float(scale))
    return number / scale.to(number.device, number.dtype)


def _remembers(rule: Any) -> bool:
    """Whether the rule, or one that it is made of, depends on the norms of earlier steps, and so waits for that of this one."""
    return hasattr(rule, "state_dict") or any(map(_remembers, getattr(rule, "rules", ())))


def _check_limit(name: str, limit: float | None) -> float | None:
    return None if limit is None else check_positive(name, limit)


def _is_immutable(value: Any) -> bool:
    return type(value) in _IMMUTABLE or (type(value) is tuple and all(type(item) in _IMMUTABLE for item in value))
