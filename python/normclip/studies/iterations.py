"""Gradient descent on functions of one variable: how many iterations many runs need, and the best step for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from normclip import theory

Array = npt.NDArray[np.float64]
Steps = Callable[[Array], Array]
"""From the norms of the gradients of all runs to the steps that multiply the gradients."""

FRACTIONS = tuple(round(0.25 + 0.05 * index, 2) for index in range(20))
"""The fixed steps that are searched, 0.25 to 1.2, as fractions of the longest stable one from the farthest start."""
RATES = tuple(2.0**k for k in range(-4, 10))
"""The learning rates of tuned clipping, in units of 1/L0."""
LENGTHS = tuple(2.0**k for k in range(-5, 5))
"""The longest steps of tuned clipping, η·γ, in units of 1/L1."""


@dataclass(frozen=True)
class Problem:
    """An (L0, L1)-smooth even function of one variable, of which the absolute value of the derivative grows with |x|."""

    name: str
    value: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    L0: float
    L1: float
    tolerance: float
    """Runs end where |f'| is at most this."""

    def stable_step(self, start: float) -> float:
        """The step below which gradient descent from this start comes nearer to 0 in every step, and above which it never does."""
        return float(2.0 * start / self.derivative(np.array(start)))


def count(problem: Problem, starts: Array, steps: Steps, most: float = 1e7) -> Array:
    """The iterations of runs from these starts, infinite for runs that leave the finite numbers or need more than ``most``.

    The steps of all runs are computed at once, so ``steps`` may give each run its own.
    """
    x, counts = starts.astype(np.float64), np.zeros(starts.shape)
    with np.errstate(all="ignore"):
        for _ in range(int(min(most, 1e7)) + 1):
            slopes = problem.derivative(x)
            norms = np.abs(slopes)
            running = ~(norms <= problem.tolerance) & np.isfinite(counts)
            if not running.any():
                return counts
            x = np.where(running, x - steps(norms) * slopes, x)
            counts = np.where(running, np.where(np.isfinite(x), counts + 1.0, math.inf), counts)
    return np.where(running, math.inf, counts)


@dataclass(frozen=True)
class Best:
    """The best of the steps that were searched."""

    iterations: float
    """From the start that needs most."""
    setting: tuple[float, ...]
    on_edge: bool
    """Whether it is at an end of the grid, so that a still better one may lie beyond."""


def best_fixed(problems: Sequence[Problem], draws: Sequence[Array], limit: float) -> Best:
    """The best fixed step for several problems: the one of :data:`FRACTIONS` of ``limit`` that needs the fewest iterations on the worst."""
    pairs = list(zip(problems, draws, strict=True))
    # What needs more than this cannot be best, and some steps never arrive.
    most = max(float(count(problem, starts, lambda norms: np.full_like(norms, 0.9 * limit)).max()) for problem, starts in pairs)
    steps = limit * np.array(FRACTIONS)[:, None]
    return _best([_slowest(problem, starts, lambda norms: steps, FRACTIONS, most) for problem, starts in pairs], FRACTIONS)


def best_clipping(problems: Sequence[Problem], draws: Sequence[Array], most: float) -> Best:
    """The best rate and limit of hard clipping for several problems, by the number of iterations on the worst of them."""
    L0, L1 = problems[0].L0, problems[0].L1
    rates, lengths = (grid.reshape(-1, 1) for grid in np.meshgrid(np.array(RATES) / L0, np.array(LENGTHS) / L1, indexing="ij"))
    shape = (len(RATES), len(LENGTHS))
    counts = [
        _slowest(problem, starts, lambda norms: np.minimum(rates, lengths / norms), rates[:, 0], most)
        for problem, starts in zip(problems, draws, strict=True)
    ]
    worst = np.max(counts, axis=0).reshape(shape)
    row, column = np.unravel_index(int(np.argmin(worst)), shape)
    edge = row in (0, shape[0] - 1) or column in (0, shape[1] - 1)
    return Best(float(worst[row, column]), (RATES[row], LENGTHS[column]), bool(edge))


def _best(counts: Sequence[Array], grid: Sequence[float]) -> Best:
    worst = np.max(counts, axis=0)
    index = int(np.argmin(worst))
    return Best(float(worst[index]), (grid[index],), index in (0, len(grid) - 1))


def _slowest(problem: Problem, starts: Array, steps: Steps, grid: Sequence[float] | Array, most: float) -> Array:
    """The number of iterations from the start that needs most, for each setting."""
    return np.asarray(count(problem, np.broadcast_to(starts, (len(grid), len(starts))), steps, most).max(axis=1))


def theorem_3(problem: Problem) -> Steps:
    """The steps of clipping with the constants of Zhang's theorem 3."""
    lr, limit = theory.clipped_gd(problem.L0, problem.L1)
    return lambda norms: lr * np.minimum(1.0, limit / norms)


STARTS = 12


def draw_starts(farthest: float, generator: np.random.Generator) -> Array:
    """The farthest start, and others between half of it and itself, so that no step is best by hitting the minimum by chance."""
    return farthest * np.concatenate([[1.0], generator.uniform(0.5, 1.0, STARTS - 1)])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
