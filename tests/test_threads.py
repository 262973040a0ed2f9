"""Threads: the same bits for any number of them, where the number comes from, and life beside forks, other threads and their settings."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normclip
from support.processes import output_of, run_python
from support.tensors import DTYPES, NO_DOUBLES, REAL_DTYPES, Recipe, raw

THREADS = (1, 2, 3, 8)
ORDERS = (0.0, 0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 7.0, -1.0, math.inf, -math.inf)


def blocks(dtype: str) -> list[Any]:
    """Tensors of many blocks and of less than one, more than the megabyte from which helpers join, of magnitudes that make sums inexact."""
    low, high = {"float16": (-20, 15)}.get(dtype, (-60, 60))
    sizes = (7, 400_001, 0, 65_536, 70_003, 1, 130_000)
    recipes = [Recipe(dtype, size, library="torch", exponents=(low, high), seed=seed) for seed, size in enumerate(sizes)]
    return [*(recipe.make() for recipe in recipes), Recipe(dtype, 90_000, "every third", "torch", (low, high)).make()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_have_the_same_bits(dtype: str, set_threads: Callable[[int], None]) -> None:
    tensors = blocks(dtype)
    for order in ORDERS:
        norms = []
        for threads in THREADS:
            set_threads(threads)
            norms += [normclip.total_norm([*tensors, NO_DOUBLES], order).item().hex() for _ in range(3)]
        assert len(set(norms)) == 1, f"order {order}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_tensors_have_the_same_bits(dtype: str, set_threads: Callable[[int], None]) -> None:
    written = set()
    for threads in THREADS:
        set_threads(threads)
        tensors = blocks(dtype)
        normclip.clip_(tensors, 1.0)
        normclip.scale_(tensors, 1.7)
        written.add(b"".join(map(raw, tensors)))
    assert len(written) == 1


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_clamped_tensors_have_the_same_bits(dtype: str, set_threads: Callable[[int], None]) -> None:
    written = set()
    for threads in THREADS:
        set_threads(threads)
        tensors = blocks(dtype)
        normclip.clamp_(tensors, 0.75)
        written.add(b"".join(map(raw, tensors)))
    assert len(written) == 1
    assert max(tensor.abs().max().item() for tensor in tensors if tensor.numel()) == 0.75


def test_neighbours_do_not_matter(set_threads: Callable[[int], None]) -> None:
    """How a tensor is cut does not depend on what stands before it in the list, and order in the list on nothing but rounding."""
    set_threads(2)
    tensor = blocks("float64")[1]
    alone = normclip.total_norm(tensor, 1).item()
    zeros = [torch.zeros(size, dtype=torch.float64) for size in (3, 65_537, 100)]
    assert normclip.total_norm([*zeros, tensor], 1).item() == alone
    assert normclip.total_norm([tensor, *zeros], 1).item() == alone


def test_set_and_get(set_threads: Callable[[int], None]) -> None:
    for threads in (1, 5, 2):
        set_threads(threads)
        assert normclip.get_num_threads() == threads


@pytest.mark.parametrize(
    ("threads", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (2**70, OverflowError)]
)
def test_numbers_that_are_none(threads: Any, error: type[Exception]) -> None:
    before = normclip.get_num_threads()
    with pytest.raises(error):
        normclip.set_num_threads(threads)
    assert normclip.get_num_threads() == before


def test_message_says_what_is_possible() -> None:
    with pytest.raises(ValueError, match="pass one from 1 to 1024"):
        normclip.set_num_threads(0)


DEFAULTS = """
    import os, normclip

    def say():
        print(normclip.get_num_threads(), flush=True)

    cpus = len(os.sched_getaffinity(0))
    assert normclip.get_num_threads() == cpus
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert normclip.get_num_threads() == cpus, "the system is asked once"
    child = os.fork()
    if child == 0:
        say()
        os._exit(0)
    os.waitpid(child, 0)
    say()
    normclip.set_num_threads(None)
    say()
    os.environ["NORMCLIP_NUM_THREADS"] = "3"
    say()
    normclip.set_num_threads(None)
    say()
    normclip.set_num_threads(4)
    say()
    os.environ["NORMCLIP_NUM_THREADS"] = "none"
    try:
        normclip.set_num_threads(None)
    except ValueError:
        say()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not say which CPUs a process may use")
