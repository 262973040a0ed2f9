"""The CUDA kernels on machines without CUDA: interpreted on CPU tensors, and compiled for a GPU that is not there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.processes import run_python

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

SIGNATURE = {
    **dict.fromkeys(("table", "segments"), "*i64"),
    **dict.fromkeys(("partials", "exact", "moments", "numbers", "found"), "*fp64"),
    **dict.fromkeys(("order", "number", "epsilon"), "fp64"),
    "rounded": "*fp32",
    "chunks": "i32",
}
LAUNCH = {"BYTES": 2048, "UNROLL": 4}


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
    run = run_python(program, timeout=600.0, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.fixture(params=[90])
def compiled(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiles a kernel for a generation of NVIDIA GPUs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_(kernel: Any, **constants: Any) -> Any:
        signature = {name: "constexpr" if name in constants else SIGNATURE[name] for name in kernel.arg_names}
        options = {"num_warps": 4, "enable_fp_fusion": True}
        return triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", request.param, 32), options=options)

    return compile_


@pytest.mark.parametrize(("types", "vectors"), [(2, "v4.b32"), (4, "v4.b32"), (8, "v2.b64"), (15, "v4.b32")])
def test_reading_compiles_to_loads_of_16_bytes(compiled: Any, types: int, vectors: str) -> None:
    from normclip._backends.triton import measure

    for what in (measure.SQUARES.value, measure.MOMENTS.value):
        ptx = compiled(measure.measure, TYPES=types, WHAT=what, FINITE=False, **LAUNCH).asm["ptx"]
        assert len(re.findall(rf"ld\.global\.{vectors}", ptx)) >= LAUNCH["UNROLL"]
        assert not re.findall(r"\b(atom|red)\.", ptx), "no atomics, so the same bits on every run"


def test_changing_compiles_to_stores_of_16_bytes_and_rounds_to_nearest(compiled: Any) -> None:
    from normclip._backends.triton import change

    ptx = compiled(change.change, TYPES=2, WHAT=change.CLIP.value, **LAUNCH).asm["ptx"]
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) >= LAUNCH["UNROLL"]
    assert set(re.findall(r"cvt\.(\w+)\.bf16\w*\.f32", ptx)) == {"rn"}


def test_every_kernel_compiles(compiled: Any) -> None:
    from normclip._backends.triton import change, measure, merge, pairs

    for what in (measure.ABSOLUTES, measure.SMALLEST, measure.NONZEROS, measure.POWERS, measure.INVERSE_POWERS):
        compiled(measure.measure, TYPES=12, WHAT=what.value, FINITE=False, **LAUNCH)
        compiled(merge.norm, TYPES=12, WHAT=what.value, LANES=4096)
    compiled(merge.tabulate, PER_PROGRAM=9, LANES=128)
    compiled(merge.tabulate, PER_PROGRAM=1, LANES=4096)
    for what in (change.SCALE, change.CLAMP, change.ZERO_NONFINITE):
        compiled(change.change, TYPES=15, WHAT=what.value, numbers=None, **LAUNCH)
    for what in (change.SCALE, change.SCALE_EACH):
        compiled(change.change, TYPES=15, WHAT=what.value, **LAUNCH)
    compiled(pairs.products, TYPES=15, **LAUNCH)
    compiled(pairs.dot, TYPES=15, LANES=4096)
