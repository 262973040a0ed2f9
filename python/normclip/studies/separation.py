r"""How many iterations clipping and plain gradient descent need if curvature grows with the gradient.

On an (L0, L1)-smooth function a fixed step has to be short enough for the largest gradient on the way, M. So gradient descent needs about
:math:`L_1 M / L_0` times as many iterations as clipping, whose step adapts (Zhang et al. 2020, arXiv 1905.11881, theorems 3 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from normclip import theory
from normclip.rules import Hard, Rule, Smoothness, Soft
from normclip.studies import plot
from normclip.studies.report import Claim, Findings, Options, Table, judge, number, power, spread

TITLE = "iterations of gradient descent and of clipping where curvature grows with the gradient"

_TOLERANCE = 0.01
DESCENT, CLIPPED, NORMALIZED, SMOOTH, EXACT = "descent", "clipped", "normalized", "1/(L0+L1n)", "exact"
_METHODS = {
    DESCENT: ("gradient descent, theorem 6", plot.RED, "o-"),
    CLIPPED: ("clipped, theorem 3", plot.BLUE, "s-"),
    NORMALIZED: ("normalized, paired with it", plot.SKY, "D--"),
    EXACT: ("exact optimum of the bound", plot.ORANGE, "v-"),
    SMOOTH: ("1/(L0 + L1·n)", plot.GREEN, "^-"),
}
_FAR = 10.0  # a start is far from the minimum if L1·M is at least this many times L0


@dataclass(frozen=True)
class Problem:
    """An (L0, L1)-smooth even function of one variable, given by its derivative, whose absolute value grows with |x|."""

    name: str
    derivative: Callable[[float], float]
    L0: float
    L1: float
    starts: tuple[float, ...]


PROBLEMS = (
    Problem("x⁴", lambda x: 4.0 * x**3, 16.0, 1.0, (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)),
    Problem("cosh", math.sinh, 1.0, 1.0, (1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 11.0)),
)


@dataclass(frozen=True)
class Row:
    """The number of iterations of each method from one start."""

    function: str
    start: float
    gradient: float
    """M, the norm at the start, which is the largest on the way."""
    far: bool
    """Whether L1·M is at least ten times L0."""
    iterations: dict[str, int]


@dataclass(frozen=True)
class Separation(Findings):
    """The result of :func:`run`."""

    rows: tuple[Row, ...]

    def setting(self) -> str:
        """What was run."""
        return f"Iterations until |f'| ≤ {_TOLERANCE:g}: x⁴ with (L0, L1) = (16, 1), cosh with (1, 1)."

    def ratios(self, method: str, base: str, *, far: bool) -> list[float]:
        """The iterations of one method divided by those of another, for each start or for each far one."""
        return [row.iterations[method] / row.iterations[base] for row in self.rows if row.far or not far]

    def exponents(self, method: str) -> list[float]:
        """For each function, the slope of log iterations over log M, from the far starts."""
        functions = dict.fromkeys(row.function for row in self.rows)
        chosen = [[row for row in self.rows if row.far and row.function == function] for function in functions]
        return [_slope([row.gradient for row in rows], [row.iterations[method] for row in rows]) for rows in chosen]

    def claims(self) -> list[Claim]:
        """The claims, judged."""
        gaps = self.ratios(DESCENT, CLIPPED, far=True)
        growth, flat = self.exponents(DESCENT), self.exponents(CLIPPED)
        pair = self.ratios(NORMALIZED, CLIPPED, far=False)
        bold = self.ratios(CLIPPED, SMOOTH, far=False)
        exact = self.ratios(EXACT, SMOOTH, far=False)
        return [
            judge(
                "Far from the minimum clipping needs fewer iterations than gradient descent",
                "fewer where L1·M ≫ L0",
                f"{spread(gaps)} times fewer where L1·M ≥ {_FAR:g}·L0",
                holds=min(gaps) > 1.0,
                partly=max(gaps) > 1.0,
                criterion="fewer from every far start; partly: from some",
            ),
            judge(
                "Gradient descent's iterations grow in proportion to the largest gradient",
                "∝ M¹",
                _powers(growth),
                holds=all(abs(exponent - 1.0) <= 0.1 for exponent in growth),
                partly=all(exponent > 0.5 for exponent in growth),
                criterion="every exponent within 0.1 of 1; partly: above 0.5",
            ),
            judge(
                "Clipping's iterations hardly depend on it",
                "∝ M⁰, plus the way to the minimum",
                _powers(flat),
                holds=all(exponent <= 0.15 for exponent in flat),
                partly=all(exponent <= 0.5 for exponent in flat),
                criterion="every exponent at most 0.15; partly: 0.5",
            ),
            judge(
                "Normalized descent is clipping up to a factor of 2",
                "1 to 2 times the iterations",
                f"{spread(pair)} times",
                holds=min(pair) >= 1.0 and max(pair) <= 2.0,
                partly=max(pair) <= 2.0,
                criterion="every ratio in [1, 2]; partly: none above 2",
            ),
            judge(
                "The step 1/(L0 + L1·n) is faster than theorem 3, whose constants are cautious",
                "some 10 times fewer",
                f"{spread(bold)} times fewer",
                holds=min(bold) >= 5.0 and max(bold) <= 20.0,
                partly=min(bold) > 1.0,
                criterion="5 to 20 times fewer from every start; partly: fewer",
            ),
            judge(
                "The step that minimizes the bound is faster still",
                "at most as many as 1/(L0 + L1·n)",
                f"{spread(exact)} times as many: it is shorter, for safety that is not needed here",
                holds=max(exact) <= 1.0,
                partly=min(exact) < 1.0,
                criterion="at most as many from every start; partly: fewer from some",
            ),
        ]

    def tables(self) -> list[Table]:
        """One row for each start."""
        rows = tuple(
            (f"{row.function} from {row.start:g}", number(row.gradient), *(number(row.iterations[method], 4) for method in _METHODS))
            for row in self.rows
        )
        return [Table("Iterations", ("start", "M", *_METHODS), rows)]

    def draw(self, figure: Figure) -> None:
        """Plot iterations over the largest gradient, with a panel for each function."""
        figure.set_size_inches(9.6, 4.2)
        functions = list(dict.fromkeys(row.function for row in self.rows))
        panels = figure.subplots(1, len(functions), squeeze=False)[0]
        for axes, function in zip(panels, functions, strict=True):
            rows = [row for row in self.rows if row.function == function]
            for method, (name, color, line) in _METHODS.items():
                axes.loglog([row.gradient for row in rows], [row.iterations[method] for row in rows], line, color=color, label=name)
            plot.label(axes, function, "largest gradient M = |f'(x0)|", f"iterations until |f'| ≤ {_TOLERANCE:g}")
        panels[0].legend(loc="upper left")


def run(options: Options) -> Separation:
    """Count the iterations of every method from every start. Uses no random numbers; quick runs are the same."""
    cases = [(problem, start) for problem in PROBLEMS for start in problem.starts]
    rows: list[Row] = []
    for problem, start in cases:
        options.progress(len(rows), len(cases), f"{problem.name} from {start:g}")
        rows.append(count(problem, start))
    options.progress(len(cases), len(cases), "done")
    return Separation(tuple(rows))


def count(problem: Problem, start: float) -> Row:
    """The iterations of every method from one start."""
    L0, L1 = problem.L0, problem.L1
    largest = abs(problem.derivative(start))
    lr, limit = theory.clipped_gd(L0, L1)
    methods: dict[str, tuple[float, Rule | None]] = {
        DESCENT: (theory.fixed_gd(L0, L1, largest), None),
        CLIPPED: (lr, Hard(limit)),
        NORMALIZED: (lr, Soft(limit)),
        SMOOTH: (1.0, Smoothness(L0, L1, lr=1.0)),
        EXACT: (1.0, Smoothness(L0, L1, lr=1.0, exact=True)),
    }
    iterations = {method: _iterations(problem.derivative, start, *choice) for method, choice in methods.items()}
    return Row(problem.name, start, largest, L1 * largest >= _FAR * L0, iterations)


def _iterations(derivative: Callable[[float], float], x: float, lr: float, rule: Rule | None) -> int:
    iterations = 0
    while abs(slope := derivative(x)) > _TOLERANCE:
        x -= lr * slope * (1.0 if rule is None else rule.coefficient(abs(slope)))
        iterations += 1
    return iterations


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _powers(exponents: Sequence[float]) -> str:
    return "∝ " + " and ".join(power("M", exponent) for exponent in exponents)
