"""Experiments that test the theory of clipping: what `normclip study NAME` runs.

Needs the extra `cli`: `pip install 'normclip[cli]'`. A study is a module with a ``TITLE`` and a function ``run``, which takes
:class:`~normclip.studies.report.Options` and returns :class:`~normclip.studies.report.Findings`: measurements and verdicts on claims.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normclip.studies.report import Options, Report

NAMES = ("separation", "smoothness", "default-norm", "warmup", "implicit")


def study(name: str, options: Options, command: str = "") -> Report:
    """Run a study.

    Args:
        name: One of :data:`NAMES`.
        options: Its size and seed.
        command: The command line to show in the report.
    """
    from normclip.studies.report import Report  # imported here, as the command's parser needs only NAMES, without the extras

    module = importlib.import_module(f"normclip.studies.{name.replace('-', '_')}")
    started, cpu_started = time.perf_counter(), time.process_time()
    findings = module.run(options)
    return Report(
        study=name,
        title=module.TITLE,
        findings=findings,
        options=options,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        command=command or f"normclip study {name}",
    )
