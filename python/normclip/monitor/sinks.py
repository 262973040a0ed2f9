"""Sinks, which receive the figures of each step: files of JSON lines and TensorBoard. They may be pickled, to log in another process."""

from __future__ import annotations

import json
import math
import os
import pickle
import weakref
from pathlib import Path
from typing import Any, Protocol, TypeAlias

__all__ = ["Figures", "Sink", "json_lines", "tensorboard"]

Figures: TypeAlias = "dict[str, float]"


class Sink(Protocol):
    """What a monitor calls for every logged step: a function of the figures, and of the number of the step as the keyword ``step``.

    ``log_metrics`` of Lightning's loggers and ``wandb.log`` are called in the same way. The sink may keep or change the dictionary.

    Example:
        >>> import torch
        >>> from normclip.monitor import Figures, GradMonitor
        >>> def largest(figures: Figures, step: int) -> None:
        ...     norms = {name: figure for name, figure in figures.items() if name.startswith("norm/")}
        ...     print(step, max(norms, key=norms.get))
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([3.0, 4.0])).sum().backward()
        >>> GradMonitor(model, largest).observe()
        0 norm/weight
    """

    def __call__(self, figures: Figures, /, *, step: int) -> object:
        """Take the figures of a step."""


class json_lines:  # noqa: N801 (called as a function)
    r"""A sink that adds each step as a line of JSON to a file.

    A line is an object with ``"step"`` and the figures; figures that are not finite are null, as JSON has no NaN. Lines are appended to an
    existing file, and are complete when the step ends. If the last line of the file is incomplete, as after a crash, the next step starts a
    new line.

    Args:
        path: The file. A relative path is resolved now, so that changing the current directory later has no effect.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> log = json_lines("gradients.jsonl")
        >>> log({"norm": 5.0, "sign_cosine": math.nan}, step=0)
        >>> Path("gradients.jsonl").read_text()
        '{"step": 0, "norm": 5.0, "sign_cosine": null}\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path).absolute()
        with self.path.open("ab"):  # to fail now rather than after the first step
            _ends_within_a_line(self.path)

    def __call__(self, figures: Figures, step: int) -> None:
        """Add a line."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        begun = _ends_within_a_line(self.path)
        with self.path.open("ab") as file:
            file.write(("\n" + line if begun else line).encode())

    def __repr__(self) -> str:
        return f"json_lines({str(self.path)!r})"


def _ends_within_a_line(path: Path) -> bool:
    if not path.is_file():
        return False  # does not exist yet, or is not a regular file, such as a pipe
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class tensorboard:  # noqa: N801 (called as a function)
    """A sink that writes each figure as a scalar of TensorBoard.

    Args:
        writer: A folder, or a ``torch.utils.tensorboard.SummaryWriter``, or another object with a method ``add_scalar(name, value, step)``.
            For a folder, the process that logs opens a ``SummaryWriter`` in its first step and closes it when the process ends. A
            ``SummaryWriter`` has threads and cannot be pickled: to pickle the sink, pass the folder.

    Raises:
        ImportError: ``writer`` is a folder, and TensorBoard is not installed.
        OSError: The folder cannot be created.
        TypeError: ``writer`` is none of these.

    Example:
        >>> class Writer:
        ...     def add_scalar(self, name, value, step):
        ...         print(step, name, value)
        >>> tensorboard(Writer())({"norm": 5.0}, step=7)
        7 norm 5.0
    """

    def __init__(self, writer: Any) -> None:
        self._folder: Path | None = None
        self._writer: Any = None
        if isinstance(writer, (str, os.PathLike)):
            import torch.utils.tensorboard  # noqa: F401 (to fail now rather than after the first step)

            self._folder = Path(writer).absolute()
            self._folder.mkdir(parents=True, exist_ok=True)
        elif callable(getattr(writer, "add_scalar", None)):
            self._writer = writer
        else:
            raise TypeError(f"writer is {writer!r:.200}: pass a folder, or a torch.utils.tensorboard.SummaryWriter")

    def __call__(self, figures: Figures, step: int) -> None:
        """Write a scalar for each figure."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
            weakref.finalize(self, self._writer.close)  # flushes what is still buffered
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def __repr__(self) -> str:
        return f"tensorboard({self._writer if self._folder is None else str(self._folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        if self._folder is not None:
            return {"_folder": self._folder, "_writer": None}
        try:
            pickle.dumps(self._writer)
        except Exception as error:
            raise TypeError(f"{self!r:.200} cannot be pickled: pass the folder to tensorboard in place of the writer") from error
        return vars(self)
