"""Plots of logged figures."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

__all__ = ["plot"]


def plot(lines: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Plot the file that :func:`json_lines` has written: norms and threshold, sign-cosine, and how much was clipped, by step.

    Layers are thin lines behind the lines of all gradients; steps with non-finite elements are marked. Lines of the file that cannot be
    read, such as one that a crash has cut off, are left out with a warning that names their numbers. Needs matplotlib.

    Args:
        lines: The file of JSON lines.
        path: The file of the plot, in the format of its suffix.

    Raises:
        ValueError: No line of the file can be read.

    Example:
        >>> from normclip.monitor import json_lines
        >>> log = json_lines("gradients.jsonl")
        >>> for step in range(3):
        ...     log({"norm": 5.0 - step, "sign_cosine": 0.8, "nonfinite": 0.0}, step=step)
        >>> plot("gradients.jsonl", "gradients.svg")
    """
    from matplotlib.figure import Figure

    rows = _rows(Path(lines))
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
        norms.set_yscale("log")  # fails if all values are 0
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


def _rows(path: Path) -> list[dict[str, float | None]]:
    """The steps of a file of JSON lines.

    Raises:
        ValueError: No line can be read.
    """
    rows, faults = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line:
            try:
                rows.append(_row(line))
            except ValueError as error:
                faults.append(f"line {number} ({error})")
    shown = ", ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
    if not rows:
        raise ValueError(f"{path} holds no steps{shown and ' that can be read: '}{shown}")
    if faults:
        warnings.warn(f"{path}: what cannot be read is left out: {shown}", RuntimeWarning, stacklevel=3)
    return rows


def _row(line: bytes) -> dict[str, float | None]:
    row = json.loads(line.decode())
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("no object with a step")
    for name, value in row.items():
        if not isinstance(value, (int, float, type(None))):
            raise ValueError(f"{name} is no number")
    return row
