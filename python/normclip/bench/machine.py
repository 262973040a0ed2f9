"""Facts about the machine for the report: its CPU, and the load by other programs."""

import os
import platform
import time
from pathlib import Path

__all__ = ["OtherLoad", "cpu_model"]


def cpu_model() -> str:
    """The CPU's model name if the system reports it, else its architecture."""
    names = (line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class OtherLoad:
    """Measures the share of the machine's CPU time that other programs use from the creation of this object on.

    OpenMP splits work evenly and waits for the slowest thread, so a compiler in the background can make torch ten times
    slower, and a comparison with it worthless.
    """

    def __init__(self) -> None:
        self._start = _cpu_seconds()

    def share(self) -> float | None:
        """The share, between 0 and 1; None if the system does not report CPU times."""
        end = _cpu_seconds()
        if self._start is None or end is None:
            return None
        total, idle, own = (after - before for before, after in zip(self._start, end, strict=True))
        return max(0.0, total - idle - own) / total if total > 0.0 else 0.0


def _cpu_seconds() -> tuple[float, float, float] | None:
    """The CPU time of all CPUs since boot, the idle part of it, and that of this process, in seconds."""
    for line in _read("/proc/stat"):
        if line.startswith("cpu "):
            # user, nice, system, idle, iowait, irq, softirq, steal; the fields after these are contained in user and nice.
            per_second = os.sysconf("SC_CLK_TCK")
            seconds = [int(field) / per_second for field in line.split()[1:9]]
            return sum(seconds), seconds[3] + seconds[4], time.process_time()
    return None


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
