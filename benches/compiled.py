"""What the CUDA kernels are compiled to, counted without a GPU: `python benches/compiled.py FILE.json`.

Compiles each kernel for generations of GPUs, takes it apart with NVIDIA's disassembler, and counts, for each loop that loads vectors of 16
bytes: instructions, those of float64, and loads that a thread has issued before it uses the first. Registers limit how many programs a
multiprocessor holds; with the loads of each this gives the bytes that it has in flight. Little's law says how many are needed for the full
bandwidth of the memory: bandwidth times latency, over the number of multiprocessors. The sizes are those that normclip launches with. These
are counts, not times: nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normclip._backends.cuda import Tuning
from normclip._backends.triton import change, limits, measure, merge, pairs, ranks, step

ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)
PAIRS_OF_FLOATS = (86, 89, 103, 120)
"""Those of them on which normclip sums in pairs of float32."""

TYPES = {"float16": 1, "bfloat16": 2, "float32": 4, "float64": 8, "all": 15}

# What the arguments of the kernels are, by their names.
_SIGNATURE = {
    **dict.fromkeys(("rows", "addresses", "segments"), "*i64"),
    **dict.fromkeys(("partials", "exact", "moments", "numbers", "found", "gathered", "failure"), "*fp64"),
    **dict.fromkeys(("factors", "coefficient", "taken", "paces", "movements", "scale", "sizes", "descent"), "*fp64"),
    **dict.fromkeys(("order", "number", "epsilon", "double", "descent_limit", "size_limit"), "fp64"),
    **dict.fromkeys(("chunks", "ranks", "count"), "i32"),
    "rounded": "*fp32",
}

TUNING = Tuning()


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it is compiled for."""

    name: str
    function: Any
    constants: tuple[tuple[str, Any], ...]
    in_pairs: bool = False
    """Whether additions and multiplications are as they are written, none fused."""
    warps: int = TUNING.warps

    def compiled(self, architecture: int) -> Any:
        constants = dict(self.constants)
        signature = {name: "constexpr" if name in constants else _SIGNATURE[name] for name in self.function.arg_names}
        options = {"num_warps": self.warps, "enable_fp_fusion": not self.in_pairs}
        source = ASTSource(self.function, signature, constants)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def reading(what: str, dtype: str, *, in_pairs: bool = False) -> Kernel:
    """The kernel that measures."""
    constants = {"TYPES": TYPES[dtype], "WHAT": getattr(measure, what).value, "FINITE": False, "COMPENSATED": in_pairs, **_LAUNCH}
    name = f"{what.lower()} {dtype}" + (", pairs" if in_pairs else "")
    return Kernel(name, measure.measure, tuple(constants.items()), in_pairs)


def changing(what: str, dtype: str, **others: Any) -> Kernel:
    """The kernel that writes."""
    constants = {"TYPES": TYPES[dtype], "WHAT": getattr(change, what).value, **others, **_LAUNCH}
    return Kernel(f"{what.lower()} {dtype}", change.change, tuple(constants.items()))


def multiplying(dtype: str) -> Kernel:
    """The kernel of inner products."""
    return Kernel(f"products {dtype}", pairs.products, tuple({"TYPES": TYPES[dtype], **_LAUNCH}.items()))


def stepping(
    formula: str, states: int, dtype: str, state_dtype: str | None = None, *, aligned: bool = True, measures: bool = False
) -> Kernel:
    """The kernel of optimizer steps, which takes one or measures it for limits."""
    codes = [TYPES[name].bit_length() - 1 for name in (dtype, state_dtype or dtype, "float32")]
    constants = {"FORMULA": getattr(step, formula).value, "STATES": states, **dict(zip(("TYPE", "STATE", "CLOCK"), codes, strict=True))}
    constants |= {"ALIGNED": int(aligned), "BYTES": TUNING.tile, "paces": None, "taken" if measures else "partials": None}
    kept = ("" if state_dtype is None else f", states {state_dtype}") + (", measured" if measures else "")
    return Kernel(f"{formula.lower()} {states} {dtype}{kept}", step.step, tuple(constants.items()), in_pairs=True)


