"""Host time of calls on a device that does nothing: `python benches/host.py`, without a GPU.

Triton's driver is replaced by one that loads and launches nothing, and tensors in CPU memory pass for those of a device. So what is timed
is all that the host does, normclip's part and Triton's, down to the call of the launcher, and nothing else: no CUDA driver, and none of
torch's calls for devices and streams. Kernels are compiled, for the generation that is named. The answers are what memory held.

Beside it stands the time of the least that torch takes for such a call: to hand out the gradients and their addresses, and to raise their
version counters.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import normclip
from normclip._backends import launch
from normclip._backends.choose import serving
from normclip._backends.protocol import Served
from normclip._backends.triton import change, limits, measure, merge, pairs, ranks, step

KERNELS = (
    *(measure.measure, merge.norm, merge.tabulate, change.change, pairs.products, pairs.dot),
    *(ranks.row, ranks.merge, step.step, limits.merge, limits.limit),
)


class NoDriver:
    """What Triton asks of a driver, for a GPU of this generation."""

    def __init__(self, architecture: int) -> None:
        self.utils = self
        self._target = GPUTarget("cuda", architecture, 32)
        self.loaded: list[str] = []
        """The names of the kernels that were loaded, once for each variant."""
        self.launched: list[str] = []

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded.append(name)
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(metadata.name)


@contextmanager
def no_driver(architecture: int = 90) -> Iterator[NoDriver]:
    """Within the block, kernels are compiled and launched on nothing, and CPU tensors pass for those of a device."""
    config = triton.runtime.driver
    before = vars(config).get("_active")
    fake = NoDriver(architecture)
    config.set_active(fake)
    _forget()
    try:
        with serving(Served(rust=(), triton=(1,))):
            yield fake
    finally:
        _forget()  # while the driver that they are unloaded by is still there
        config.set_active(before)


def _forget() -> None:
    """Drop the kernels that were loaded by another driver."""
    launch._compiled.clear()
    for kernel in KERNELS:
        kernel.device_caches.clear()
    gc.collect()


CASES = {"150 tensors": [(64,)] * 75 + [(3000,)] * 75, "5000 tensors": [(1024,)] * 5000}


def microseconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args()
    with no_driver() as driver:
        for name, shapes in CASES.items():
            parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)

            def clip(parameters: list[torch.nn.Parameter] = parameters) -> None:
                normclip.clip_grad_norm_(parameters, 1.0)

            def least(parameters: list[torch.nn.Parameter] = parameters) -> None:
                grads = [parameter.grad for parameter in parameters]
                for grad in grads:
                    grad.data_ptr()
                torch.autograd.graph.increment_version(grads)

            clip()
            del driver.launched[:]
            clip()
            launched = len(driver.launched)
            times, torchs = [], []
            for _ in range(options.rounds):
                times.append(microseconds(clip))
                torchs.append(microseconds(least))
            figures = f"median {statistics.median(times):.1f} us, least {min(times):.1f} us"
            print(f"{name}: {launched} launches, {figures}; torch's own {statistics.median(torchs):.1f} and {min(torchs):.1f} us")  # noqa: T201
    print(f"Triton {triton.__version__}, torch {torch.__version__}")  # noqa: T201


if __name__ == "__main__":
    main()
