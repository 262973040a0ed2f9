"""Cases over processes: each has an instruction set and a range of numbers, and is watched.

A process that hangs or dies tells by the number it was at, and another goes on after it.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fuzz.cases import Failure, draw_of, run_case
from fuzz.registry import CHECKS

BLOCK = 20_000
"""Cases that a process takes on; it starts in some seconds."""

HANGS = 20.0
"""Seconds of the CPU's time, and ten times as many of ours, after which a case counts as hung. Others take milliseconds."""

MEMORY = 32 * 2**30
"""Bytes of address space, so that sizes that are believed do not take the machine down."""

STARTS = 600.0
"""Seconds that a process may take to import torch and reach its first case."""

KILLS = 2
"""How often a check may hang or crash before it is left out."""


@dataclass
class Report:
    """What came of a run."""

    seed: int
    cases: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def by_area(self) -> dict[str, tuple[int, int]]:
        """Cases and failures of each area."""
        failed = Counter(CHECKS[failure.check].area for failure in self.failures)
        cases: Counter[str] = Counter()
        for name, count in self.cases.items():
            cases[CHECKS[name].area] += count
        return {area: (cases[area], failed[area]) for area in sorted(cases.keys() | failed.keys())}


def instruction_sets() -> list[str]:
    """The values of NORMCLIP_ISA that this CPU can have. A case's is decided by its number."""
    if platform.machine() != "x86_64":
        return ["baseline"]
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return ["baseline", *(name for name, flag in (("avx2", "avx2"), ("avx512", "avx512f")) if flag in flags)]


def fuzz(
    seed: int,
    *,
    cases: int | None = None,
    seconds: float | None = None,
    only: int | None = None,
    jobs: int | None = None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run the first cases of a seed, as many as there is time for, or only one. Ctrl-C ends it with what has been found."""
    report, skip = Report(seed), Counter[str]()
    deadline = None if seconds is None else time.monotonic() + seconds
    tasks = iter([(range(only, only + 1), only)]) if only is not None else _tasks(cases)
    workers: list[_Worker] = []
    try:
        while True:
            while len(workers) < (jobs or os.cpu_count() or 1) and (deadline is None or time.monotonic() < deadline):
                task = next(tasks, None)
                if task is None:
                    break
                workers.append(_Worker(seed, *task, deadline, _left_out(skip)))
            if not workers:
                return report
            wait([worker.inbox for worker in workers], timeout=0.5)
            for worker in list(workers):
                if not worker.listen(report):
                    continue
                workers.remove(worker)
                rest = worker.bury(report, skip)
                if rest and only is None:
                    workers.append(_Worker(seed, rest, worker.isa, deadline, _left_out(skip)))
            progress(report)
    except KeyboardInterrupt:
        return report
    finally:
        for worker in workers:
            worker.process.kill()


def _left_out(kills: Counter[str]) -> frozenset[str]:
    return frozenset(name for name, count in kills.items() if count >= KILLS)


def _tasks(cases: int | None) -> Iterator[tuple[range, int]]:
    """Ranges of numbers, each with the number of an instruction set."""
    sets = len(instruction_sets())
    begin = 0
    while cases is None or begin < cases:
        end = begin + sets * BLOCK if cases is None else min(cases, begin + sets * BLOCK)
        yield from ((range(begin + isa, end, sets), isa) for isa in range(sets) if begin + isa < end)
        begin = end


class _Worker:
    """A process that runs cases, and what it has told."""

    def __init__(self, seed: int, numbers: range, isa: int, deadline: float | None, skip: frozenset[str]) -> None:
        self.seed, self.numbers, self.isa = seed, numbers, isa
        context = multiprocessing.get_context("spawn")
        self.inbox, outbox = context.Pipe(duplex=False)
        self.current = context.Value("q", -1, lock=False)
        self.done, self.seen, self.since, self.cpu_since = False, -1, time.monotonic(), 0.0
        sets = instruction_sets()
        before = os.environ.get("NORMCLIP_ISA")
        os.environ["NORMCLIP_ISA"] = sets[isa % len(sets)]
        try:
            self.process = context.Process(target=_work, args=(seed, numbers, deadline, skip, outbox, self.current), daemon=True)
            self.process.start()
        finally:
            os.environ.pop("NORMCLIP_ISA")
            if before is not None:
                os.environ["NORMCLIP_ISA"] = before
        outbox.close()

    def listen(self, report: Report) -> bool:
        """Take what it tells; true if it is at its end, or has to be ended."""
        try:
            while self.inbox.poll():
                message = self.inbox.recv()
                if isinstance(message, Failure):
                    report.failures.append(message)
                elif message is None:
                    self.done = True
                else:
                    report.cases.update(message)
        except EOFError:
            return True
        if self.current.value != self.seen:
            self.seen, self.since, self.cpu_since = self.current.value, time.monotonic(), _cpu_seconds(self.process.pid)
        return self.hangs

    @property
    def hangs(self) -> bool:
        """Whether it has been at a case for too long."""
        waited = time.monotonic() - self.since
        if self.seen < 0:
            return waited > STARTS
        return waited > 10 * HANGS or (waited > HANGS and _cpu_seconds(self.process.pid) - self.cpu_since > HANGS)

    def bury(self, report: Report, kills: Counter[str]) -> range | None:
        """End it. If it did not reach its end itself, note the case that it was at, and return the numbers that are left."""
        hung = not self.done and self.hangs
        if hung:
            self.process.kill()
        self.process.join()
        if self.done:
            return None
        number = self.current.value
        if number < 0:
            raise RuntimeError(f"a process of the fuzzer ended before its first case, with exit code {self.process.exitcode}")
        check, _ = draw_of(self.seed, number)
        kills[check.name] += 1
        report.cases[check.name] += 1
        how = "it did not end" if hung else f"the process died with exit code {self.process.exitcode}"
        report.failures.append(Failure(number, check.name, how))
        return self.numbers[self.numbers.index(number) + 1 :]


def _cpu_seconds(pid: int | None) -> float:
    """What a process has used of the CPU so far; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(seed: int, numbers: range, deadline: float | None, skip: frozenset[str], outbox: Connection, current: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    counts: Counter[str] = Counter()
    told = time.monotonic()
    for number in numbers:
        current.value = number
        check, draw = draw_of(seed, number)
        if check.name in skip:
            continue
        failure = run_case(check, draw, number)
        counts[check.name] += 1
        if failure is not None:
            outbox.send(failure)
        now = time.monotonic()
        if now - told > 0.5:
            outbox.send(counts)
            counts, told = Counter(), now
        if deadline is not None and now > deadline:
            break
    outbox.send(counts)
    outbox.send(None)
    outbox.close()