def merging(what: str, dtype: str) -> Kernel:
    """The kernel that makes a norm of partials."""
    constants = {"TYPES": TYPES[dtype], "WHAT": getattr(measure, what).value, "LANES": TUNING.lanes}
    return Kernel(f"norm of {what.lower()}", merge.norm, tuple(constants.items()), warps=8)


def merging_ranks(what: str) -> Kernel:
    """The kernel that makes a norm of the rows of ranks."""
    return Kernel(f"{what.lower()} of ranks", ranks.merge, (("WHAT", getattr(measure, what).value),), in_pairs=True, warps=1)


DOT = Kernel("dot", pairs.dot, (("TYPES", TYPES["all"]), ("LANES", TUNING.lanes)), warps=8)

_LAUNCH = {"BYTES": TUNING.tile, "UNROLL": TUNING.unroll}
_EXACT = ("SQUARES", "ABSOLUTES", "MOMENTS")
STEPS = (("SGD", 0), ("SGD", 1), ("ADAMW", 2), ("ADAMW", 3))
"""The formulas of optimizers, with the states of a parameter."""


def kernels(architecture: int) -> Iterator[Kernel]:
    """All kernels that normclip launches on GPUs of this generation, for one element type each."""
    for dtype in ("bfloat16", "float32", "float64"):
        for what in (*_EXACT, "LARGEST", "SMALLEST", "NONZEROS", "CUBES", "FOURTHS", "POWERS"):
            yield reading(what, dtype, in_pairs=architecture in PAIRS_OF_FLOATS and what in _EXACT and dtype != "float64")
        for what in ("CLIP", "CLAMP"):
            yield changing(what, dtype)
        yield multiplying(dtype)
    for what in ("SQUARES", "LARGEST"):
        yield merging(what, "float32")
    yield Kernel("tabulate short", merge.tabulate, (("PER_PROGRAM", merge.COLUMNS.value), ("LANES", TUNING.short)))
    yield Kernel("row of a rank", ranks.row, (("LANES", TUNING.lanes),), warps=8)
    yield merging_ranks("SQUARES")
    yield Kernel("tabulate", merge.tabulate, (("PER_PROGRAM", 1), ("LANES", TUNING.lanes)), warps=8)
    for dtype, state_dtype in (("bfloat16", None), ("bfloat16", "float32"), ("float32", None), ("float64", None)):
        for formula, states in STEPS:
            if formula == "ADAMW" or state_dtype is None:
                yield stepping(formula, states, dtype, state_dtype)
                yield stepping(formula, states, dtype, state_dtype, measures=True)
    yield Kernel("movements", limits.merge, (("WIDTH", 7), ("LANES", TUNING.lanes)), in_pairs=True)
    yield Kernel("limits", limits.limit, (("LANES", TUNING.short),), in_pairs=True)


# ---- Taking them apart ----


@dataclass(frozen=True)
class Loop:
    """A loop over tiles, and nothing within it that branches. What is left over of an unrolled loop, and edges, are not counted as one."""

    instructions: int
    doubles: int
    """Those that need the float64 pipe, conversions among them."""
    loads: int
    """Loads of 16 bytes."""
    first: int
    """How many of these are issued before the first instruction that uses one."""


