"""Pictures of logged figures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import os

__all__ = ["plot"]


def plot(lines: str | os.PathLike[str], path: str | os.PathLike[str], *, heat: Literal["norm", "sign_cosine"] = "norm") -> None:
    """Plot the file that :func:`json_lines` has written: norms and threshold, sign-cosine, and how much was clipped, by step.

    Layers are thin lines behind the line of all gradients. Those that stand out have colours and names: their norms or sign-cosines are
    furthest from the other layers', by the root mean square over the steps. A heat map shows a figure of all layers. Marks at the foot of
    the norms are steps that were clipped, crosses are steps with non-finite elements. Of a step that was logged several times, as after a
    restart, the last counts. An SVG suits light and dark pages.

    Lines of the file that cannot be read, such as one that a crash has cut off, are left out with a warning that names their numbers. Needs
    matplotlib.

    Args:
        lines: The file of JSON lines.
        path: The file of the plot, in the format of its suffix.
        heat: The figure that the heat map shows.

    Raises:
        ValueError: No line of the file can be read, or ``heat`` is neither figure.

    Example:
        >>> from normclip.monitor import json_lines
        >>> log = json_lines("gradients.jsonl")
        >>> for step in range(3):
        ...     log({"norm": 5.0 - step, "sign_cosine": 0.8, "nonfinite": 0.0}, step=step)
        >>> plot("gradients.jsonl", "gradients.svg")
    """
    if heat not in ("norm", "sign_cosine"):
        raise ValueError(f"heat is {heat!r}: choose 'norm' or 'sign_cosine'")
    rows = _rows(Path(lines))
    from normclip.monitor.picture import draw

    draw(rows, heat, Path(lines).name, path)


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
