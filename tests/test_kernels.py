"""The CUDA kernels, compiled for GPUs that are not there and taken apart: what they load, what they cost, what they must not contain."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

import compiled  # noqa: E402

try:
    TOOLS = all(Path(getattr(triton.knobs.nvidia, name).path).exists() for name in ("ptxas", "cuobjdump", "nvdisasm"))
except (AttributeError, RuntimeError):
    TOOLS = False
pytestmark = pytest.mark.skipif(not TOOLS, reason="this Triton comes without ptxas, cuobjdump and nvdisasm")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@cache
def counts(kernel: Any, architecture: int) -> Any:
    return compiled.counts(kernel.compiled(architecture))


def ptx(kernel: Any) -> str:
    text: str = kernel.compiled(90).asm["ptx"]
    return text


UNROLL = compiled.TUNING.unroll
EXACT = ("SQUARES", "ABSOLUTES", "MOMENTS")
DTYPES = ("bfloat16", "float32")
ELEMENTS_OF_A_LOAD = {"bfloat16": 8, "float32": 4, "float64": 2}


# ---- What they load and store ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "all"])
@pytest.mark.parametrize("what", ["SQUARES", "MOMENTS"])
def test_reading_compiles_to_loads_of_16_bytes(what: str, dtype: str) -> None:
    found = ptx(compiled.reading(what, dtype))
    assert len(re.findall(r"ld\.global\.v(4\.b32|2\.b64)", found)) >= UNROLL
    assert not re.findall(r"\b(atom|red)\.", found), "no atomics, so the same bits on every run"


def test_changing_compiles_to_stores_of_16_bytes_and_rounds_to_nearest() -> None:
    found = ptx(compiled.changing("CLIP", "bfloat16"))
    assert len(re.findall(r"st\.global\.v4\.b32", found)) >= UNROLL
    assert set(re.findall(r"cvt\.(\w+)\.bf16\w*\.f32", found)) == {"rn"}


def test_every_kernel_compiles() -> None:
    for what in ("SMALLEST", "NONZEROS", "POWERS", "INVERSE_POWERS"):
        compiled.reading(what, "float64").compiled(90)
        compiled.merging(what, "float64").compiled(90)
    for what in ("SCALE", "CLAMP", "ZERO_NONFINITE"):
        compiled.changing(what, "all", numbers=None).compiled(90)
    compiled.changing("SCALE_EACH", "all").compiled(90)
    compiled.DOT.compiled(90)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("formula", "states"), compiled.STEPS)
def test_steps_round_every_operation(formula: str, states: int, dtype: str) -> None:
    """Nothing is fused or flushed to 0, and quotients and roots are rounded to nearest: so the bits are the CPU's."""
    found = ptx(compiled.stepping(formula, states, dtype)) + ptx(compiled.stepping(formula, states, dtype, measures=True))
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        found = re.sub(r"\b(div|sqrt)\.rn\.ftz\b", r"\1.rn", found)  # which leaves no choice
    assert not re.findall(r"\bfma\.|\.ftz|\.approx|div\.full", found)
    assert {*re.findall(r"\b(?:div|sqrt)\.\w+\.f\d+", found)} == (
        set()
        if formula == "SGD"
        else {f"{name}.rn.f{bits}" for name in ("div", "sqrt") for bits in ({64} if dtype == "float64" else {32, 64})}
    )
    if dtype == "bfloat16":
        assert set(re.findall(r"cvt\.(\w+)\.bf16\w*\.f32", found)) == {"rn"}


@pytest.mark.parametrize(("dtype", "state_dtype"), [("bfloat16", None), ("float32", None), ("float64", None), ("bfloat16", "float32")])
def test_steps_of_aligned_tensors_load_and_store_16_bytes(dtype: str, state_dtype: str | None) -> None:
    loads, stores = (rf"{name}\.global\.v(?:4\.b32|2\.b64)" for name in ("ld", "st"))
    for states in (2, 3):
        found = ptx(compiled.stepping("ADAMW", states, dtype, state_dtype))
        # What is narrower than its states goes by 8 bytes.
        assert len(re.findall(loads, found)) == states + (2 if state_dtype is None else 0)
        assert len(re.findall(stores, found)) == states + (1 if state_dtype is None else 0)
        elsewhere = ptx(compiled.stepping("ADAMW", states, dtype, state_dtype, aligned=False))
        assert not re.findall(rf"{loads}|{stores}", elsewhere), "an address may be any"