@dataclass(frozen=True)
class Counts:
    registers: int
    spilled: int
    """Instructions that write registers to memory for want of registers, or read them back."""
    loops: tuple[Loop, ...]

    def bytes_in_flight(self, warps: int, architecture: int) -> int:
        """Bytes that the programs which a multiprocessor can hold have asked for at once, in the loop that asks for least."""
        threads = 32 * warps
        allocated = -(-self.registers // 8) * 8  # by NVIDIA's occupancy calculator: 8 registers at a time for a warp
        by_registers = 65536 // (allocated * threads)
        by_threads = (1536 if architecture in (86, 89, 120) else 2048) // threads
        return min(by_registers, by_threads, 32) * threads * 16 * min((loop.first for loop in self.loops), default=0)


_DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|(F2F|I2F|F2I|FRND|MUFU)\S*64")
_REGISTER = re.compile(r"\bR(\d+)\b")


def counts(compiled: Any) -> Counts:
    """Counts the instructions of a compiled kernel.

    Raises:
        FileNotFoundError: Triton comes without NVIDIA's tools here.
    """
    registers = re.search(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", compiled))
    assert registers is not None
    lines = _lines(_tool("nvdisasm", "-c", compiled))
    spilled = sum(1 for line in lines if re.search(r"\b(STL|LDL)\b", line))
    return Counts(int(registers[1]), spilled, tuple(map(_counted, _bodies(lines))))


def bodies(compiled: Any) -> list[list[str]]:
    """The instructions of each of the loops that :func:`counts` counts."""
    return list(_bodies(_lines(_tool("nvdisasm", "-c", compiled))))


def _tool(name: str, option: str, compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        arguments = [getattr(triton.knobs.nvidia, name).path, option, file.name]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def _lines(assembly: str) -> list[str]:
    """Instructions and labels, in order."""
    found = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            found.append(label[1] + ":")
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(instruction[1])
    return found


def _bodies(lines: list[str]) -> Iterator[list[str]]:
    places = {line[:-1]: place for place, line in enumerate(lines) if line.endswith(":")}
    for place, line in enumerate(lines):
        target = re.search(r"\bBRA\S*\s.*?(\.L_x_\d+)", line)
        if target is None or places[target[1]] > place:
            continue
        body = [line for line in lines[places[target[1]] : place] if not line.endswith(":")]
        if not any("BRA" in line for line in body) and sum(map(_is_load, body)) >= TUNING.unroll:
            yield body


def _counted(body: list[str]) -> Loop:
    return Loop(
        instructions=len(body) + 1,
        doubles=sum(1 for line in body if _DOUBLE.search(line)),
        loads=sum(map(_is_load, body)),
        first=_first(body),
    )


def _is_load(line: str) -> bool:
    return re.search(r"\bLDG\.\S*128", line) is not None


def _first(body: list[str]) -> int:
    """How many loads are issued before an instruction uses what one of them has loaded."""
    loaded: set[int] = set()
    seen = 0
    for line in body:
        registers = [int(number) for number in _REGISTER.findall(line)]
        if _is_load(line):
            loaded.update(range(registers[0], registers[0] + 4))
            seen += 1
        elif loaded.intersection(registers):
            return seen
    return seen


# ---- The record ----

# Bytes per second, and nanoseconds from a load to its data when the memory is busy, which NVIDIA does not publish: an assumption.
_MEMORY = {"H200": (90, 4.8e12, 132), "B200": (100, 8.0e12, 148)}
_LATENCY = 800e-9


def needed() -> dict[str, float]:
    """Kilobytes in flight per multiprocessor that fill the memory's bandwidth, by Little's law."""
    return {name: bandwidth * _LATENCY / processors / 1024 for name, (_, bandwidth, processors) in _MEMORY.items()}


def record(architecture: int, number: int) -> dict[str, Any]:
    """What is counted of one of the kernels."""
    kernel = list(kernels(architecture))[number]
    found = counts(kernel.compiled(architecture))
    return {
        "architecture": f"sm_{architecture}",
        "kernel": kernel.name,
        "registers": found.registers,
        "spilled": found.spilled,
        "kilobytes_in_flight": found.bytes_in_flight(kernel.warps, architecture) / 1024 if found.loops else None,
        "loops": [asdict(loop) for loop in found.loops],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the JSON goes")
    parser.add_argument("--only", type=int, action="append", help="an architecture, such as 90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes to compile in")
    options = parser.parse_args()
    every = [(chosen, number) for chosen in options.only or ARCHITECTURES for number, _ in enumerate(kernels(chosen))]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(record, *zip(*every, strict=True)))
    report = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "triton": triton.__version__,
        "sizes": asdict(TUNING),
        "needed_kilobytes_in_flight": {"assumed_latency_ns": _LATENCY * 1e9, **needed()},
        "rows": rows,
    }
    options.file.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        loops = "  ".join(f"{loop['instructions']}:{loop['doubles']}d {loop['first']}/{loop['loads']}" for loop in row["loops"])
        flight = "" if row["kilobytes_in_flight"] is None else f"{row['kilobytes_in_flight']:.0f} KB"
        counted = f"{row['registers']:3} {row['spilled']:2} {flight:>6}"
        print(f"{row['architecture']:7} {row['kernel']:28} {counted}  {loops}")  # noqa: T201


if __name__ == "__main__":
    main()
