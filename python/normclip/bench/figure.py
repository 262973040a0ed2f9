"""The figure of a benchmark run: speedups over which code, and beside them relative errors."""

from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from normclip._look import BLUE, FAINT, INK, MUTED, ORANGE, STYLE, WIDTH, save
from normclip.bench.measure import Row
from normclip.bench.report import QUIET, Report, duration, ratio_text, short_dtype

__all__ = ["BESIDE", "draw"]

_MOST_ROWS = 14
_PAD = 6.0  # points between the axis and its labels
_TORCH, _NORMCLIP = ORANGE, BLUE
BESIDE = {
    "clip, below the limit": "clip_grad_norm_",
    "clip, scaling": "clip_grad_norm_",
    "L1 norm": "get_total_norm(…, 1)",
    "L2 norm": "get_total_norm",
    "L3 norm": "get_total_norm(…, 3)",
    "Linf norm": "get_total_norm(…, inf)",
    "all statistics": "3 norms; sums of == 0, isnan, isinf",
    "all; torch L1 + L2": "two norms: L1 and L2",
    "all; normclip L2": "normclip's L2 norm",
    "per tensor; all": "normclip's, of all together",
    "dot product": "torch.dot of each tensor",
    "clip + SGD step": "clip_grad_norm_, then fused SGD",
    "clip + SGD, momentum": "clip_grad_norm_, then fused SGD",
    "clip + AdamW step": "clip_grad_norm_, then AdamW",
    "clip + AdamW(fused=True)": "clip_grad_norm_, then AdamW(fused=True)",
    "limited; free AdamW step": "normclip's, without descent_limit",
}
"""What each operation is compared with; the functions are those of torch.nn.utils."""
_EXACT = 1e-10  # smaller errors are drawn at this value, as a logarithmic axis has no place for 0
_STYLE: dict[Any, Any] = {
    **STYLE,
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "ytick.color": INK,
}


def draw(report: Report, path: Path) -> None:
    """Draw the first rows of the report into `path`, an SVG or PNG by its suffix."""
    rows = report.rows[:_MOST_ROWS]
    places, headings = _layout(rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 1.4 + 0.4 * (max(places) + 1)), layout="constrained")
        speed, error = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        _draw_speed(speed, rows, places)
        _draw_error(error, rows, places)
        speed.set_yticks(places, [row.operation for row in rows])
        speed.tick_params(axis="y", pad=_PAD)
        for label in speed.get_yticklabels():
            label.set_verticalalignment("bottom")
        for row, place in zip(rows, places, strict=True):
            left = {"xycoords": speed.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "top"}
            speed.annotate(BESIDE.get(row.operation, ""), (0, place), (-_PAD, -0.5), color=MUTED, size=9, **left)
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
        figure.supxlabel(_caption(report), x=0.012, ha="left", size=9, color=MUTED, linespacing=1.5)
        save(figure, path)


def _caption(report: Report) -> str:
    versions = f"torch {report.torch} · normclip {report.normclip} ({report.isa}) · Python {report.python}"
    lines = [
        f"{report.cpu}, {report.threads} threads · {versions}",
        "Below each call: what it is compared with, by default torch.nn.utils. Times: torch → normclip, medians right after work of torch.",
    ]
    if report.other_load is None:
        lines.append("The load by other programs is not known.")
    elif report.other_load > QUIET:
        lines.append(f"Other programs used {report.other_load:.0%} of the CPU meanwhile: do not rely on these times.")
    else:
        lines.append(f"Other programs used {report.other_load:.0%} of the CPU meanwhile.")
    return "\n".join(lines)


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
    axes.barh(places, [ratio - 1.0 for ratio in ratios], left=1.0, height=0.55, color=colors)
    axes.axvline(1.0, color=INK, linewidth=1.0)
    for row, place in zip(rows, places, strict=True):
        end = (max(row.in_training.ratio, 1.0), place)
        times = f"{duration(row.in_training.torch_ms)} → {duration(row.in_training.normclip_ms)}"
        axes.annotate(ratio_text(row.in_training.ratio), end, (5, 0), textcoords="offset points", va="center_baseline", weight="bold")
        axes.annotate(times, end, (42, 0), textcoords="offset points", va="center_baseline", color=MUTED, size=9)
    axes.set_xscale("log")
    axes.set_xlim(min(0.95, *ratios), max(*ratios, 2.0) ** 1.5)  # a third of the width for the text behind a bar
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= max(*ratios, 2.0)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}×"))
    _clean(axes, "Speedup, right after torch's work")


def _draw_error(axes: Axes, rows: tuple[Row, ...], places: list[float]) -> None:
    torch_errors = [max(row.torch_error, _EXACT) for row in rows]
    normclip_errors = [max(row.normclip_error, _EXACT) for row in rows]
    axes.hlines(places, torch_errors, normclip_errors, color=FAINT, linewidth=1.5, zorder=1)
    # normclip's marker is smaller, so that both are visible if the errors are equal.
    axes.scatter(torch_errors, places, s=44, color=_TORCH, label="torch", zorder=2)
    axes.scatter(normclip_errors, places, s=22, color=_NORMCLIP, label="normclip", zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(_EXACT / 3, max(1e-1, *torch_errors) * 3)
    axes.xaxis.set_major_locator(FixedLocator([_EXACT, 1e-6, 1e-2]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.0e}" if tick > _EXACT else f"≤{_EXACT:.0e}"))
    # In the row of the first heading, which is empty here.
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, handletextpad=0.0, columnspacing=0.6)
    _clean(axes, "Relative error")


def _clean(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=11, weight="bold", pad=10)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=_PAD)