# ---- Where float64 is slow ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("what", "architecture"), [*((what, 86) for what in EXACT), ("SQUARES", 120)])
def test_sums_in_pairs_have_no_float64_in_their_loop(what: str, dtype: str, architecture: int) -> None:
    found = counts(compiled.reading(what, dtype, in_pairs=True), architecture)
    # The first loop is the one that all chunks go through. Later ones are for chunks beyond the range of float32.
    assert found.loops[0].doubles == 0
    assert any(loop.doubles > 0 for loop in found.loops[1:])


def test_instructions_of_float64_are_recognised() -> None:
    for dtype, kinds in (("bfloat16", 3), ("float32", 3), ("float64", 2)):
        loop = counts(compiled.reading("MOMENTS", dtype), 90).loops[0]
        assert loop.doubles >= kinds * loop.loads * ELEMENTS_OF_A_LOAD[dtype]


def test_squares_in_pairs_keep_their_error() -> None:
    """A square is rounded by itself, its error is had by a fused multiply-add, nothing else is fused, and subnormal numbers are kept."""
    kernel = compiled.reading("SQUARES", "float32", in_pairs=True).compiled(90)
    assert ".ftz" not in kernel.asm["ptx"]
    assert "fma.rn.f32" in kernel.asm["ptx"]
    main = compiled.bodies(kernel)[0]
    squares, errors = (sum(1 for line in main if re.match(rf"(@!?U?P\d )?{name}\b", line)) for name in ("FMUL", "FFMA"))
    assert squares == errors == UNROLL * ELEMENTS_OF_A_LOAD["float32"]


# ---- Where the host computes the same ----


@pytest.mark.parametrize("what", ["SQUARES", "ABSOLUTES", "LARGEST"])
def test_rows_of_ranks_merge_without_fused_or_approximate_operations(what: str) -> None:
    found = ptx(compiled.merging_ranks(what))
    assert not re.findall(r"fma\.|\.ftz|approx", found)
    assert set(re.findall(r"(?:sqrt|div|add|sub|mul)\.(\w+)\.f64", found)) == {"rn"}


# ---- What they cost ----


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize(("what", "registers"), [("SQUARES", 48), ("MOMENTS", 64)])
def test_enough_is_in_flight_and_nothing_spilled(what: str, registers: int, dtype: str, architecture: int) -> None:
    found = counts(compiled.reading(what, dtype), architecture)
    assert found.spilled == 0
    assert found.registers <= registers
    assert found.bytes_in_flight(compiled.TUNING.warps, architecture) >= 1024 * max(compiled.needed().values())


@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize(("dtype", "state_dtype"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", None), ("float64", None)])
def test_steps_spill_nothing_and_leave_room(dtype: str, state_dtype: str | None, architecture: int) -> None:
    """For five programs of 128 threads on a multiprocessor, each of which asks for 16 bytes of five tensors at once: 50 KB."""
    # There NVIDIA's assembler spills three numbers to have room for seven programs.
    most = 3 if (dtype, architecture) == ("float64", 80) else 0
    for measures in (False, True):
        found = counts(compiled.stepping("ADAMW", 3, dtype, state_dtype, measures=measures), architecture)
        assert found.spilled <= most
        assert found.registers <= 96


@pytest.mark.parametrize(
    "name", ["tabulate short", "tabulate", "norm of squares", "norm of largest", "row of a rank", "squares of ranks", "movements", "limits"]
)
def test_merging_spills_nothing(name: str) -> None:
    (kernel,) = (kernel for kernel in compiled.kernels(90) if kernel.name == name)
    assert counts(kernel, 90).spilled == 0


@pytest.mark.parametrize("what", ["CUBES", "FOURTHS"])
def test_cubes_and_fourth_powers_are_multiplications(what: str) -> None:
    largest, powers = counts(compiled.reading(what, "float32"), 90).loops[0], counts(compiled.reading(what, "float32"), 90).loops[-1]
    assert largest.doubles == 0
    assert 0 < powers.instructions <= 12 * powers.loads * ELEMENTS_OF_A_LOAD["float32"]


def test_powers_divide_nothing() -> None:
    """The reciprocals that are there belong to the logarithm. Of cubes, the sum of a chunk is divided once: so a division would be seen."""
    assert "div." not in ptx(compiled.reading("POWERS", "float32"))
    assert "div." in ptx(compiled.reading("CUBES", "float32"))
