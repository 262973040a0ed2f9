"""What is logged, when, and from which read."""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from normclip._arguments import TORCH_EPSILON, Parameters, check_limit, check_order
from normclip._core import NORMS, listed
from normclip._results import as_tensor, check_finite, mark_written
from normclip.clip import clip_grad_norm_
from normclip.clip_grads import Clipped, Nonfinite, clip_grads_
from normclip.monitor.sinks import Figures, Sink
from normclip.rules import Hard, Rule
from normclip.statistics import Groups, Stats, grad_stats, measure, named, take_grads

if TYPE_CHECKING:
    import torch


class GradMonitor:
    """Logs the gradients of a model, step by step.

    Call :meth:`clip_` in place of :func:`normclip.clip_grads_`, or :meth:`observe` where something else clips. Where that is torch's
    ``clip_grad_norm_``, :func:`normclip.patch_torch` with the monitor makes it one read for both.

    Args:
        model: A module, or pairs of name and parameter.
        log: A sink or several: functions of a step and a dictionary of its figures.
        every: Log each step whose number this divides. Others are clipped, and cost no more than that.
        layers: Also give the figures of each parameter.
        on_error: What to do about a sink that raises. Gradients are clipped, the step has counted and the other sinks are told by then.
            ``"warn"``: warn of its first error, and go on; it is told of later steps too. ``"raise"``: raise its error, of several the
            first. What is no ``Exception``, such as ``KeyboardInterrupt``, passes at once.

    Attributes:
        log: The sinks. They change nothing but who is told, so in distributed training leave them to one rank, and give the others monitors
            without: shards are measured by all ranks together, and replicas clipped by the same bits everywhere.
        step: The number of the next step, which may be set.

    Raises:
        TypeError: ``log`` is no function and holds something else, such as the path of a file.
        ValueError: ``every`` is not positive, or ``on_error`` is something else.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([3.0, 4.0])).sum().backward()
        >>> monitor = GradMonitor(model, lambda step, figures: print(step, figures["norm/weight"], figures["clip/threshold"]))
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
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: pass a positive number of steps")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error is {on_error!r}: choose 'warn' or 'raise'")
        self.model: Any = model if hasattr(model, "named_parameters") else list(model)
        self.log = _sinks(log)
        self.every = every
        self.layers = layers
        self.on_error = on_error
        self.step = 0
        self._clipped: deque[bool] = deque(maxlen=100)
        self._failed: list[Sink] = []  # those of whose errors was warned

    def clip_(
        self,
        rule: Rule | float | None = None,
        *,
        limits: Mapping[str, Rule | float] | None = None,
        groups: Groups | None = None,
        norm_type: float = 2.0,
        nonfinite: Nonfinite = "propagate",
    ) -> Clipped:
        """Clip the gradients as :func:`normclip.clip_grads_` does, and log them from the same read.

        Args:
            rule: As for :func:`normclip.clip_grads_`.
            limits: The same.
            groups: The same.
            norm_type: The same.
            nonfinite: The same.

        Returns:
            What :func:`normclip.clip_grads_` returns.

        Raises:
            RuntimeError, TypeError, ValueError: As for :func:`normclip.clip_grads_`. Nothing is logged, and the step does not count.
        """
        clipped = clip_grads_(
            self.model,
            rule,
            limits=limits,
            groups=groups,
            norm_type=norm_type,
            nonfinite=nonfinite,
            per_tensor=self._due and self.layers,
        )
        if limits is None:
            clip = _clip_figures(clipped.norm, {"": (clipped.coefficient, rule)})
        else:
            clip = _clip_figures(clipped.norm, {f"/{group}": (clipped.coefficients[group], limit) for group, limit in limits.items()})
        self._end_step(clipped.stats, clip)
        return clipped

    def observe(self, stats: Stats | None = None) -> None:
        """Log the gradients as they are, from a read of their own, or as they were found.

        Args:
            stats: What :func:`normclip.grad_stats` has returned, with ``per_tensor=True`` for the figures of each parameter.

        Raises:
            TypeError: As for :func:`normclip.grad_stats`.
        """
        if stats is None and self._due:
            stats = grad_stats(self.model, per_tensor=self.layers)
        self._end_step(stats, {})

    def clip_grad_norm_(
        self, parameters: Parameters, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip as torch does, like :func:`normclip.clip_grad_norm_`, and log from the same read.

        Args:
            parameters: A parameter of the model, or several.
            max_norm: As for :func:`normclip.clip_grad_norm_`.
            norm_type: The same. Orders other than 1, 2 and ``inf`` take one more read.
            error_if_nonfinite: The same.

        Returns:
            The norm before clipping, as :func:`normclip.clip_grad_norm_` returns it.

        Raises:
            RuntimeError, TypeError, ValueError: As for :func:`normclip.clip_grad_norm_`, or a step is to be logged and a parameter is none
                of the model. Nothing has changed on any rank, nothing is logged, and the step does not count.
        """
        parameters, limit, order = listed(parameters, grads=True), check_limit("max_norm", max_norm), check_order("norm_type", norm_type)
        if not self._due:
            total_norm = clip_grad_norm_(parameters, limit, order, error_if_nonfinite)
            self._end_step(None, {})
            return total_norm
        # Taken once, to be written where there is a limit, so that whatever is wrong with a gradient is known before ranks measure.
        taken, names = take_grads(self._pairs(parameters), writable=limit < math.inf)
        orders = () if order in NORMS else (order,)
        stats, _, _ = measure(taken, names, per_tensor=self.layers, orders=orders, groups=None)
        norm = stats.norms[order] if orders else getattr(stats, NORMS[order])
        if error_if_nonfinite:
            check_finite(norm, order, taken, source="gradients from `parameters`")
        mark_written(taken.clip_(limit, norm, TORCH_EPSILON))
        clip = {} if limit == math.inf else _clip_figures(norm, {"": (Hard(limit).multiplier(norm + TORCH_EPSILON), limit)})
        device = next((parameter.grad.device for parameter in parameters if parameter.grad is not None), "cpu")
        total_norm = as_tensor(norm, taken).to(device)
        self._end_step(stats, clip)
        return total_norm

    def covers(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether there are parameters, and all of them are of the model."""
        identities = {id(parameter) for parameter in parameters}
        return bool(identities) and identities <= self._names().keys()

    @property
    def _due(self) -> bool:
        return self.step % self.every == 0

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in named(self.model)}

    def _pairs(self, parameters: list[Any]) -> list[tuple[str, Any]]:
        """Parameters of the model with their names.

        Raises:
            ValueError: One of them is none of the model.
        """
        names = self._names()
        for position, parameter in enumerate(parameters):
            if id(parameter) not in names:
                raise ValueError(f"parameters[{position}] is none of the monitor's model: pass parameters of the model")
        return [(names[id(parameter)], parameter) for parameter in parameters]

    def _end_step(self, stats: Stats | None, clip: Figures) -> None:
        step, due = self.step, self._due
        self.step += 1
        if stats is None or not due:
            return
        figures = _gradient_figures(stats) | clip
        if clip:
            # Not by < 1: a coefficient of NaN is no clipping that went well.
            self._clipped.append(not all(value >= 1.0 for name, value in clip.items() if name.startswith("clip/coefficient")))
            figures["clip/fraction"] = sum(self._clipped) / len(self._clipped)
        self._tell(step, figures)

    def _tell(self, step: int, figures: Figures) -> None:
        errors = [(index, sink, error) for index, sink in enumerate(self.log) if (error := _error_of(sink, step, figures)) is not None]
        # After all were told, as a warning may be an error too.
        for index, sink, error in errors:
            if self.on_error == "raise":
                raise error
            if not any(sink is failed for failed in self._failed):
                self._failed.append(sink)
                warnings.warn(
                    f"log[{index}], {sink!r:.200}, has failed in step {step}, and its further errors are not shown: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=4,
                )


def _error_of(sink: Sink, step: int, figures: Figures) -> Exception | None:
    try:
        sink(step, figures)
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
    if not callable(sink) or isinstance(sink, type):
        raise TypeError(f"{name} is {sink!r:.200}: pass a function of a step and its figures, such as json_lines(path) returns")
    checked: Sink = sink
    return checked


def _gradient_figures(stats: Stats) -> Figures:
    figures: Figures = {
        "norm": stats.l2,
        "sign_cosine": stats.sign_cosine,
        "zeros": float(stats.zeros),
        "nonfinite": float(stats.nans + stats.infs),
    }
    layers = stats.per_tensor
    if layers is not None:
        columns = {"norm": layers.l2, "sign_cosine": layers.sign_cosine, "zeros": layers.zeros, "nonfinite": layers.nans + layers.infs}
        for figure, column in columns.items():
            figures.update(zip([f"{figure}/{name}" for name in layers.names], column.tolist(), strict=True))
    return figures


def _clip_figures(norm: float, clipped: Mapping[str, tuple[float, Rule | float | None]]) -> Figures:
    """Figures of clipping, from coefficient and rule by the ending of the figures' names: of all, or of a group."""
    figures = {"clip/norm": norm}
    for ending, (coefficient, rule) in clipped.items():
        figures[f"clip/coefficient{ending}"] = coefficient
        threshold = getattr(rule, "max_norm", None) if isinstance(rule, Rule) else rule
        if threshold is not None:
            figures[f"clip/threshold{ending}"] = float(threshold)
    return figures
