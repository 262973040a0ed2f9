"""The monitor: turns the statistics of clipping calls into figures, and passes them to sinks."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from normclip._arguments import TORCH_EPSILON, check_limit, check_order
from normclip._core import NORMS, listed
from normclip._names import named
from normclip._results import as_tensor, check_finite, mark_written
from normclip.clip import clip_grad_norm_
from normclip.clip_grads import Clipped, Nonfinite, clip_grads_
from normclip.monitor.sinks import Figures, Sink
from normclip.rules import Hard, Rule
from normclip.statistics import Stats, collect_named, grad_stats, largest_first, measure
from normclip.typing import Groups, Order, Parameters

if TYPE_CHECKING:
    import torch

__all__ = ["GradMonitor"]


class GradMonitor:
    """Logs the gradients of a model, step by step.

    Call :meth:`clip_` in place of :func:`normclip.clip_grads_`, or :meth:`observe` if something else clips. If that is torch's
    ``clip_grad_norm_``, pass the monitor to :func:`normclip.patch_torch`, which clips and measures by one read.

    Args:
        model: A module, or pairs of name and parameter.
        log: A :class:`Sink`, or several: functions that are called as ``sink(figures, step=step)``.
        every: Log the steps whose number is a multiple of this. Other steps are clipped at no extra cost.
        layers: Also log the figures of each parameter.
        depth: Log the figures of each module to this depth in place of those of each parameter, as :func:`normclip.grad_stats` has them:
            with ``depth=2`` a figure for each block of GPT-2, not for each of its 148 parameters.
        top: In each step, log the figures of only this many parameters or modules, those with the largest norms. A norm of NaN is larger
            than all others.
        on_error: What to do if a sink raises an ``Exception``. By then the gradients are clipped, the step is counted and the other sinks
            have been called. ``"warn"``: warn of the sink's first error, and keep calling it in later steps. ``"raise"``: raise the error,
            of several the first. Other exceptions, such as ``KeyboardInterrupt``, are raised at once.

    Attributes:
        log: The sinks. In distributed training give sinks to one rank only, and an empty list to the others: all ranks must make the same
            calls, as they measure shards together, and the sinks affect neither the measurements nor the clipping.
        step: The number of the next step. May be set.

    Raises:
        TypeError: ``log`` is neither a sink nor an iterable of sinks. A path is not a sink, and neither is a function that cannot be called
            as ``sink(figures, step=step)``.
        ValueError: ``every``, ``depth`` or ``top`` is not positive, ``depth`` or ``top`` is given with ``layers=False``, or ``on_error`` is
            neither ``"warn"`` nor ``"raise"``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([3.0, 4.0])).sum().backward()
        >>> monitor = GradMonitor(model, lambda figures, step: print(step, figures["norm/weight"], figures["clip/threshold"]))
        >>> clipped = monitor.clip_(1.0)
        0 5.0 1.0
        >>> monitor.step
        1
    """

    def __init__(
        self,
        model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]],
        log: Sink | Iterable[Sink],
        *,
        every: int = 1,
        layers: bool = True,
        depth: int | None = None,
        top: int | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: pass a positive number of steps")
        for name, number in (("depth", depth), ("top", top)):
            if number is not None and (number < 1 or not layers):
                raise ValueError(f"{name} is {number}: pass 1 or more" if layers else f"{name} is about layers: leave out layers=False")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error is {on_error!r}: choose 'warn' or 'raise'")
        self.model: Any = model if hasattr(model, "named_parameters") else list(model)
        self.log: tuple[Sink, ...] = _sinks(log)
        self.every = every
        self.layers = layers
        self.depth = depth
        self.top = top
        self.on_error = on_error
        self.step: int = 0
        # Returns the number of the present step, while a framework counts the steps. Of each number, one record is logged.
        self._present: Callable[[], int] | None = None
        self._clipped: deque[bool] = deque(maxlen=100)
        self._failed: list[Sink] = []  # sinks whose first error has been warned of

    def clip_(
        self,
        rule: Rule | float | None = None,
        *,
        limits: Mapping[str, Rule | float] | None = None,
        groups: Groups | None = None,
        norm_type: Order = 2.0,
        nonfinite: Nonfinite = "propagate",
    ) -> Clipped:
        """Clip the gradients as :func:`normclip.clip_grads_` does, and log them from the same read.

        Args:
            rule: As for :func:`normclip.clip_grads_`.
            limits: As there.
            groups: As there.
            norm_type: As there.
            nonfinite: As there.

        Returns:
            What :func:`normclip.clip_grads_` returns.

        Raises:
            RuntimeError, TypeError, ValueError: As for :func:`normclip.clip_grads_`. Nothing is logged, and the step is not counted.
        """
        layers = self._due and self.layers
        clipped = clip_grads_(
            self.model,
            rule,
            limits=limits,
            groups=groups,
            norm_type=norm_type,
            nonfinite=nonfinite,
            per_tensor=layers,
            depth=self.depth if layers else None,
        )
        if limits is None:
            clip = _clip_figures(clipped.norm, {"": (clipped.coefficient, rule)})
        else:
            clip = _clip_figures(clipped.norm, {f"/{group}": (clipped.coefficients[group], limit) for group, limit in limits.items()})
        self._end_step(clipped.stats, clip)
        return clipped

    def observe(self, stats: Stats | None = None) -> None:
        """Log the gradients as they are now, which reads them, or statistics that were taken before.

        Args:
            stats: The result of :func:`normclip.grad_stats`, with ``per_tensor=True`` if the figures of each parameter or module are to be
                logged. None reads the gradients.

        Raises:
            TypeError: As for :func:`normclip.grad_stats`.
        """
        if stats is None and self._due:
            stats = grad_stats(self.model, per_tensor=self.layers, depth=self.depth)
        self._end_step(stats, {})

    def clip_grad_norm_(
        self, parameters: Parameters, max_norm: float, norm_type: Order = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip as :func:`normclip.clip_grad_norm_` does, and log from the same read.

        Args:
            parameters: A parameter of the model, or several.
            max_norm: As for :func:`normclip.clip_grad_norm_`.
            norm_type: As there. Orders other than 1, 2 and ``inf`` take one more read.
            error_if_nonfinite: As there.

        Returns:
            The norm before clipping, as :func:`normclip.clip_grad_norm_` returns it.

        Raises:
            RuntimeError, TypeError, ValueError: As for :func:`normclip.clip_grad_norm_`, or the step is to be logged and a parameter is not
                one of the model. Nothing has changed on any rank, nothing is logged, and the step is not counted.
        """
        parameters, limit, order = listed(parameters, grads=True), check_limit("max_norm", max_norm), check_order("norm_type", norm_type)
        if not self._due:
            total_norm = clip_grad_norm_(parameters, limit, order, error_if_nonfinite)
            self._end_step(None, {})
            return total_norm
        # Writable from the start if there is a limit, so that a gradient that cannot be written is refused before the first collective.
        batch, names = collect_named(self._pairs(parameters), writable=limit < math.inf)
        orders = () if order in NORMS else (order,)
        stats, _, _ = measure(batch, names, per_tensor=self.layers, orders=orders, groups=None, depth=self.depth)
        norm = stats.norms[order] if orders else getattr(stats, NORMS[order])
        if error_if_nonfinite:
            check_finite(norm, order, batch, source="gradients from `parameters`")
        mark_written(batch.clip_(limit, norm, TORCH_EPSILON))
        clip = {} if limit == math.inf else _clip_figures(norm, {"": (Hard(limit).multiplier(norm + TORCH_EPSILON), limit)})
        device = next((parameter.grad.device for parameter in parameters if parameter.grad is not None), "cpu")
        total_norm = as_tensor(norm, batch).to(device)
        self._end_step(stats, clip)
        return total_norm

    def covers(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether there are parameters, and all of them belong to the model."""
        identities = {id(parameter) for parameter in parameters}
        return bool(identities) and identities <= self._names().keys()

    @property
    def _due(self) -> bool:
        number = self._number()
        return number is not None and number % self.every == 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_present": None}  # the framework is in this process

    def _number(self) -> int | None:
        """The number of the present step; None if a framework counts the steps and this one has been logged."""
        if self._present is None:
            return self.step
        present = self._present()
        return present if self.step <= present else None

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in named(self.model)}

    def _pairs(self, parameters: list[Any]) -> list[tuple[str, Any]]:
        """Parameters of the model with their names.

        Raises:
            ValueError: A parameter does not belong to the model.
        """
        names = self._names()
        for position, parameter in enumerate(parameters):
            if id(parameter) not in names:
                raise ValueError(f"parameters[{position}] does not belong to the monitor's model: pass parameters of that model")
        return [(names[id(parameter)], parameter) for parameter in parameters]

    def _end_step(self, stats: Stats | None, clip: Figures) -> None:
        step = self._number()
        if step is not None:
            self._log(step, stats, clip)

    def _log(self, step: int, stats: Stats | None, clip: Figures) -> None:
        self.step = step + 1
        if stats is None or step % self.every:
            return
        figures = _gradient_figures(stats, self.top) | clip
        if clip:
            # Not `value < 1.0`, as a coefficient of NaN changes the gradients too.
            self._clipped.append(not all(value >= 1.0 for name, value in clip.items() if name.startswith("clip/coefficient")))
            figures["clip/fraction"] = sum(self._clipped) / len(self._clipped)
        self._tell(step, figures)

    def _tell(self, step: int, figures: Figures) -> None:
        errors = [(index, sink, error) for index, sink in enumerate(self.log) if (error := _error_of(sink, step, figures)) is not None]
        # Only when all sinks have been called, as a warning may be raised as an error.
        for index, sink, error in errors:
            if self.on_error == "raise":
                raise error
            if not any(sink is failed for failed in self._failed):
                self._failed.append(sink)
                warnings.warn(
                    f"log[{index}], {sink!r:.200}, has failed in step {step}, and its further errors are not shown: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=5,
                )


def _error_of(sink: Sink, step: int, figures: Figures) -> Exception | None:
    try:
        sink(dict(figures), step=step)
    except Exception as error:
        return error
    return None


def _sinks(log: Any) -> tuple[Sink, ...]:
    """One sink or several, checked."""
    if callable(log) or isinstance(log, (str, bytes, os.PathLike)) or not isinstance(log, Iterable):
        return (_checked("log", log),)
    return tuple(_checked(f"log[{index}]", sink) for index, sink in enumerate(log))


def _checked(name: str, sink: Any) -> Sink:
    if isinstance(sink, (str, os.PathLike)):
        path = os.fspath(sink)
        raise TypeError(f"{name} is the path {path!r}: pass a sink, json_lines({path!r}) or tensorboard({path!r})")
    if not callable(sink) or isinstance(sink, type) or not _is_called_so(sink):
        raise TypeError(
            f"{name} is {sink!r:.200}: pass a function that can be called as sink(figures, step=step), such as json_lines(path) returns"
        )
    checked: Sink = sink
    return checked


def _is_called_so(sink: Any) -> bool:
    try:
        signature = inspect.signature(sink)
    except ValueError:  # of a function in C, which might be right
        return True
    try:
        signature.bind({}, step=0)
    except TypeError:
        return False
    return True


def _gradient_figures(stats: Stats, top: int | None) -> Figures:
    figures: Figures = {
        "norm": stats.l2,
        "sign_cosine": stats.sign_cosine,
        "zeros": float(stats.zeros),
        "nonfinite": float(stats.nans + stats.infs),
    }
    layers = stats.per_tensor
    if layers is not None:
        columns = {"norm": layers.l2, "sign_cosine": layers.sign_cosine, "zeros": layers.zeros, "nonfinite": layers.nans + layers.infs}
        chosen = range(len(layers.names)) if top is None else np.sort(largest_first(layers.l2)[:top])
        for figure, column in columns.items():
            values = column.tolist()
            figures.update((f"{figure}/{layers.names[index]}", values[index]) for index in chosen)
    return figures


def _clip_figures(norm: float, clipped: Mapping[str, tuple[float, Rule | float | None]]) -> Figures:
    """The figures of clipping. ``clipped`` maps the ending of the figures' names, "" or "/group", to coefficient and rule."""
    figures = {"clip/norm": norm}
    for ending, (coefficient, rule) in clipped.items():
        figures[f"clip/coefficient{ending}"] = coefficient
        # What followed training has noted its limit; for fixed rules it is a constant.
        threshold = getattr(rule, "last_limit", getattr(rule, "max_norm", None)) if isinstance(rule, Rule) else rule
        if threshold is not None:
            figures[f"clip/threshold{ending}"] = float(threshold)
    return figures
