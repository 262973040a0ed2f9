"""The picture that :func:`normclip.monitor.plot` draws: panels one below the other, with the same steps."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from normclip._look import BLUE, DISTINCT, FAINT, INK, MUTED, ORANGE, PANELS, RED, WIDTH, save
from normclip._names import module_of

__all__ = ["draw"]

Array = npt.NDArray[np.float64]

_TITLES = {"norm": "L2 norm", "sign_cosine": "Sign-cosine"}
_EACH = 3  # layers that are named for a figure
_LINE = 12.0  # points from a label to the next
_LONGEST = 28  # letters of a layer's name
_ROWS = 18  # names beside a heat map
_MASS = 20_000  # points of thin lines
_STYLE: dict[Any, Any] = {
    **PANELS,
    "agg.path.chunksize": 10_000,  # for long lines
}


class _Log:
    """The figures of all steps as arrays. A figure that was not logged, or is not finite, is NaN."""

    def __init__(self, rows: Iterable[dict[str, float | None]]) -> None:
        by_step = {row["step"]: row for row in rows}
        self.rows = [by_step[step] for step in sorted(by_step, key=lambda step: step or 0)]
        self.steps = np.array([row["step"] for row in self.rows], np.float64)
        self.names = list(dict.fromkeys(name for row in self.rows for name in row))
        self._figures: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._figures:
            self._figures[name] = np.array([row.get(name) for row in self.rows], np.float64)  # None becomes NaN
        return self._figures[name]

    def layers(self, figure: str) -> list[str]:
        """The layers of which there is this figure, in the order in which they appear."""
        return [name.partition("/")[2] for name in self.under(figure)]

    def under(self, figure: str) -> list[str]:
        """The names of a figure's parts."""
        return [name for name in self.names if name.startswith(f"{figure}/")]

    def table(self, figure: str) -> Array:
        """A row for each layer, a column for each step."""
        return np.array([self[name] for name in self.under(figure)], np.float64).reshape(-1, len(self.steps))

    @property
    def clipped(self) -> Array:
        """The steps in which something was scaled down."""
        coefficients = [self[name] for name in self.names if name.startswith("clip/coefficient")]
        return self.steps[np.any([values < 1.0 for values in coefficients] or [self.steps < 0.0], axis=0)]

    @property
    def nonfinite(self) -> Array:
        """The steps with elements that are not finite."""
        return self.steps[self["nonfinite"] > 0.0]


def draw(rows: Iterable[dict[str, float | None]], heat: str, source: str, path: str | os.PathLike[str]) -> None:
    """Draw the steps of a log into a file. ``source`` is what the picture calls the log."""
    log = _Log(rows)
    colors = dict(zip(_standing_out(log), DISTINCT, strict=False))
    layers = log.layers(heat) if len(log.layers(heat)) > 1 else []
    clips = [name for name in log.names if name.startswith("clip/coefficient")]
    heights = {"norm": 2.5}
    if layers:
        heights["heat"] = float(np.clip(0.165 * len(layers), 1.0, 3.2))
    if "sign_cosine" in log.names:
        heights["sign_cosine"] = 1.9
    if clips:
        heights["clip"] = 1.5
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + sum(height + 0.42 for height in heights.values())), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))[:, 0]
        ends: list[_Ends] = []
        for panel, axes in zip(heights, panels, strict=True):
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            if panel == "heat":
                ends.append(_draw_heat(figure, axes, log, heat, colors, heights[panel]))
                continue
            axes.grid(color=FAINT, linewidth=0.6)
            ends.append(_draw_clipping(axes, log, clips) if panel == "clip" else _draw_curves(axes, log, panel, colors))
            for step in log.nonfinite:
                axes.axvline(step, color=RED, linewidth=1.0, alpha=0.5, zorder=1)
        _mark(panels[0], log)
        last = panels[-1]
        last.set_xlabel("step", color=MUTED)
        last.xaxis.set_major_locator(MaxNLocator(integer=True))
        last.set_xlim(*_edges(log.steps)[[0, -1]])
        figure.suptitle("Gradients by step", x=0.012, ha="left", size=13, weight="bold")
        figure.supxlabel(_caption(log, source), x=0.988, ha="right", size=9, color=MUTED)
        figure.draw_without_rendering()  # to know how high the panels are
        for labels in ends:
            labels.spread(72.0 / figure.dpi)
        save(figure, path)


