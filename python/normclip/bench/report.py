"""The report of a benchmark run, as JSON and as a table on the terminal."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import normclip
from normclip import _core
from normclip.bench.machine import cpu_model
from normclip.bench.measure import Row

__all__ = [
    "QUIET",
    "Report",
    "duration",
    "error_text",
    "make_report",
    "print_report",
    "progress_bar",
    "ratio_text",
    "share_text",
    "short_dtype",
]

QUIET = 0.05
"""The share of CPU time that other programs use on an idle machine is below this."""


@dataclass(frozen=True)
class Report:
    """The rows of one run, with all that is needed to compare them with those of another."""

    normclip: str
    torch: str
    numpy: str
    python: str
    cpu: str
    cores: int
    threads: int
    isa: str
    date: str
    command: str
    read_gb_per_s: float | None
    """This machine's read bandwidth, measured by a plain read of the largest workload."""
    other_load: float | None
    """The share of the machine's CPU time that other programs used during the run; None if the system does not report it."""
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def make_report(rows: Sequence[Row], command: str, other_load: float | None) -> Report:
    """Make a report of the rows, with facts about this machine and the versions in use."""
    reads = [(row.bytes, row.in_training.read_gb_per_s) for row in rows if row.in_training.read_gb_per_s is not None]
    return Report(
        normclip=normclip.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        threads=normclip.get_num_threads(),
        isa=_core.isa(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        read_gb_per_s=max(reads)[1] if reads else None,
        other_load=other_load,
        rows=tuple(rows),
    )


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A context manager that shows a progress bar on stderr, and yields the `progress` function of `run`."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


def print_report(report: Report, console: Console) -> None:
    """Print the machine and the versions, then a table with one line for each row."""
    bandwidth = "" if report.read_gb_per_s is None else f" · reads {report.read_gb_per_s:.1f} GB/s"
    console.print(f"[bold]{report.cpu}[/] · {report.cores} cores · {report.threads} threads{bandwidth}")
    console.print(
        f"normclip {report.normclip} ({report.isa}) · torch {report.torch} · NumPy {report.numpy} · Python {report.python}",
        highlight=False,
    )
    console.print(_table(report.rows))
    console.print("Errors are relative to an exact reference; “float64” is normclip's norm before rounding to float32.")
    console.print("GB/s is what normclip moves, share how near that comes to a plain read of the same tensors.")
    console.print("Each call follows directly on an operation of torch on all threads; back to back: on another call, in alternation.")
    if report.other_load is not None and report.other_load > QUIET:
        console.print(f"[yellow]Other programs used {report.other_load:.0%} of the CPU meanwhile: do not rely on these times.[/]")


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("gradients")
    table.add_column("call")
    errors = ("torch\nerror", "normclip\nerror", "float64\nerror")
    for heading in ("torch", "normclip", "faster", "GB/s", "share", "back to\nback", *errors):
        table.add_column(heading, justify="right", no_wrap=True)
    for (workload, dtype), group in groupby(rows, key=lambda row: (row.workload, row.dtype)):
        heading = f"{workload} {short_dtype(dtype)}"
        for row in group:
            speed = row.in_training
            table.add_row(
                heading,
                row.operation,
                duration(speed.torch_ms),
                duration(speed.normclip_ms),
                _colored(speed.ratio),
                f"{speed.gb_per_s:.1f}",
                share_text(speed.read_share),
                _colored(row.back_to_back.ratio),
                error_text(row.torch_error),
                error_text(row.normclip_error),
                error_text(row.float64_error),
            )
            heading = ""  # only on the first row of a group
        table.add_section()
    return table


def _colored(ratio: float) -> str:
    return f"[{'green' if ratio >= 1.0 else 'red'}]{ratio_text(ratio)}[/]"


def short_dtype(name: str) -> str:
    """`float32` as f32, `bfloat16` as bf16."""
    return name.replace("float", "f")


def duration(milliseconds: float) -> str:
    """A time with about three digits, in milliseconds or microseconds."""
    if milliseconds >= 1.0:
        return f"{milliseconds:.{0 if milliseconds >= 100 else 1}f} ms"
    return f"{milliseconds * 1e3:.{0 if milliseconds >= 0.1 else 1}f} µs"


def ratio_text(ratio: float) -> str:
    """`2.71×`, `12.4×`."""
    return f"{ratio:.{1 if ratio >= 10 else 2}f}×"


def share_text(share: float | None) -> str:
    """`97%`; empty for None."""
    return "" if share is None else f"{share:.0%}"


def error_text(error: float | None) -> str:
    """`8e-04`; empty for None."""
    return "" if error is None else "0" if error == 0 else f"{error:.0e}"
