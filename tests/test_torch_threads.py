"""torch's own threads do the work where they can, and never where that would hang. Bits do not tell whose threads they were."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import normclip
from normclip.optim import ClippedSGD
from support.processes import COUNTS, output_of, run_python
from support.tensors import REAL_DTYPES, Recipe, raw

TORCH = ctypes.CDLL(torch._C.__file__)

pytestmark = [
    pytest.mark.skipif(not hasattr(TORCH, "torch_parallel_for"), reason="this torch does not lend its threads"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where a process comes from"),
]


@pytest.fixture
def lend() -> Iterator[Callable[[bool], None]]:
    """Two threads of torch's, or two of normclip's own."""
    before = torch.get_num_threads()

    def lend(lent: bool) -> None:
        torch.set_num_threads(2 if lent else 1)
        normclip.set_num_threads(2)

    yield lend
    torch.set_num_threads(before)
    normclip.set_num_threads(None)


SERVES = """
    import normclip
    assert normclip.total_norm(array[:100]) == 10.0
    import torch
    torch.set_num_threads(3)
    for threads in (None, 3, 2, 4, 3):
        normclip.set_num_threads(threads)
        print(started(normclip.total_norm))
"""


def test_torch_s_pool_serves_up_to_its_number_of_threads() -> None:
    # Torch may be imported after normclip. Of its three threads one is the caller; for four there are three helpers.
    assert output_of(COUNTS + SERVES).split() == ["2", "0", "0", "3", "0"]


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_bits_do_not_depend_on_whose_threads(dtype: str, lend: Callable[[bool], None]) -> None:
    def results() -> list[object]:
        make = [Recipe(dtype, size, library="torch", exponents=(-9, 9), seed=size).make for size in (400_001, 7, 300_000, 65_536)]
        tensors = [one() for one in make]
        found: list[object] = [normclip.total_norm(tensors, order).item().hex() for order in (1.0, 2.0, 2.5, 3.0, float("inf"))]
        found += [normclip.stats(tensors), normclip.dot(tensors, [one() for one in make])]
        normclip.clip_(tensors, 1.0)
        parameters = [torch.nn.Parameter(one()) for one in make]
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.grad = tensor
        ClippedSGD(parameters, 0.1, 0.5, momentum=0.9).step()
        return [*found, *map(raw, tensors), *(raw(parameter.detach()) for parameter in parameters)]

    lend(False)
    own = results()
    lend(True)
    for _ in range(3):
        assert repr(results()) == repr(own)


def test_the_number_of_threads_may_change_between_calls(lend: Callable[[bool], None]) -> None:
    lend(True)
    normclip.set_num_threads(None)
    tensor = torch.ones(1_000_000)
    for threads in (1, 2, 3, 1, 5, 2) * 3:
        torch.set_num_threads(threads)
        assert normclip.get_num_threads() == threads
        assert normclip.total_norm(tensor).item() == 1000.0


def test_within_a_parallel_region(lend: Callable[[bool], None]) -> None:
    lend(True)
    array, found = np.ones(1_000_000), []

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def part(begin: int, end: int, _context: object) -> None:
        found.extend(normclip.clip_(np.copy(array), 1.0) for _ in range(begin, end))

    for parts in (1, 2, 8):
        found.clear()
        assert TORCH.torch_parallel_for(ctypes.c_int64(0), ctypes.c_int64(parts), ctypes.c_int64(1), part, None) == 0
        assert found == [1000.0] * parts


def test_python_threads_at_once(lend: Callable[[bool], None]) -> None:
    lend(True)
    together = threading.Barrier(4)

    def clip(seed: int) -> tuple[list[float], bytes]:
        tensor = Recipe("float32", 400_000, library="torch", exponents=(-9, 9), seed=seed).make()
        together.wait(timeout=60)
        norms = [normclip.clip_(tensor, 1000.0 / (1 + step)).item() for step in range(20)]
        return norms, raw(tensor)

    with ThreadPoolExecutor(4) as executor:
        at_once = list(executor.map(clip, range(4)))
    together = threading.Barrier(1)
    assert at_once == [clip(seed) for seed in range(4)]


def test_hooks_of_autograd_clip(lend: Callable[[bool], None]) -> None:
    lend(True)
    weights = [torch.nn.Parameter(torch.ones(1000, 1000)) for _ in range(3)]
    norms = []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda weight: norms.append(normclip.clip_grad_norm_(weight, 1.0).item()))
    for _ in range(3):
        sum((3.0 * weight).sum() for weight in weights).backward()
        torch.testing.assert_close([weight.grad for weight in weights], [torch.full((1000, 1000), 1e-3)] * 3)
        for weight in weights:
            weight.grad = None
    assert norms == [3000.0] * 9


EXIT = """
    import atexit, threading
    import torch
    import normclip

    torch.set_num_threads(2)

    def forever():
        while True:
            normclip.clip_(np.ones(1_000_000), 1.0)

    atexit.register(lambda: print(normclip.total_norm(array), flush=True))
    threading.Thread(target=forever, daemon=True).start()
    assert normclip.total_norm(array) == 2000.0
"""


def test_calls_while_the_interpreter_exits() -> None:
    for _ in range(3):
        assert output_of(COUNTS + EXIT) == "2000.0\n"


ALONE = """
    import torch
    import normclip
    print(normclip.get_num_threads(), started(normclip.total_norm))
    normclip.set_num_threads(2)
    print(started(normclip.total_norm))
"""


def test_one_thread_of_torch_s_is_the_caller_s() -> None:
    assert output_of(COUNTS + ALONE, OMP_NUM_THREADS="1").split() == ["1", "0", "1"]


MISSING = """
    import ctypes, sys, types
    import normclip
    if {library}:
        ctypes.CDLL("libtorch_cpu.so")  # any library, by this name
    sys.modules["torch"] = torch = types.ModuleType("torch")
    assert normclip.total_norm(array[:100]) == 10.0
    torch.get_num_threads = lambda: 3
    print(normclip.get_num_threads(), started(normclip.total_norm))
"""


@pytest.mark.parametrize("library", [False, True], ids=["no library", "no symbol"])
def test_another_torch_has_its_number_and_not_its_pool(library: bool, tmp_path: Path) -> None:
    (tmp_path / "libtorch_cpu.so").write_bytes(Path(normclip._core.__file__).read_bytes())
    run = run_python(COUNTS + MISSING.format(library=library), LD_LIBRARY_PATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["3", "2"]
