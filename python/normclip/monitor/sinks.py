"""What a monitor tells: files of JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import os

Figures: TypeAlias = "dict[str, float]"
Sink: TypeAlias = Callable[[int, Figures], object]
"""What a monitor tells: a function of the step and its figures."""


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
