"""Gradients while a model trains, step by step: their norms, signs, zeros and non-finite values, and what clipping does to them.

:class:`GradMonitor` makes of every step a dictionary of figures, from the read that clips, and passes it to sinks: any function of a step
and its figures, :func:`json_lines`, :func:`tensorboard`. :func:`plot` draws what was written.

Figures, where a layer is a parameter by its name:

=================================  =====================================================================================
``norm``, ``norm/<layer>``         L2 norm before clipping
``sign_cosine``, ``…/<layer>``     cosine between the gradient and its signs (see :class:`normclip.Stats`)
``zeros``, ``zeros/<layer>``       number of elements equal to 0
``nonfinite``, ``…/<layer>``       number of elements that are NaN or infinite
``clip/norm``                      the norm that was compared with the threshold, which may be of another order
``clip/coefficient``, ``…/<g>``    what the gradients were multiplied by, or those of each group with a limit
``clip/threshold``, ``…/<g>``      the limit, of rules that have a ``max_norm``; of those that follow training the present one
``clip/fraction``                  share of the last logged steps (100 of them) in which a coefficient was not 1 or more
=================================  =====================================================================================
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from normclip._arguments import check_order
from normclip._backends import NORMS
from normclip.clip import TORCH_EPSILON, clip_grad_norm_, clip_grads_with_norm_
from normclip.clip_grads import Clipped, Nonfinite, clip_grads_
from normclip.rules import Hard, Rule
from normclip.statistics import Groups, Stats, grad_stats, named

if TYPE_CHECKING:
    import os

    import torch

Figures: TypeAlias = "dict[str, float]"
Sink: TypeAlias = Callable[[int, Figures], object]
"""What a monitor tells: a function of the step and its figures."""


class GradMonitor:
    """Logs the gradients of a model, step by step.

    Call :meth:`clip_` in place of :func:`normclip.clip_grads_`, or :meth:`observe` where something else clips. Where that is torch's
    ``clip_grad_norm_``, :func:`normclip.patch_torch` with the monitor makes it one read for both.

    Args:
        model: A module, or pairs of name and parameter.
        log: A sink or several: functions of a step and a dictionary of its figures.
        every: Log each step whose number this divides. Others are clipped, and cost no more than that.
        layers: Also give the figures of each parameter.

    Attributes:
        log: The sinks. They change nothing but who is told, so in distributed training leave them to one rank, and give the others monitors
            without: shards are measured by all ranks together, and replicas clipped by the same bits everywhere.
        step: The number of the next step, which may be set.

    Raises:
        ValueError: ``every`` is not positive.

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
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: pass a positive number of steps")
        self.model: Any = model if hasattr(model, "named_parameters") else list(model)
        self.log: tuple[Sink, ...] = (log,) if callable(log) else tuple(log)
        self.every = every
        self.layers = layers
        self.step = 0
        self._clipped: deque[bool] = deque(maxlen=100)

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
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip as torch does, like :func:`normclip.clip_grad_norm_`, and log from the same read.

        Args:
            parameters: Parameters of the model.
            max_norm: As for :func:`normclip.clip_grad_norm_`.
            norm_type: The same. Orders other than 1, 2 and ``inf`` take one more read.
            error_if_nonfinite: The same.

        Returns:
            The norm before clipping, as :func:`normclip.clip_grad_norm_` returns it.

        Raises:
            RuntimeError, TypeError, ValueError: As for :func:`normclip.clip_grad_norm_`. Nothing is logged, and the step does not count.
        """
        import torch

        parameters, order = list(parameters), check_order("norm_type", norm_type)
        stats, clip = None, {}
        if self._due:
            names = self._names()
            pairs: Any = [(names[id(parameter)], parameter) for parameter in parameters]
            stats = grad_stats(pairs, per_tensor=self.layers, norms=() if order in NORMS else (order,))
            norm = stats.norms[order] if order not in NORMS else getattr(stats, NORMS[order])
        if stats is None or (error_if_nonfinite and not math.isfinite(norm)):
            total_norm = clip_grad_norm_(parameters, max_norm, order, error_if_nonfinite)
        else:
            clip_grads_with_norm_(parameters, max_norm, norm)
            if max_norm < math.inf:
                clip = _clip_figures(norm, {"": (Hard(max_norm).multiplier(norm + TORCH_EPSILON), max_norm)})
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            double = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
            total_norm = torch.tensor(norm, dtype=torch.float64 if double else torch.float32, device=grads[0].device if grads else "cpu")
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
        for sink in self.log:
            sink(step, figures)


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


def json_lines(path: str | os.PathLike[str]) -> Sink:
    r"""A sink that adds each step as a line of JSON to a file.

    A line is an object of ``"step"`` and the figures; those that are not finite are null, as JSON has no NaN. Lines are added to what the
    file holds, and are complete when the step ends.

    Args:
        path: The file.

    Returns:
        The sink.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> log = json_lines("gradients.jsonl")
        >>> log(0, {"norm": 5.0, "sign_cosine": math.nan})
        >>> Path("gradients.jsonl").read_text()
        '{"step": 0, "norm": 5.0, "sign_cosine": null}\n'
    """
    file = Path(path)
    file.touch()  # to fail now rather than after the first step

    def log(step: int, figures: Figures) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **finite}) + "\n")

    return log


def tensorboard(writer: Any) -> Sink:
    """A sink that writes each figure as a scalar of TensorBoard.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or whatever else has its ``add_scalar(name, value, step)``.

    Returns:
        The sink.

    Example:
        >>> class Writer:
        ...     def add_scalar(self, name, value, step):
        ...         print(step, name, value)
        >>> tensorboard(Writer())(7, {"norm": 5.0})
        7 norm 5.0
    """

    def log(step: int, figures: Figures) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return log


def plot(lines: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw what :func:`json_lines` has written: norms and threshold, sign-cosine, and how much was clipped, by step.

    Layers are thin lines behind those of all gradients; steps with non-finite elements are marked. Needs matplotlib.

    Args:
        lines: The file of JSON lines.
        path: The picture, in a format that matplotlib knows by its suffix.

    Raises:
        ValueError: The file holds no steps.

    Example:
        >>> log = json_lines("gradients.jsonl")
        >>> for step in range(3):
        ...     log(step, {"norm": 5.0 - step, "sign_cosine": 0.8, "nonfinite": 0.0})
        >>> plot("gradients.jsonl", "gradients.svg")
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in Path(lines).read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise ValueError(f"{lines} holds no steps")
    steps = [row["step"] for row in rows]
    names = sorted({name for row in rows for name in row})

    def curve(axes: Any, name: str, **style: Any) -> None:
        if name in names:
            # A figure that was not logged, or not finite, is a gap.
            axes.plot(steps, [math.nan if row.get(name) is None else row[name] for row in rows], **style)

    figure = Figure(figsize=(9.0, 8.0), layout="constrained")
    norms, cosines, clipping = figure.subplots(3, 1, sharex=True)
    for axes, name in ((norms, "norm"), (cosines, "sign_cosine")):
        for layer in (layer for layer in names if layer.startswith(f"{name}/")):
            curve(axes, layer, color="0.8", linewidth=0.6)
        curve(axes, name, color="C0", label="all gradients")
    norms.set(ylabel="L2 norm")
    if any(row.get("norm") for row in rows):
        norms.set_yscale("log")  # which has no place for zeros alone
    cosines.set(ylabel="sign-cosine")
    if any(row.get("clip/norm") != row.get("norm") for row in rows if "clip/norm" in row):
        curve(norms, "clip/norm", color="C2", linestyle=":", label="norm that is clipped")
    curve(norms, "clip/threshold", color="C3", linestyle="--", label="threshold")
    curve(clipping, "clip/coefficient", color="C0", label="coefficient")
    curve(clipping, "clip/fraction", color="C1", label="share of steps clipped")
    for step in (row["step"] for row in rows if row.get("nonfinite")):
        for axes in (norms, cosines, clipping):
            axes.axvline(step, color="C3", alpha=0.3)
    for axes in (norms, clipping):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    clipping.set(ylabel="clipping", xlabel="step")
    figure.savefig(path)
