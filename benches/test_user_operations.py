"""What users call, torch beside normclip: `pytest benches --benchmark-only`.

Each benchmark compares normclip's answer with an exact reference before it is timed. For figures to publish, run
`normclip bench`: it alternates the contenders and uses larger gradients.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import normclip
from normclip.bench.exact import relative_error
from normclip.bench.gradients import Gradients
from normclip.bench.rivals import sgd
from normclip.bench.workloads import Shape, gaussian, resnet50_shapes

CLIP: dict[str, Callable[..., Tensor]] = {
    "torch": torch.nn.utils.clip_grad_norm_,
    "normclip": normclip.clip_grad_norm_,
}
NORM: dict[str, Callable[..., Tensor]] = {"torch": torch.nn.utils.get_total_norm, "normclip": normclip.total_norm}
SHAPES: dict[str, list[Shape]] = {"resnet50": resnet50_shapes(), "1000x64": [(64,)] * 1000, "one": [(1,)]}

by_library = pytest.mark.parametrize("library", ["torch", "normclip"])
by_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
by_shapes = pytest.mark.parametrize("shapes", SHAPES)


@functools.cache
def gradients_of(shapes: str, dtype: torch.dtype) -> Gradients:
    """Gaussian gradients in one of `SHAPES`, made once; clipping benchmarks restore them."""
    return gaussian(SHAPES[shapes], dtype)


def check(library: str, norm: Tensor, exact: float) -> None:
    """Refuse to time a wrong norm of normclip's; what torch gets wrong is torch's own."""
    if library == "normclip":
        assert relative_error(float(norm), exact) <= 1e-6


@by_shapes
@by_dtype
@by_library
def test_clip_below_the_limit(benchmark: BenchmarkFixture, library: str, dtype: torch.dtype, shapes: str) -> None:
    benchmark.group = f"clip below the limit: {shapes} {dtype}"
    gradients, clip = gradients_of(shapes, dtype), CLIP[library]
    exact = gradients.exact_norm(2.0)

    check(library, clip(gradients.parameters, 10 * exact), exact)
    assert gradients.are_pristine_times(1.0)
    benchmark(clip, gradients.parameters, 10 * exact)


@by_shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])  # float16 would underflow
@by_library
def test_clip_scaling(benchmark: BenchmarkFixture, library: str, dtype: torch.dtype, shapes: str) -> None:
    benchmark.group = f"clip, scaling: {shapes} {dtype}"
    gradients, clip = gradients_of(shapes, dtype), CLIP[library]
    exact = gradients.exact_norm(2.0)

    def next_call() -> tuple[tuple[list[nn.Parameter], float], dict[str, object]]:
        return (gradients.parameters, gradients.halving_limits(1)[0]), {}

    try:
        check(library, clip(gradients.parameters, exact / 2), exact)
        assert library == "torch" or gradients.are_pristine_times(exact / 2 / (exact + 1e-6))
        gradients.restore()
        benchmark.pedantic(clip, setup=next_call, rounds=100, warmup_rounds=5)  # type: ignore[no-untyped-call]
    finally:
        gradients.restore()


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf], ids=["L1", "L2", "L3", "Linf"])
@by_dtype
@by_library
def test_total_norm(benchmark: BenchmarkFixture, library: str, dtype: torch.dtype, order: float) -> None:
    benchmark.group = f"norm of order {order:g}: resnet50 {dtype}"
    gradients, total_norm = gradients_of("resnet50", dtype), NORM[library]

    check(library, total_norm(gradients.tensors, order), gradients.exact_norm(order))
    benchmark(total_norm, gradients.tensors, order)


@by_shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "momentum"])
@by_library
def test_clipped_sgd_step(benchmark: BenchmarkFixture, library: str, momentum: float, dtype: torch.dtype, shapes: str) -> None:
    benchmark.group = f"clip + SGD step, momentum {momentum}: {shapes} {dtype}"
    gradients, stepping = gradients_of(shapes, dtype), sgd(momentum)
    step = stepping.torch_step if library == "torch" else stepping.normclip_step
    try:
        assert relative_error(stepping.normclip_step(gradients), gradients.exact_norm(2.0)) <= 1e-6
        assert stepping.error(gradients) <= 1.0
        benchmark(step, gradients)
    finally:
        gradients.restore()