def test_default_is_the_cpus_of_this_process_and_can_be_overridden() -> None:
    # The child that was forked, then its parent.
    cpus = len(os.sched_getaffinity(0))
    assert output_of(DEFAULTS).split() == ["1", str(cpus), "1", "1", "3", "4", "4"]


FOLLOWS_TORCH = """
    import normclip, torch
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        print(normclip.get_num_threads())
    normclip.set_num_threads(5)
    torch.set_num_threads(1)
    print(normclip.get_num_threads())
    normclip.set_num_threads(None)
    print(normclip.get_num_threads())
"""


def test_torch_s_number_is_followed_until_another_is_set() -> None:
    assert output_of(FOLLOWS_TORCH).split() == ["1", "3", "2", "5", "1"]
    assert output_of(FOLLOWS_TORCH, NORMCLIP_NUM_THREADS="7").split() == ["7", "7", "7", "5", "7"]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "18446744073709551616"])
def test_environment_must_hold_a_number(value: str) -> None:
    run = run_python("import normclip", NORMCLIP_NUM_THREADS=value)
    assert run.returncode == 1
    assert f"ValueError: NORMCLIP_NUM_THREADS={value} is not a number from 1 to 1024: unset or correct it" in run.stderr


@pytest.mark.parametrize("value", ["", " 2 "])
def test_environment_may_be_empty_or_padded(value: str) -> None:
    assert int(output_of("import normclip; print(normclip.get_num_threads())", NORMCLIP_NUM_THREADS=value)) >= 1


