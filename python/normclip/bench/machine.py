"""What a figure's reader has to know about the machine: its CPU, and whether anything else kept it busy."""

import os
import platform
import time
from pathlib import Path


def cpu_model() -> str:
    """The CPU's own name for itself where the system tells, else its architecture."""
    names = (line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class OtherLoad:
    """The share of the machine's CPU time that other programs have used since this object was made.

    It matters more than one might think: OpenMP splits work evenly and waits for the slowest thread, so that a compiler
    in the background can make torch ten times slower and any comparison with it worthless.
    """

    def __init__(self) -> None:
        self._start = _cpu_seconds()

    def share(self) -> float | None:
        """Between 0 and 1; None where the system does not tell."""
        end = _cpu_seconds()
        if self._start is None or end is None:
            return None
        total, idle, own = (after - before for before, after in zip(self._start, end, strict=True))
        return max(0.0, total - idle - own) / total if total > 0.0 else 0.0


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds of all CPUs since boot, those of them spent idle, and those that this process used."""
    for line in _read("/proc/stat"):
        if line.startswith("cpu "):
            # user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in user and nice.
            per_second = os.sysconf("SC_CLK_TCK")
            seconds = [int(field) / per_second for field in line.split()[1:9]]
            return sum(seconds), seconds[3] + seconds[4], time.process_time()
    return None


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
