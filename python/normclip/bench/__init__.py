"""Measures the speed and the error of normclip and of torch on this machine: what `normclip bench` runs.

Needs the extra `cli`: `pip install 'normclip[cli]'`.
"""

from collections.abc import Callable

import torch

import normclip
from normclip.bench.machine import OtherLoad
from normclip.bench.measure import Row, WrongAnswerError, measure
from normclip.bench.report import Report, make_report
from normclip.bench.timing import Budget
from normclip.bench.workloads import FULL, QUICK

__all__ = ["Report", "Row", "WrongAnswerError", "run"]

Progress = Callable[[int, int, str], None]
"""Called before each step with the number of rows done, the number of all rows, and a label for the step."""


def run(
    *,
    quick: bool = False,
    threads: int | None = None,
    command: str = "normclip bench",
    progress: Progress = lambda *_: None,
) -> Report:
    """Measure every row and report.

    Args:
        quick: Use small gradients and few rounds, to see that everything works. The times mean little.
        threads: The number of threads of torch and normclip; None leaves the choice to each.
        command: The command line to show in the report.
        progress: Called before each step.

    Raises:
        ValueError: :func:`normclip.set_num_threads` does not accept ``threads``. Nothing is set.
        WrongAnswerError: normclip returned a wrong result. No time of that row has been measured.
    """
    if threads is not None:
        normclip.set_num_threads(threads)
        torch.set_num_threads(threads)
    workloads = QUICK if quick else FULL
    budget = Budget(seconds=0.1, min_rounds=3) if quick else Budget(seconds=2.0)
    total = sum(len(workload.operations) for workload in workloads)
    other_load = OtherLoad()
    rows: list[Row] = []
    for workload in workloads:
        progress(len(rows), total, f"{workload.name}: make gradients")
        gradients = workload.make()
        for operation in workload.operations:
            progress(len(rows), total, f"{workload.name}: {operation.label}")
            rows.append(measure(workload.name, gradients, operation, budget))
        del gradients  # frees the memory for the next workload
    progress(total, total, "done")
    return make_report(rows, command, other_load.share())
