"""Claims of the theory, written down before a run: the figure that decides, and the ranges of it in which the claim holds or holds in part.

A figure is measured once for each seed. A claim holds if the figures of all seeds, at least three, lie in the range in which it holds; it
holds in part if all lie in the wider range in which it does so at least in part, and does not hold if all lie outside of that. Else it is
undecided. Nothing about a claim depends on what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, Literal, TypeVar

Verdict = Literal["holds", "partly", "does not hold", "undecided"]

LEAST_SEEDS = 3
"""The number of seeds that a verdict needs."""

_RAISED = str.maketrans("0123456789-.", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻·")

_Findings = TypeVar("_Findings", contravariant=True)


def number(value: float, digits: int = 3) -> str:
    """A number with a few digits; a dash if it is not finite."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000.0 else f"{value:.{digits}g}"


def power(exponent: float) -> str:
    """A raised exponent with two digits: ⁻⁰·²⁴."""
    return f"{exponent:.2f}".translate(_RAISED) if math.isfinite(exponent) else "–"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{value:.0%}" if math.isfinite(value) else "–"


def median_and_range(figures: Sequence[float], show: Callable[[float], str] = number) -> str:
    """The median, and the least and the largest in brackets if they read differently. A figure that is NaN has none of these."""
    if any(map(math.isnan, figures)):
        return "not measured"
    middle, low, high = show(median(figures)), show(min(figures)), show(max(figures))
    return middle if low == high else f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, figure: float) -> bool:
        return self.low <= figure <= self.high

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Judged:
    """A claim with what was measured, and the verdict. The fields are written to the JSON."""

    name: str
    claim: str
    source: str
    predicted: str
    measured: str
    figures: tuple[float, ...]
    """One for each seed."""
    criterion: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim(Generic[_Findings]):
    """A claim of the theory."""

    name: str
    """A short name, unique within a study."""
    claim: str
    source: str
    predicted: str
    figure: str
    """What the figure is, in words."""
    measure: Callable[[_Findings], Sequence[float]]
    """The figure of each seed; NaN where what the claim is about did not occur."""
    holds: Range
    partly: Range
    """Contains the range in which the claim holds."""
    show: Callable[[float], str] = number

    def __post_init__(self) -> None:
        if not self.partly.low <= self.holds.low <= self.holds.high <= self.partly.high or self.partly == Range():
            raise ValueError(f"{self.name}: no figure could refute this claim, or its ranges are not nested")

    @property
    def criterion(self) -> str:
        """The conditions for the verdicts "holds" and "partly", in words."""
        return f"{self.figure}: {self.holds}; partly: {self.partly}"

    def judge(self, findings: _Findings) -> Judged:
        """The verdict on this claim by the figures of all seeds."""
        figures = tuple(self.measure(findings))
        measured = f"{self.figure}: {median_and_range(figures, self.show)}"
        return Judged(self.name, self.claim, self.source, self.predicted, measured, figures, self.criterion, self._verdict(figures))

    def _verdict(self, figures: Sequence[float]) -> Verdict:
        if len(figures) < LEAST_SEEDS or any(map(math.isnan, figures)):
            return "undecided"
        if all(figure in self.holds for figure in figures):
            return "holds"
        at_least_partly = [figure in self.partly for figure in figures]
        return "partly" if all(at_least_partly) else "undecided" if any(at_least_partly) else "does not hold"
