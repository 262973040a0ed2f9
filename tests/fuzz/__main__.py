"""The command line of the fuzzer."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fuzz.run import Report, fuzz

SHOWN = 3
"""Failures of each check that are shown in full."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description='Differential fuzzing of normclip. Arguments go in ARGS="…".')
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--cases", type=int, help="how many cases instead")
    parser.add_argument("--seed", type=int, help="decides, with its number, on each case (default: the time)")
    parser.add_argument("--jobs", type=int, help="how many processes (default: one a CPU)")
    parser.add_argument("--replay", metavar="SEED:NUMBER", help="run one case again")
    arguments = parser.parse_args()
    console = Console()
    seed = int(time.time()) if arguments.seed is None else arguments.seed

    if arguments.replay is not None:
        seed, number = map(int, arguments.replay.split(":"))
        return _tell(console, fuzz(seed, only=number))

    seconds = None if arguments.cases else arguments.minutes * 60.0
    columns = (
        TextColumn(f"seed {seed}"),
        BarColumn(),
        TextColumn("{task.fields[cases]:,} cases, {task.fields[failures]:,} failures"),
        TimeElapsedColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=arguments.cases or seconds, cases=0, failures=0)

        def show(report: Report) -> None:
            cases = report.cases.total()
            done = cases if arguments.cases else min(time.monotonic() - start, seconds or 0.0)
            bar.update(task, completed=done, cases=cases, failures=len(report.failures))

        report = fuzz(seed, cases=arguments.cases, seconds=seconds, jobs=arguments.jobs, progress=show)
    return _tell(console, report)


def _tell(console: Console, report: Report) -> int:
    """Print counts by area, and for failures how to see them again."""
    table = Table("area", "cases", "failures")
    for area, (cases, failures) in report.by_area().items():
        table.add_row(area, f"{cases:,}", f"{failures:,}")
    table.add_section()
    table.add_row("all", f"{report.cases.total():,}", f"{len(report.failures):,}")
    console.print(table)
    shown: Counter[str] = Counter()
    for failure in sorted(report.failures, key=lambda failure: len(failure.message)):
        shown[failure.check] += 1
        if shown[failure.check] <= SHOWN:
            console.print(f"\n{failure.check}: {failure.message[:1500]}", markup=False, highlight=False)
            console.print(f'make fuzz ARGS="--replay {report.seed}:{failure.number}"', markup=False, highlight=False, soft_wrap=True)
    for check, count in shown.items():
        if count > SHOWN:
            console.print(f"{check}: {count - SHOWN} more", markup=False, highlight=False)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