def test_python_threads_clip_at_once(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    together = threading.Barrier(4)

    def clip(seed: int) -> tuple[list[float], bytes]:
        tensors = [Recipe("float64", 200_000, exponents=(-9, 9), seed=10 * seed + part).make() for part in range(3)]
        together.wait(timeout=60)
        norms = [normclip.clip_(tensors, 1000.0 / (1 + step)) for step in range(20)]
        return norms, b"".join(map(raw, tensors))

    with ThreadPoolExecutor(4) as executor:
        at_once = list(executor.map(clip, range(4)))
    together = threading.Barrier(1)
    assert at_once == [clip(seed) for seed in range(4)]


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """Python threads that hold the interpreter keep it until they give it up themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(before)


def test_other_python_threads_run_meanwhile(no_forced_switches: None) -> None:
    array = np.ones(5_000_000, np.float32)
    steps, done = 0, False

    def step() -> None:
        nonlocal steps
        while not done:
            steps += 1
            time.sleep(0)  # gives up the interpreter

    def steps_during(call: Callable[[], object]) -> int:
        before = steps
        call()
        return steps - before

    other = threading.Thread(target=step)
    other.start()
    try:
        # The system may take its time to wake the other thread, so one call may be too short; a hundred are not. Were the interpreter
        # held, no number of them would help: the bytecode between the two looks at the counter does not give it up.
        for call in (
            lambda: normclip.total_norm(array, 2.5),
            lambda: normclip.scale_(array, 0.999),
            lambda: normclip.clamp_(array, 1e-6),
        ):
            assert any(steps_during(call) for _ in range(100))
        assert not any(steps_during(lambda: sum(range(1000))) for _ in range(100)), "the interpreter is held by default"
    finally:
        done = True
        other.join()


# In a process of its own: the setting belongs to a thread, and threads that are started later inherit it. Numbers are made before and
# compared by their bytes, for Python's own arithmetic flushes, too.
FLUSH = """
    import struct
    import numpy as np
    import torch
    import normclip

    rng = np.random.default_rng(0)
    arrays = {
        2.0 ** (low + 20): np.ldexp(rng.uniform(1, 2, 600_000), rng.integers(low, low + 30, 600_000)).astype(dtype)
        for dtype, low in ((np.float16, -24), (np.float32, -149), (np.float64, -1074))
    }

    def results():
        found = []
        for limit, array in arrays.items():
            array = array.copy()
            norms = [normclip.total_norm(array, order) for order in (0, 1, 2, 2.5, 3, -1, float("inf"), float("-inf"))]
            normclip.scale_(array, 0.7)
            normclip.clamp_(array, limit)
            found += [struct.pack("8d", *norms), array.tobytes()]
        return found

    normclip.set_num_threads(1)
    expected = results()
    tiny = torch.tensor([2.0**-130])
    torch.set_num_threads(2)
    print(torch.set_flush_denormal(True))
    for threads in (1, 2, 3):  # the second has torch's threads, the third helpers
        normclip.set_num_threads(threads)
        print([ours == theirs for ours, theirs in zip(results(), expected)], (tiny * 0.5).item())
"""


def test_flushing_of_denormal_numbers_changes_nothing() -> None:
    lines = output_of(FLUSH).splitlines()
    if lines[0] == "False":
        pytest.skip("this CPU does not flush denormal numbers")
    # Between the calls, torch still flushes.
    assert lines[1:] == ["[True, True, True, True, True, True] 0.0"] * 3


HELPERS = """
    import os
    import numpy as np
    import normclip

    array = np.ones(5_000_000, np.float32)  # 20 MB
    for threads in [*range(1, 60), 1000, 2]:
        normclip.set_num_threads(threads)
        assert normclip.total_norm(array, 1) == 5e6
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    print(sum(name.startswith("normclip") for name in names))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list threads")
def test_helpers_are_bounded_by_the_work_and_stay() -> None:
    assert 1 <= int(output_of(HELPERS)) <= 20


# The signal comes from a helper process and finds the read under way: to its end it would take hours.
INTERRUPT = """
    import os, signal, subprocess, sys
    import torch
    import normclip

    normclip.set_num_threads({threads})
    endless = torch.ones(1).expand(2**22, 2**22)
    subprocess.Popen([sys.executable, "-c", "import os, sys, time; time.sleep(1); os.kill(int(sys.argv[1]), 2)", str(os.getpid())])
    try:
        {call}
    except KeyboardInterrupt:
        print("interrupted", normclip.total_norm(torch.ones(1_000_000)).item())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["normclip.total_norm(endless)", "normclip.stats([endless])", "normclip.dot(endless, endless)"])
def test_reading_is_interrupted(call: str, threads: int) -> None:
    assert output_of(INTERRUPT.format(call=call, threads=threads)) == "interrupted 1000.0\n"


LIMITED = """
    import resource
    import torch
    import normclip

    tensors = [torch.ones(3)] * 8_000_000
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, used + 200_000_000))
    try:
        normclip.total_norm(tensors)
    except MemoryError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell how much memory is used")
def test_lists_beyond_memory_are_refused() -> None:
    assert output_of(LIMITED) == "there is no memory for a list of so many tensors: pass fewer at a time\n"


# What a million tensors take at most besides what is there already, in megabytes.
MILLION = """
    import numpy as np
    import torch
    import normclip

    def resident(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1000

    normclip.clip_([torch.ones(3), np.ones(3)], 1.0)
    tensors = {tensors}
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = resident("VmRSS")
    {call}
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of memory")
@pytest.mark.parametrize("tensors", ["list(torch.ones(1_000_000, 4))", "list(np.ones((1_000_000, 4), np.float32))"])
@pytest.mark.parametrize("call", ["normclip.total_norm(tensors)", "normclip.clip_(tensors, 1.0)"])
def test_a_million_tensors_take_little_memory(call: str, tensors: str) -> None:
    if "torch" in tensors and not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch exports each tensor by a capsule, which takes a kilobyte")
    assert float(output_of(MILLION.format(call=call, tensors=tensors))) <= 100.0