class _Ends:
    """Names of curves beside their right ends, moved up and down as far as they would overlap."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.labels: list[tuple[float, Any]] = []

    def add_to(self, curve: Array, text: str, color: str, weight: str = "normal") -> None:
        """Name a curve at its last point, if it has one."""
        drawn = curve[curve > 0.0] if self.axes.get_yscale() == "log" else curve[np.isfinite(curve)]
        if len(drawn):
            self.add(drawn[-1], text, color, weight)

    def add(self, at: float, text: str, color: str, weight: str = "normal") -> None:
        """Write a name at a height."""
        label = self.axes.annotate(
            text,
            (1.0, at),
            (12, 0),
            xycoords=self.axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color=color,
            weight=weight,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
        )
        self.labels.append((at, label))

    def spread(self, scale: float) -> None:
        """Move the labels apart, where ``scale`` pixels are a point. To be called when the limits and the size of the panel are known."""
        box = self.axes.get_window_extent()
        places = sorted((self.axes.transData.transform((0.0, at))[1] * scale, index) for index, (at, _) in enumerate(self.labels))
        moved = _apart(np.array([place for place, _ in places]), box.y0 * scale, box.y1 * scale)
        for (old, index), new in zip(places, moved, strict=True):
            self.labels[index][1].set_position((12, new - old))


def _apart(places: Array, low: float, high: float) -> Array:
    """Ascending places with a line's height or more between them, as near as possible to those given, within limits if possible."""
    lines = _LINE * np.arange(len(places))
    heaps: list[list[float]] = []  # places less the lines below them, of labels that touch each other
    for place in places - lines:
        heaps.append([place])
        while len(heaps) > 1 and np.mean(heaps[-2]) > np.mean(heaps[-1]):
            heaps[-2:] = [heaps[-2] + heaps[-1]]
    moved = np.array([np.mean(heap) for heap in heaps for _ in heap])
    return np.clip(moved, low, max(low, high - lines[-1])) + lines if len(places) else places


def _standing_out(log: _Log) -> list[str]:
    """The layers whose figures are furthest from the median of the layers."""
    found: dict[str, None] = {}
    for figure in _TITLES:
        layers, table = log.layers(figure), np.ma.masked_invalid(log.table(figure))
        if figure == "norm":
            table = np.ma.log(table)  # masks what is not positive
        if len(layers) > 0:
            middle: Array = np.ma.median(table, axis=0)  # type: ignore[no-untyped-call]
            distance = np.ma.filled(((table - middle) ** 2).mean(axis=1), -1.0)
            found |= dict.fromkeys(layers[index] for index in np.argsort(-distance, kind="stable")[:_EACH])
    return list(found)


def _shortened(layers: Sequence[str]) -> dict[str, str]:
    """By their names, names without the modules in which all of them are; the beginning of a name that is still long is left out."""
    parts, common = [layer.split(".") for layer in layers], 0
    # Some name is left, and an index stays with the name before it.
    while parts and all(len(each) > common + 1 and each[common] == parts[0][common] and not each[common + 1].isdecimal() for each in parts):
        common += 1
    short = {layer: ".".join(each[common:]) for layer, each in zip(layers, parts, strict=True)}
    return {layer: name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for layer, name in short.items()}


