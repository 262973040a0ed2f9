"""The figure of a benchmark run: speedups, and beside them relative errors."""

from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from normclip._look import FAINT, INK, MUTED, STYLE
from normclip.bench.measure import Row
from normclip.bench.report import Report, duration, ratio_text, short_dtype

__all__ = ["draw"]

_MOST_ROWS = 14
_PAD = 6.0  # points between the axis and its labels
_TORCH, _NORMCLIP = "#f0883e", "#0969da"
_EXACT = 1e-10  # smaller errors are drawn at this value, as a logarithmic axis has no place for 0
_STYLE: dict[Any, Any] = {
    **STYLE,
    "axes.edgecolor": FAINT,
    "ytick.color": INK,
}


def draw(report: Report, path: Path) -> None:
    """Draw the first rows of the report into `path`, an SVG or PNG by its suffix."""
    rows = report.rows[:_MOST_ROWS]
    places, headings = _layout(rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 1.3 + 0.25 * (max(places) + 1)), facecolor="white", layout="constrained")
        speed, error = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _draw_speed(speed, rows, places)
        _draw_error(error, rows, places)
        speed.set_yticks(places, [row.operation for row in rows])
        speed.set_ylim(max(places) + 0.7, min(headings) - 0.6)
        for place, heading in headings.items():
            axis = speed.get_yaxis_transform()
            speed.annotate(
                heading,
                (0, place),
                (-_PAD, 0),
                xycoords=axis,
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                weight="bold",
            )
        figure.supxlabel(_caption(report), x=0.995, ha="right", size=8, color=MUTED)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _caption(report: Report) -> str:
    return (
        f"{report.cpu}, {report.threads} threads · torch {report.torch} · normclip {report.normclip}"
        f" ({report.isa}) · Python {report.python}"
    )


def _layout(rows: tuple[Row, ...]) -> tuple[list[float], dict[float, str]]:
    """The vertical position of each row, from the top, and the heading of each group of rows by its position."""
    places: list[float] = []
    headings: dict[float, str] = {}
    place = 0.0
    for (workload, dtype), group in groupby(rows, key=lambda row: (row.workload, row.dtype)):
        headings[place] = f"{workload} {short_dtype(dtype)}"
        for _ in group:
            place += 1.0
            places.append(place)
        place += 1.25
    return places, headings


def _draw_speed(axes: Axes, rows: tuple[Row, ...], places: list[float]) -> None:
    ratios = [row.in_training.ratio for row in rows]
    colors = [_NORMCLIP if ratio >= 1.0 else _TORCH for ratio in ratios]
    # Bars start at 1×, where both are equally fast, and extend to the right if normclip is faster.
    axes.barh(places, [ratio - 1.0 for ratio in ratios], left=1.0, height=0.68, color=colors)
    axes.axvline(1.0, color=INK, linewidth=1.0)
    for row, place in zip(rows, places, strict=True):
        end = (max(row.in_training.ratio, 1.0), place)
        times = f"{duration(row.in_training.torch_ms)} → {duration(row.in_training.normclip_ms)}"
        axes.annotate(ratio_text(row.in_training.ratio), end, (5, 0), textcoords="offset points", va="center_baseline", weight="bold")
        axes.annotate(times, end, (40, 0), textcoords="offset points", va="center_baseline", color=MUTED, size=8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.95, *ratios), max(*ratios, 2.0) ** 1.5)  # a third of the width for the text behind a bar
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= max(*ratios, 2.0)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}×"))
    _clean(axes, "Speedup over torch")


def _draw_error(axes: Axes, rows: tuple[Row, ...], places: list[float]) -> None:
    torch_errors = [max(row.torch_error, _EXACT) for row in rows]
    normclip_errors = [max(row.normclip_error, _EXACT) for row in rows]
    axes.hlines(places, torch_errors, normclip_errors, color=FAINT, linewidth=1.5, zorder=1)
    # normclip's marker is smaller, so that both are visible if the errors are equal.
    axes.scatter(torch_errors, places, s=44, color=_TORCH, label="torch", zorder=2)
    axes.scatter(normclip_errors, places, s=22, color=_NORMCLIP, label="normclip", zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(_EXACT / 3, max(1e-1, *torch_errors) * 3)
    axes.xaxis.set_major_locator(FixedLocator([_EXACT, 1e-8, 1e-6, 1e-4, 1e-2]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.0e}" if tick > _EXACT else f"≤{_EXACT:.0e}"))
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.998), ncols=2, frameon=False, handletextpad=0.0, columnspacing=0.6)
    _clean(axes, "Relative error")


def _clean(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=11, weight="bold", pad=10)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=_PAD)
