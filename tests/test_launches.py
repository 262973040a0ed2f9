"""Launches of the CUDA kernels, compiled for a GPU that is not there and launched on nothing."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

import host  # noqa: E402

import normclip  # noqa: E402
from normclip import _backends  # noqa: E402
from normclip.optim import ClippedAdamW, ClippedSGD  # noqa: E402

from .test_kernels import own_cache, pytestmark  # noqa: E402, F401


@pytest.fixture
def driver() -> Iterator[Any]:
    with host.no_driver() as driver:
        yield driver


def parameters_of(sizes: tuple[int, ...], dtype: Any = None) -> list[Any]:
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


def test_a_kernel_goes_through_triton_once_and_is_launched_directly_from_then_on(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **keywords: runs.append(1) or run(self, *args, **keywords))
    for sizes in ((3,), (5, 40000), (1,)):
        parameters = parameters_of(sizes)
        for _ in range(2):
            normclip.clip_grad_norm_(parameters, 0.5)
    assert driver.launched == ["measure", "norm", "change"] * 6
    assert len(runs) == 3


def test_shards_take_four_launches_and_no_host_merges_them(driver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from normclip._backends.shards import Shards

    monkeypatch.delattr(Shards, "_agreed")
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameters = [torch.nn.Parameter(DTensor.from_local(torch.zeros(size), mesh)) for size in (3, 70_000)]
        for parameter in parameters:
            parameter.grad = DTensor.from_local(torch.ones(parameter.shape), mesh)
        normclip.clip_grad_norm_(parameters, 0.5)
    finally:
        distributed.destroy_process_group()
    assert driver.launched == ["measure", "row", "merge", "change"]


def recorded(driver: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What launchers are called with from now on. Numbers in place of tensors, whose memory is new at each call."""
    calls: list[tuple[Any, ...]] = []

    def launcher(source: Any, metadata: Any) -> Any:
        return lambda *passed: calls.append(tuple(entry.dim() if isinstance(entry, torch.Tensor) else entry for entry in passed))

    monkeypatch.setattr(driver, "launcher_cls", launcher)
    return calls


def test_a_direct_launch_is_the_call_that_triton_makes(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, parameters = recorded(driver, monkeypatch), parameters_of((3, 50000))
    monkeypatch.setattr(driver, "get_current_stream", lambda device: 7)
    normclip.clip_grad_norm_(parameters, 0.5)
    normclip.clip_grad_norm_(parameters, 0.5)
    monkeypatch.setattr(host.launch, "_is_known", lambda compiled: False)
    normclip.clip_grad_norm_(parameters, 0.5)
    through_triton, directly, by_the_kernel = (calls[first : first + 3] for first in (0, 3, 6))
    # The call's metadata and the two hooks, for nobody to be told of.
    assert [call[6:9] for call in directly] == [(None, None, None)] * 3
    for others in (through_triton, by_the_kernel):
        assert [call[:6] + call[9:] for call in others] == [call[:6] + call[9:] for call in directly]
    assert {call[3] for call in calls} == {7}


def test_whoever_watches_launches_is_told_of_each(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, parameters, told = recorded(driver, monkeypatch), parameters_of((3,)), []
    normclip.clip_grad_norm_(parameters, 0.5)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", told.append)
    normclip.clip_grad_norm_(parameters, 0.5)
    assert [call[7] for call in calls[3:]] == [told.append] * 3
    assert [call[6].get()["name"] for call in calls[3:]] == ["measure", "norm", "change"]


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 2, 3, 4, "function", "metadata", "packed", None, None)])
def test_a_triton_that_launches_otherwise_is_left_to_itself(shape: Any) -> None:
    class Compiled:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, stream: self.run(*shape, *arguments)  # type: ignore[attr-defined]

    assert not host.launch._is_known(Compiled)


def test_this_triton_is_one_that_launches_as_expected() -> None:
    assert host.launch._is_known(triton.compiler.CompiledKernel)


def test_whatever_cannot_be_launched_directly_goes_through_triton(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.compiler, "CompiledKernel", SimpleNamespace)
    for _ in range(2):
        normclip.clip_grad_norm_(parameters_of((3,)), 0.5)
    assert driver.launched == ["measure", "norm", "change"] * 2


@pytest.mark.parametrize(
    "make", [lambda parameters: ClippedSGD(parameters, 0.1, 1.0, 0.9), lambda parameters: ClippedAdamW(parameters, rule=1.0)]
)
def test_a_step_of_an_optimizer_is_one_launch_after_the_norm(driver: Any, make: Any) -> None:
    parameters = [*parameters_of((3, 5, 40000)), *parameters_of((7, 9), torch.bfloat16)]
    optimizer = make([{"params": parameters[:2], "lr": 0.3}, {"params": parameters[2:]}])
    for _ in range(3):
        optimizer.step()
    assert driver.launched == ["measure", "norm", "step", "step"] * 3, "one for each element type"
    assert sorted(driver.loaded) == ["measure", "norm", "step", "step"]


