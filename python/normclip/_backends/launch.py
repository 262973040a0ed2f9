"""Launches kernels, the first time through Triton and then directly, and says how a device is to sum.

Triton works out at every launch which of a kernel's variants the arguments need, and checks that the kernel's global constants have not
changed: most of a launch's host time. Here the variant depends on the compile-time arguments alone, as no kernel is specialized by the
values of the others, so the compiled kernel that the first launch returns is kept and launched by itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import torch
import triton

Grid: TypeAlias = tuple[int, int, int]
"""Programs in each of three dimensions."""

# Compiled kernels, by all that decides which variant of a kernel is needed.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: Grid, arguments: tuple[Any, ...], constants: tuple[Any, ...], key: Any, **options: Any) -> None:
    """Launch a kernel on the current stream of the current device.

    Args:
        kernel: A function under ``triton.jit``, none of whose arguments is specialized.
        grid: How many programs.
        arguments: What the kernel gets at run time.
        constants: Its compile-time arguments, which come after these.
        key: What else decides between the kernel's variants: the device, and those types of arguments that vary.
        options: Compile options of Triton.
    """
    chosen = (kernel.fn, constants, key)
    known = _compiled.get(chosen)
    if known is None:
        found = kernel[grid](*arguments, *constants, **options)
        if isinstance(found, triton.compiler.CompiledKernel):  # the interpreter returns nothing
            _compiled[chosen] = found
    else:
        known[grid](*arguments, *constants)


# Compute capabilities with float64 at half the rate of float32, by the table "Throughput of Native Arithmetic Instructions" in NVIDIA's
# CUDA programming guide: results per clock and multiprocessor of 64-bit beside 32-bit additions and multiplications.
#
#     7.0   32 : 64        9.0   64 : 128
#     8.0   32 : 64       10.0   64 : 128
#
# All others have 1 : 32 (7.5), or 1 : 64 (8.6, 8.7, 8.9, 12.0, and 10.3 by the 1.25 TFLOPS of B300's data sheet). So may those to come.
_FAST_DOUBLES = {(7, 0), (8, 0), (9, 0), (10, 0)}


@cache
def sums_in_pairs(device: torch.device) -> bool:
    """Whether float64 is so slow on a device that sums are better taken in pairs of float32."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return capability(device) not in _FAST_DOUBLES


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device. A function of its own for tests to replace."""
    return torch.cuda.get_device_capability(device)
