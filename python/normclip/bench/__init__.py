"""Speed and error of normclip beside torch, on this machine: what `normclip bench` runs.

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
"""Told before each step how many rows are done, how many there are, and what comes next."""


def run(
    *,
    quick: bool = False,
    threads: int | None = None,
    command: str = "normclip bench",
    progress: Progress = lambda *_: None,
) -> Report:
    """Measure every row and report.

    Args:
        quick: small gradients and few rounds, to see that everything works. The times mean little.
        threads: how many threads both contenders use; their own choice if None.
        command: how this run was asked for, for the report.
        progress: told what is being measured.

    Raises:
        ValueError: if ``threads`` is not one of those that :func:`normclip.set_num_threads` takes; nothing is set.
        WrongAnswerError: if an answer of normclip's is wrong; nothing of that row has been timed.
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
        del gradients  # the next ones need the memory
    progress(total, total, "done")
    return make_report(rows, command, other_load.share())
