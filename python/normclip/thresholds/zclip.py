"""ZClip: clips norms that are outliers by their moving mean and standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from normclip._arguments import check_positive
from normclip.thresholds.policy import Threshold, as_norm, as_norms, check_share


def _first_norms(policy: ZClip, value: Any) -> list[float]:
    norms = as_norms(policy, value)
    if len(norms) > policy.warmup:
        raise ValueError(f"has {len(norms)} norms, and warmup is {policy.warmup}")
    return norms


@dataclass(eq=False)
class ZClip(Threshold):
    r"""ZClip: norms that exceed a moving mean μ by many standard deviations σ are clipped, and the more so the further out they are.

    .. math:: \gamma = \mu + \frac{z \sigma}{z_k / z} \quad \text{if} \quad z_k = \frac{n - \mu}{\sigma} > z

    and there is no limit for other norms. The norm after clipping, n', then enters the averages:

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha)\, n', \qquad \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (n' - \mu)^2

    Warm-up steps are not clipped; μ and σ start as the mean and standard deviation of their norms.

    Args:
        alpha: α, above 0 and below 1.
        z: The score z > 0 above which a norm is an outlier.
        warmup: The number of warm-up steps, at least 1.

    Raises:
        ValueError: A number is out of its range.

    References:
        Kumar, Owen, Chowdhury, Güra: ZClip: Adaptive spike mitigation for LLM pre-training, 2025 (arXiv 2504.02507).

    Example:
        >>> rule = ZClip(warmup=2)
        >>> [rule.observe(norm) for norm in (1.0, 3.0)]  # μ = 2, σ = 1
        [inf, inf]
        >>> rule.threshold(4.0), rule.threshold(7.0)  # 2 standard deviations, and 5, twice the limit of 2.5
        (inf, 3.25)
    """

    alpha: float = 0.97
    z: float = 2.5
    warmup: int = 25
    _first: list[float] = field(init=False, repr=False, default_factory=list, metadata={"check": _first_norms})
    _mean: float = field(init=False, repr=False, default=0.0, metadata={"check": as_norm})
    _deviation: float = field(init=False, repr=False, default=0.0, metadata={"check": as_norm})

    def __post_init__(self) -> None:
        self.alpha, self.z, self.warmup = check_share("alpha", self.alpha), check_positive("z", self.z), int(self.warmup)
        if self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: pass at least 1")

    def threshold(self, norm: float) -> float:
        """The limit for an outlier; ``inf`` for other norms and in warm-up. A norm that is not finite is an outlier: its limit is μ."""
        excess, allowed = norm - self._mean, self.z * self._deviation
        if len(self._first) < self.warmup or excess <= allowed:
            return math.inf
        return self._mean + (allowed * (allowed / excess) if excess < math.inf else 0.0)

    def _note(self, norm: float, limit: float) -> None:
        if len(self._first) < self.warmup:
            self._first.append(norm)
            count = len(self._first)
            self._mean = sum(first / count for first in self._first)
            away = [abs(first - self._mean) for first in self._first]
            # The root of a sum of squares may overflow, but the deviation is at most the largest distance from the mean.
            self._deviation = min(math.hypot(*away) / math.sqrt(count), max(away))
            return
        norm = min(norm, limit)
        self._mean = self.alpha * self._mean + (1.0 - self.alpha) * norm
        # √(ασ² + (1 − α)(n' − μ)²), without squares that may overflow.
        self._deviation = math.hypot(math.sqrt(self.alpha) * self._deviation, math.sqrt(1.0 - self.alpha) * (norm - self._mean))
