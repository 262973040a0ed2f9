"""Training runs. Each uses one thread, so that its results depend on the seed alone; several run at once, on all CPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor, nn

from normclip import clip_grads_
from normclip.rules import Rule
from normclip.studies.models import loss_of
from normclip.studies.report import Progress

Batch = tuple[Tensor, Tensor]
Batches = Iterator[Batch]

Step = Callable[[int, Batch], tuple[float, float]]
"""Called with the number of the step and its batch, after backward. Updates the parameters and returns the norm of the gradients and the
factor by which the step was shortened."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Trained:
    """The course of a training run, with one number for each step."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    coefficients: tuple[float, ...]
    planned: int
    """The number of steps that were requested. A run whose loss becomes NaN or infinite ends earlier."""

    @property
    def final(self) -> float:
        """The mean loss of the last tenth of the steps; infinite for a run that ended early."""
        if len(self.losses) < self.planned:
            return math.inf
        last = self.losses[-max(1, self.planned // 10) :]
        return sum(last) / len(last)

    @property
    def clipped(self) -> float:
        """The share of steps with a coefficient below 1."""
        return sum(coefficient < 1.0 for coefficient in self.coefficients) / max(1, len(self.coefficients))


def train(model: nn.Module, batches: Batches, step: Step, *, steps: int, tick: Callable[[int], None]) -> Trained:
    """Train a model: for each step, backpropagate the loss of a batch and call ``step``."""
    losses: list[float] = []
    norms: list[float] = []
    coefficients: list[float] = []
    for index in range(steps):
        batch = next(batches)
        model.zero_grad()
        loss = loss_of(model, batch)
        if not math.isfinite(loss.item()):
            tick(steps - index)
            break
        torch.autograd.backward(loss)
        norm, coefficient = step(index, batch)
        losses.append(loss.item())
        norms.append(norm)
        coefficients.append(coefficient)
        tick(1)
    return Trained(tuple(losses), tuple(norms), tuple(coefficients), steps)


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule) -> Step:
    """A training step that clips by a rule and then calls the optimizer."""

    def step(index: int, batch: Batch) -> tuple[float, float]:
        clipped = clip_grads_(model, rule)
        optimizer.step()
        return clipped.norm, clipped.coefficient

    return step


class Ticker:
    """Adds up the steps of runs in several threads, and reports their progress."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = Lock()

    def counter(self, label: str) -> Callable[[int], None]:
        """A function for one run to call with the number of steps that it has done."""

        def tick(steps: int) -> None:
            with self._lock:
                self._done += steps
                self._progress(self._done, self._total, label)

        return tick


def side_by_side(jobs: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Run jobs in parallel, each with one torch thread, and return their results in order."""
    before = torch.get_num_threads()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cpus, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [future.result() for future in [pool.submit(job) for job in jobs]]
    finally:
        torch.set_num_threads(before)
