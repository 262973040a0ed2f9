"""AutoClip: clips to a percentile of all norms so far."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from normclip.thresholds.policy import Policy, Threshold, as_norms


def _sorted_norms(policy: Policy, value: Any) -> list[float]:
    norms = as_norms(policy, value)
    if any(before > norm for before, norm in pairwise(norms)):
        raise ValueError("is not sorted")
    return norms


@dataclass(eq=False)
class AutoClip(Threshold):
    r"""AutoClip: the limit is a percentile of all norms so far, including the current one.

    .. math:: \gamma_k = \operatorname{percentile}_p(n_1, \dots, n_k)

    interpolated linearly, as :func:`numpy.percentile` does. The history holds a float for each step.

    Args:
        percentile: p, from 0 to 100. With 10, about 90 % of the steps are clipped.

    Raises:
        ValueError: ``percentile`` is out of its range.

    References:
        Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive gradient clipping for source separation networks, 2020 (arXiv 2007.14469).

    Example:
        >>> rule = AutoClip(percentile=10)
        >>> for norm in (4.0, 3.0, 2.0):
        ...     limit = rule.observe(norm)
        >>> rule.threshold(1.0)
        1.3
    """

    percentile: float = 10.0
    _history: list[float] = field(init=False, repr=False, default_factory=list, metadata={"check": _sorted_norms})

    def __post_init__(self) -> None:
        self.percentile = float(self.percentile)
        if not 0.0 <= self.percentile <= 100.0:
            raise ValueError(f"percentile is {self.percentile}: pass a number from 0 to 100")

    def threshold(self, norm: float) -> float:
        """The percentile of the recorded norms and, if it is finite, this one; ``inf`` if there are none."""
        history = self._history
        place = bisect_right(history, norm) if math.isfinite(norm) else len(history)
        count = len(history) + math.isfinite(norm)
        if count == 0:
            return math.inf

        def ranked(rank: int) -> float:  # in the history as if this norm were inserted at its place
            return history[rank] if rank < place else norm if rank == place else history[rank - 1]

        position = (count - 1) * (self.percentile / 100.0)
        below = math.floor(position)
        low, high, share = ranked(below), ranked(min(below + 1, count - 1)), position - below
        # Interpolated from the nearer end, as NumPy does, so that the result lies between both in spite of rounding.
        return low + (high - low) * share if share < 0.5 else high - (high - low) * (1.0 - share)

    def _note(self, norm: float, limit: float) -> None:
        self._history.insert(bisect_right(self._history, norm), norm)
