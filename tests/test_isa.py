"""Instruction sets: one can be forced, lacking ones are refused, and all give the same bits."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from normclip import _core
from support import digest
from support.processes import output_of, run_python

# What the CPU must have for each, slowest first.
NEEDS: dict[str, set[str]] = {
    "baseline": set(),
    "avx2": {"avx2"},
    "avx512": {"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def cpu_flags() -> set[str]:
    """What the system says that the CPU has."""
    told = Path("/proc/cpuinfo")
    if not told.exists():
        if platform.machine() in ("x86_64", "AMD64"):
            pytest.skip("this system does not say what the CPU has")
        return set()
    lines = told.read_text(encoding="utf-8").splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def require(isa: str) -> None:
    if isa != "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} is for x86-64")
    if missing := NEEDS[isa] - cpu_flags():
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")


def results(isa: str) -> dict[str, Any]:
    """What the digest says on an instruction set, in a process of its own."""
    printed = json.loads(
        output_of(Path(digest.__file__).read_text(encoding="utf-8"), NORMCLIP_ISA=isa, PYTHONPATH=str(Path(__file__).parent))
    )
    assert printed["isa"] == isa
    return printed["results"]


@pytest.fixture(scope="module")
def baseline() -> dict[str, Any]:
    """The results that all others are compared with."""
    return results("baseline")


def test_digest_is_one_of_many_results(baseline: dict[str, Any]) -> None:
    assert len(baseline) > 150
    assert len({result for results in baseline.values() for result in results}) > 1000, "they differ from one another"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_same_bits_on_every_instruction_set(isa: str, baseline: dict[str, Any]) -> None:
    require(isa)
    measured = results(isa)
    assert measured.keys() == baseline.keys()
    assert {name: values for name, values in measured.items() if values != baseline[name]} == {}


@pytest.mark.parametrize("isa", NEEDS)
def test_instruction_sets_can_be_forced(isa: str) -> None:
    require(isa)
    assert output_of("from normclip import _core; print(_core.isa())", NORMCLIP_ISA=isa) == f"{isa}\n"


@pytest.mark.parametrize("value", ["", None])
def test_fastest_is_the_default(value: str | None) -> None:
    environment = {} if value is None else {"NORMCLIP_ISA": value}
    flags = cpu_flags()
    fastest = [isa for isa, needs in NEEDS.items() if needs <= flags][-1]
    assert output_of("from normclip import _core; print(_core.isa())", **environment) == f"{fastest}\n"
    assert _core.isa() in NEEDS


@pytest.mark.parametrize("value", ["sse9", "AVX2", "avx2 ", "neon"])
def test_unknown_instruction_sets_are_errors_on_import(value: str) -> None:
    run = run_python("import normclip", NORMCLIP_ISA=value)
    assert run.returncode == 1
    assert f"RuntimeError: NORMCLIP_ISA={value} is not available on this CPU: unset it or choose one of baseline" in run.stderr


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_lacking_instruction_sets_are_errors_on_import(isa: str) -> None:
    if NEEDS[isa] <= cpu_flags():
        pytest.skip(f"this CPU has {isa}")
    run = run_python("import normclip", NORMCLIP_ISA=isa)
    assert run.returncode == 1
    assert f"RuntimeError: NORMCLIP_ISA={isa} is not available on this CPU: unset it or choose one of baseline" in run.stderr
