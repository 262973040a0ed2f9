"""Python programs in processes of their own: for what is decided once per process, and for what might hang one."""

import os
import subprocess
import sys
import textwrap

# The beginning of a program: something to work on, and how many threads work on it starts.
COUNTS = """
    import os
    import numpy as np

    array = np.ones(4_000_000, np.float32)  # 16 MB

    def started(work):
        before = len(os.listdir("/proc/self/task"))
        assert work(array) == 2000.0
        return len(os.listdir("/proc/self/task")) - before
"""


def run_python(program: str, *, timeout: float = 100.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with normclip's variables as given here and not as they happen to be. A hang becomes an error."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NORMCLIP_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def output_of(program: str, **environment: str) -> str:
    """What a program prints, which must succeed."""
    run = run_python(program, **environment)
    assert run.returncode == 0, run.stderr
    return run.stdout