def _draw_curves(axes: Axes, log: _Log, figure: str, colors: dict[str, str]) -> _Ends:
    axes.set_title(_TITLES[figure], pad=8)
    layers, short = log.layers(figure), _shortened(log.layers(figure))
    whole, table, ends = log[figure], log.table(figure), _Ends(axes)
    if figure == "norm" and np.nanmax(np.append(whole, 0.0)) > 0.0:
        axes.set_yscale("log", nonpositive="mask")
        _plain_ticks(axes, np.append(table, whole))
    _thin_lines(axes, log.steps, table[[layer not in colors for layer in layers]])
    for layer, values in zip(layers, table, strict=True):
        if layer in colors:
            _line(axes, log.steps, values, color=colors[layer], linewidth=1.1, zorder=2.2)
            ends.add_to(values, short[layer], colors[layer])
    _line(axes, log.steps, whole, color=INK, linewidth=2.0, zorder=2.4)
    ends.add_to(whole, "all gradients", INK, "bold")
    if figure == "norm":
        if "clip/norm" in log.names and not np.array_equal(log["clip/norm"], whole, equal_nan=True):
            _line(axes, log.steps, log["clip/norm"], color=INK, linewidth=1.4, linestyle=":", zorder=2.4)
            ends.add_to(log["clip/norm"], "norm that is clipped", INK)
        for name in ("clip/threshold", *log.under("clip/threshold")):
            if name in log.names:
                _line(axes, log.steps, log[name], color=ORANGE, linewidth=1.4, linestyle=(0, (4, 2)), zorder=2.3)
                ends.add_to(log[name], " of ".join(name.split("/", 2)[1:]), ORANGE)
    return ends


def _draw_clipping(axes: Axes, log: _Log, coefficients: list[str]) -> _Ends:
    axes.set_title("Clipping", pad=8)
    axes.set_ylim(-0.04, 1.04 if max(np.nanmax(np.append(log[name], 0.0)) for name in coefficients) <= 1.0 else None)
    ends = _Ends(axes)
    for name, color in zip(coefficients, [BLUE, *DISTINCT[1:]] * len(coefficients), strict=False):
        _line(axes, log.steps, log[name], color=color, linewidth=1.1)
        ends.add_to(log[name], " of ".join(name.split("/", 2)[1:]), color)
    _line(axes, log.steps, log["clip/fraction"], color=ORANGE, linewidth=1.6)
    ends.add_to(log["clip/fraction"], "share of steps clipped", ORANGE)
    return ends


def _line(axes: Axes, steps: Array, values: Array, **how: Any) -> None:
    """A line with gaps, and dots where a value has no neighbours."""
    axes.plot(steps, values, solid_capstyle="round", **how)
    if (alone := _alone(values)).any():
        dots = {name: value for name, value in how.items() if name not in ("linewidth", "linestyle")}
        axes.plot(steps[alone], values[alone], ".", markersize=3, **dots)


def _thin_lines(axes: Axes, steps: Array, table: Array) -> None:
    """A thin line for each row; if these would be a mass, their range and that of the middle 80 % of them."""
    how: dict[str, Any] = {"color": MUTED, "zorder": 2.0}
    if table.size > _MASS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of steps without a value
            low, lower, upper, high = np.nanpercentile(table, (0, 10, 90, 100), axis=0)
        axes.fill_between(steps, low, high, alpha=0.25, linewidth=0, **how)
        axes.fill_between(steps, lower, upper, alpha=0.3, linewidth=0, **how)
        return
    for values in table:
        _line(axes, steps, values, linewidth=0.6, alpha=0.4, **how)


def _alone(values: Array) -> npt.NDArray[np.bool_]:
    """Where there is a value between gaps."""
    here = np.pad(np.isfinite(values), 1)
    alone: npt.NDArray[np.bool_] = here[1:-1] & ~here[:-2] & ~here[2:]
    return alone


