"""Threads of Python on tensors of their own and on shared ones, while others set the number of threads and patch torch.

CI runs this without the interpreter's lock, too (PYTHON_GIL=0 on a free-threaded Python).
"""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import normclip
from normclip.rules import Soft
from normclip.thresholds import AutoClip

THREADS, ROUNDS = 6, 15
Work = Callable[[int], object]


@pytest.fixture(autouse=True)
def restless(set_threads: object) -> Iterator[None]:
    """With the interpreter's lock, threads change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Work) -> list[list[object]]:
    """What each work returns in each of its threads, all of which start together. An exception in one is raised here."""
    together = threading.Barrier(THREADS * len(works))

    def start(work: Work, index: int) -> object:
        together.wait(timeout=60)
        return work(index)

    with ThreadPoolExecutor(THREADS * len(works)) as executor:
        futures = [[executor.submit(start, work, index) for index in range(THREADS)] for work in works]
        return [[future.result(timeout=240) for future in row] for row in futures]


def gradients(seed: int) -> list[np.ndarray]:
    """Some of many blocks, so that helpers join, and of small ones."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(dtype) for size, dtype in ((150_000, np.float32), (70_000, np.float64), (5, np.float16))]


def models() -> list[torch.nn.Module]:
    """A model for each thread, with gradients. They are made by one thread, for all share torch's random numbers."""
    torch.manual_seed(0)
    made = [torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.Linear(500, 2)) for _ in range(THREADS)]
    for each in made:
        for parameter in each.parameters():
            parameter.grad = torch.randn_like(parameter)
    return made


def set_numbers(_: int) -> None:
    """Sets the number of threads, over and over."""
    for step in range(ROUNDS):
        normclip.set_num_threads(1 + step % 4)
        assert 1 <= normclip.get_num_threads() <= 4


def on_own_tensors(seed: int) -> list[object]:
    """Every kind of call, on tensors that no other thread has."""
    tensors, found = gradients(seed), []
    for step in range(ROUNDS):
        found += [normclip.total_norm(tensors, order) for order in (1.0, 2.0, 2.5, float("inf"))]
        found.append(normclip.stats(tensors).l2)
        found.append(normclip.clip_(tensors, 100.0 / (1 + step)))
        found.append(normclip.dot(tensors[:1], tensors[:1]))
        normclip.clamp_(tensors, 5.0)
        normclip.scale_(tensors, 1.25)
    return [*found, *(tensor.tobytes() for tensor in tensors)]


def test_own_tensors_have_the_bits_that_they_have_alone() -> None:
    ours, _ = at_once(on_own_tensors, set_numbers)
    assert ours == [on_own_tensors(seed) for seed in range(THREADS)]


def test_shared_tensors_are_read_at_once() -> None:
    tensors = gradients(0)
    alone = [normclip.total_norm(tensors, order) for order in (1.0, 2.0, 3.0)]
    read, _ = at_once(lambda _: [[normclip.total_norm(tensors, order) for order in (1.0, 2.0, 3.0)] for _ in range(ROUNDS)], set_numbers)
    assert read == [[alone] * ROUNDS] * THREADS


def test_shared_tensors_are_written_at_once() -> None:
    """Each element becomes what some order of the writes makes it: here all write the same."""
    tensors = gradients(0)

    def write(_: int) -> None:
        for _ in range(ROUNDS):
            normclip.clamp_(tensors, 1.0)
            normclip.clip_(tensors, 1e9)

    at_once(write, set_numbers)
    for tensor, before in zip(tensors, gradients(0), strict=True):
        np.testing.assert_array_equal(tensor, np.clip(before, -1.0, 1.0))


def test_lists_that_other_threads_change() -> None:
    """A call takes a list as it is at some moment. No array is lost while it is measured, though no list holds it any more."""
    shared = [np.ones(1000) for _ in range(50)]

    def measure(_: int) -> None:
        for _ in range(10 * ROUNDS):
            # n arrays of 1000 ones have a squared norm of 1000 n.
            squared = normclip.total_norm(shared) ** 2 / 1000.0
            assert abs(squared - round(squared)) < 1e-6

    # Gradients are not replaced here: torch itself crashes where one thread reads `parameter.grad` while another sets it.
    def change(index: int) -> None:
        chance = random.Random(index)
        for _ in range(10 * ROUNDS):
            shared[chance.randrange(len(shared))] = np.ones(1000)
            shared.append(np.ones(1000))
            shared.pop()

    at_once(measure, change)


def test_models_are_clipped_as_alone() -> None:
    def train(made: torch.nn.Module) -> list[bytes]:
        threshold, norms = AutoClip(percentile=50), []
        for step in range(ROUNDS):
            norms.append(normclip.clip_grad_norm_(made.parameters(), rule=threshold if step % 2 else Soft(1.0)))
            norms.append(normclip.grad_stats(made).l2)
        return [torch.tensor(norms).numpy().tobytes(), *(p.grad.numpy().tobytes() for p in made.parameters())]

    ours, alone = models(), models()
    trained, _ = at_once(lambda index: train(ours[index]), set_numbers)
    assert trained == [train(made) for made in alone]


def test_patches_are_made_and_undone_at_once() -> None:
    before = torch.nn.utils.clip_grad_norm_

    def patch(_: int) -> None:
        for _ in range(ROUNDS):
            with normclip.patch_torch():
                assert torch.nn.utils.clip_grad_norm_ is not before

    made = models()

    def clip(index: int) -> None:
        for _ in range(ROUNDS):
            norm = torch.nn.utils.clip_grad_norm_(made[index].parameters(), 1e9)  # torch's or normclip's, as it happens
            assert norm > 0

    at_once(patch, clip)
    assert torch.nn.utils.clip_grad_norm_ is before
    assert torch.nn.utils.clip_grad.clip_grad_norm_ is before


def test_moments_are_shared() -> None:
    parts = [normclip.Moments.of(gradient) for gradient in gradients(0)]
    whole = sum(parts, normclip.Moments())
    sums = at_once(lambda _: [sum(parts, normclip.Moments()) == whole for _ in range(10 * ROUNDS)])
    assert sums == [[[True] * 10 * ROUNDS] * THREADS]
