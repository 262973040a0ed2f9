"""The CUDA kernels on machines without CUDA, interpreted on CPU tensors."""

import re
from pathlib import Path

import numpy as np
import pytest

from support.processes import run_python

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA")


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


@pytest.mark.skipif(
    version(triton.__version__) <= (3, 6) and version(np.__version__) >= (2, 4),
    reason="this interpreter makes numbers of arrays with one dimension, which this NumPy refuses",
)
def test_the_device_tests_pass_in_the_interpreter() -> None:
    program = f"""
        import pytest, sys
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:randomly", {str(Path(__file__).parent / "device")!r}]))
    """
    run = run_python(program, timeout=1200.0, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