def _draw_heat(figure: Figure, axes: Axes, log: _Log, kind: str, colors: dict[str, str], height: float) -> _Ends:
    axes.set_title(f"{_TITLES[kind]} by layer", pad=8)
    layers, table, ends = log.layers(kind), log.table(kind), _Ends(axes)
    rows = np.arange(len(layers) + 1) - 0.5
    shown = np.ma.masked_invalid(table)
    if kind == "norm":
        shown = np.ma.masked_less_equal(shown, 0.0)
    if shown.count():
        low, high = float(shown.min()), float(shown.max())
        scale = LogNorm(low, high) if kind == "norm" and low < high else Normalize(low, max(high, low + 1e-12))
        mesh = axes.pcolormesh(_edges(log.steps), rows, shown, norm=scale, cmap="viridis", rasterized=True)
        key = axes.inset_axes((0.84, 1.0 + 0.1 / height, 0.1, 0.09 / height))
        figure.colorbar(mesh, cax=key, orientation="horizontal", ticks=[]).minorticks_off()
        key.spines[:].set_visible(False)
        for at, number, side, shift in ((0.0, low, "right", -5), (1.0, high, "left", 5)):
            place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": side, "va": "center"}
            key.annotate(f"{number:.2g}", (at, 0.5), (shift, 0), **place)
    broken = np.array([log[f"nonfinite/{layer}"] for layer in layers]) > 0.0
    if broken.any():
        axes.pcolormesh(_edges(log.steps), rows, np.ma.masked_equal(broken, False), cmap=ListedColormap([RED]), rasterized=True)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks([])
    names = _row_names(layers)
    short = _shortened([name for _, name in names])
    for row, name in names:
        ends.add(row, short[name], colors.get(name, INK))
    return ends


def _row_names(layers: list[str]) -> list[tuple[float, str]]:
    """Names for the rows of a heat map: of the layers if there is room, else of modules that have several, in the middle of their rows."""
    if len(layers) <= _ROWS:
        return [(float(row), layer) for row, layer in enumerate(layers)]
    modules, depth = list[str](), 0
    while len(modules) < 4 and depth <= max(layer.count(".") for layer in layers):
        depth += 1
        modules = list(dict.fromkeys(module_of(layer, depth) for layer in layers))
    owners = np.array([module_of(layer, depth) for layer in layers])
    if len(modules) > _ROWS:
        modules = [modules[index] for index in np.linspace(0, len(modules) - 1, _ROWS).round().astype(int)]
    return [(float(np.flatnonzero(owners == module).mean()), module) for module in modules]


def _mark(axes: Axes, log: _Log) -> None:
    """Mark what happened in single steps: at the foot of a panel those that were clipped, at its head those that are not finite."""
    kinds = ((log.clipped, "clipped step", "|", ORANGE, 0.02), (log.nonfinite, "not finite", "x", RED, 1.0))
    keys = []
    for steps, name, marker, color, height in kinds:
        if len(steps):
            style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "none", "markersize": 5.5}
            axes.plot(steps, np.full(len(steps), height), transform=axes.get_xaxis_transform(), clip_on=False, zorder=3, **style)
            keys.append(Line2D([], [], label=name, **style))
    if keys:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
        axes.legend(handles=keys, ncols=2, frameon=False, handletextpad=0.1, columnspacing=1.2, labelcolor=INK, **place)


def _plain_ticks(axes: Axes, values: Array) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, …, or at powers of 10 if it spans many."""
    positive = values[np.isfinite(values) & (values > 0.0)]
    few = positive.max() / positive.min() < 100.0
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _edges(steps: Array) -> Array:
    """The borders between steps, and those of the first and the last."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2.0
    return np.concatenate([[2.0 * steps[0] - middles[0]], middles, [2.0 * steps[-1] - middles[-1]]])


def _caption(log: _Log, source: str) -> str:
    parts = [source, f"{len(log.steps):,} steps"]
    if any(name.startswith("clip/coefficient") for name in log.names):
        parts.append(f"{len(log.clipped) / len(log.steps):.0%} clipped")
    if len(log.nonfinite):
        parts.append(f"{len(log.nonfinite):,} not finite")
    return " · ".join(parts)