def test_a_step_within_limits_is_measured_first(driver: Any) -> None:
    parameters = [*parameters_of((3, 5, 40000)), *parameters_of((7, 9), torch.bfloat16)]
    optimizer = ClippedAdamW(parameters, rule=1.0, descent_limit=1.0)
    for _ in range(3):
        optimizer.step()
    assert driver.launched == ["measure", "norm", "step", "merge", "step", "merge", "limit", "step", "step"] * 3
    assert sorted(driver.loaded) == ["limit", "measure", "merge", "norm", "step", "step", "step", "step"]


def test_tensors_off_the_border_of_a_vector_are_launched_by_themselves(driver: Any) -> None:
    memory = torch.zeros(100)
    parameters = [torch.nn.Parameter(memory[begin : begin + 8]) for begin in (0, 21, 8)]
    for parameter in parameters:
        parameter.grad = torch.ones(8)
    ClippedSGD(parameters, 0.1, 1.0).step()
    assert sorted(driver.loaded) == ["measure", "norm", "step", "step"]


def test_other_types_modes_and_arguments_are_other_kernels(driver: Any) -> None:
    single, double = parameters_of((3,)), parameters_of((3,), torch.float64)
    for _ in range(2):
        for parameters in (single, double):
            grads = [parameter.grad for parameter in parameters]
            normclip.total_norm(grads)
            normclip.scale_(grads, 0.5)
            _backends.collect(grads, writable=True).scale_(torch.tensor(0.5, dtype=torch.float64))
    # Of each type, and the second time none: a norm, and a factor by number and by tensor.
    assert sorted(driver.loaded) == ["change"] * 4 + ["measure"] * 2 + ["norm"] * 2


def test_no_kernel_is_compiled_for_the_addresses_that_it_gets(driver: Any) -> None:
    """The first chunks of tensors follow the rows of the table, at an address that is a multiple of 16 or is not."""
    for sizes in ((3,), (3, 5), (3, 5, 7), (100_000,), (3, 100_000)):
        memory = torch.ones(sum(sizes) + 1)[1:]
        normclip.stats(list(memory.split(sizes)))
        normclip.clip_(list(memory.split(sizes)), 0.5)
    assert sorted(driver.loaded) == ["change", "measure", "measure", "norm", "tabulate"]


@pytest.mark.parametrize("kernel", host.KERNELS, ids=lambda kernel: kernel.__name__)
def test_no_argument_decides_which_variant_of_a_kernel_is_compiled(kernel: Any) -> None:
    """What is compiled for one launch is launched with other arguments: none may have been taken for aligned, or for the number 1."""
    for parameter in kernel.params:
        assert parameter.is_constexpr or parameter.do_not_specialize or parameter.annotation_type == "fp64", parameter.name


def test_every_launch_says_whether_to_fuse(driver: Any) -> None:
    """Triton 3.9 warns of a launch that leaves it open, and 3.10 takes the other default."""
    found = []
    run = triton.JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", lambda self, *args, **keywords: found.append(keywords) or run(self, *args, **keywords))
        grads = [parameter.grad for parameter in parameters_of((3,))]
        normclip.clip_(grads, 0.5)
        normclip.stats(grads)
        normclip.dot(grads, grads)
        normclip.clamp_(grads, 0.5)
    assert len(found) == 8
    assert {keywords["enable_fp_fusion"] for keywords in found} == {True}


FAST, SLOW = ((8, 0), (9, 0), (10, 0)), ((7, 5), (8, 6), (8, 9), (10, 3), (12, 0))


@pytest.mark.parametrize(("capability", "in_pairs"), [*((fast, False) for fast in FAST), *((slow, True) for slow in SLOW)])
def test_the_device_decides_how_sums_are_taken(capability: tuple[int, int], in_pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from normclip._backends import launch

    monkeypatch.setattr(launch, "capability", lambda device: capability)
    launch.sums_in_pairs.cache_clear()
    try:
        assert launch.sums_in_pairs(torch.device("cuda", 0)) == in_pairs
        assert not launch.sums_in_pairs(torch.device("cpu"))
    finally:
        launch.sums_in_pairs.cache_clear()


def test_sums_in_pairs_are_compiled_without_fusing(driver: Any) -> None:
    from normclip._backends.choose import serving
    from normclip._backends.cuda import Tuning
    from normclip._backends.protocol import Served

    kept = []
    run = triton.JITFunction.run
    with pytest.MonkeyPatch.context() as patch, serving(Served(rust=(), triton=(1,), tuning=Tuning(in_pairs=True))):
        patch.setattr(triton.JITFunction, "run", lambda self, *args, **keywords: kept.append(run(self, *args, **keywords).metadata))
        normclip.total_norm([torch.ones(5)])
    assert {metadata.enable_fp_fusion for metadata in kept} == {False}
