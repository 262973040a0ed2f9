"""The two parts of Stable-SPAM that change gradients: a norm held to its own history, and elements held to a moving maximum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from normclip._arguments import check_positive, check_share
from normclip._names import named
from normclip.rules import Formula, Rule
from normclip.statistics import Stats, collect_named, measure
from normclip.thresholds.policy import Adaptive, Policy, as_count, as_norm, moving_weight, unique
from normclip.typing import NamedParameters

if TYPE_CHECKING:
    import torch

__all__ = ["AdaClip", "AdaGN"]


@dataclass(frozen=True)
class _To(Formula):
    """Every norm but 0 becomes this one."""

    norm: float

    def formula(self, xp: Any, n: Any) -> Any:
        """The coefficient of a norm: see :meth:`normclip.rules.Formula.formula`."""
        return xp.where(n > 0.0, self.norm / n, math.inf)


@dataclass(eq=False)
class AdaGN(Adaptive):
    """AdaGN, the norm rule of Stable-SPAM: every norm becomes the ratio of its moving mean and its moving root mean square.

    In step t, for the norm nₜ::

        mₜ = γ₁·mₜ₋₁ + (1 − γ₁)·nₜ
        vₜ = γ₂·vₜ₋₁ + (1 − γ₂)·nₜ²
        c(nₜ) = (1 / nₜ) · mₜ/(1 − γ₁ᵗ) / (√(vₜ/(1 − γ₂ᵗ)) + ε)

    So norms are near 1 whatever the unit of the loss; gradients become larger, too. Meant for Adam, whose steps do not depend on that unit.
    A gradient of zeros is left unchanged, and counts. A norm that is not finite is not recorded; NaN makes the gradients NaN, an infinite
    norm makes finite elements 0.

    The authors apply it to each tensor by its own norm, after :class:`AdaClip`. With a rule for each,

        ``clip_grads_(model, limits={name: AdaGN() for name, _ in model.named_parameters()}, groups=lambda name: name)``

    where the dict is made once. Their optimizer also restarts t, though not m and v, whenever it resets Adam's momentum.

    Args:
        gamma1: γ₁, above 0 and below 1.
        gamma2: γ₂, above 0 and below 1.
        eps: ε > 0, in the unit of the norm.

    Raises:
        ValueError: A number is out of its range.

    References:
        Huang et al.: Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam, 2025 (arXiv 2502.17055), and its code,
        github.com/TianjinYellow/StableSPAM.

    Example:
        >>> rule = AdaGN(gamma1=0.5, gamma2=0.5)
        >>> rule.multiplier(2.0)  # by which the norm becomes 1
        0.4999999975
        >>> round(rule.multiplier(8.0) * 8.0, 6)  # (2 + 2·8)/3 over √((2² + 2·8²)/3)
        0.904534
    """

    gamma1: float = 0.7
    gamma2: float = 0.9
    eps: float = 1e-8
    _steps: int = field(init=False, repr=False, default=0, metadata={"check": as_count})
    _mean: float = field(init=False, repr=False, default=0.0, metadata={"check": as_norm})
    _root: float = field(init=False, repr=False, default=0.0, metadata={"check": as_norm})

    def __post_init__(self) -> None:
        self.gamma1, self.gamma2 = check_share("gamma1", self.gamma1), check_share("gamma2", self.gamma2)
        self.eps = check_positive("eps", self.eps)

    def _averages(self, norm: float) -> tuple[float, float]:
        """Those of the norm and its square, of the latter the root, with a norm of this step."""
        weight, square = (moving_weight(decay, self._steps + 1) for decay in (self.gamma1, self.gamma2))
        # By the root, as squares may overflow.
        return (1.0 - weight) * self._mean + weight * norm, math.hypot(math.sqrt(1.0 - square) * self._root, math.sqrt(square) * norm)

    def _rule(self, norm: float) -> Rule:
        mean, root = self._averages(norm) if math.isfinite(norm) else (self._mean, self._root)
        return _To(mean / (root + self.eps))

    def _end_step(self, norm: float, rule: Rule) -> None:
        if math.isfinite(norm):
            (self._mean, self._root), self._steps = self._averages(norm), self._steps + 1


def _maxima(policy: Policy, value: Any) -> dict[str, list[Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("is not a dict by the names of tensors")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value.values()):
        raise ValueError("does not hold a number of steps and a maximum for each tensor")
    return {name: [as_count(policy, steps), as_norm(policy, maximum)] for name, (steps, maximum) in value.items()}


@dataclass(eq=False)
class AdaClip(Policy):
    """AdaClip, the element threshold of Stable-SPAM: elements above a moving average of the largest of their tensor are scaled down.

    In step t of a tensor, for its elements gᵢ::

        M = max |gᵢ|
        Tₜ = θ·Tₜ₋₁ + (1 − θ)·M
        λ = Tₜ / (1 − θᵗ)
        gᵢ ← gᵢ · λ/M  where |gᵢ| > λ

    so that the largest element becomes λ. (The others above λ are not clamped to it, but end below it.) All maxima come from one read; only
    tensors with elements above are written, by torch's operations. A tensor with NaN or infinite elements is left as it is, and is not
    recorded. The authors' optimizer also restarts t, though not T, whenever it resets Adam's momentum.

    Args:
        theta: θ, above 0 and below 1.

    Raises:
        ValueError: ``theta`` is out of its range.

    References:
        Huang et al.: Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam, 2025 (arXiv 2502.17055), and its code,
        github.com/TianjinYellow/StableSPAM.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> policy = AdaClip(theta=0.5)
        >>> for gradient in ([1.0, 0.5, 0.0], [7.0, -6.0, 2.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     stats = policy.clip_([("weight", weight)])
        >>> weight.grad  # the threshold is (1 + 2·7)/3 = 5
        tensor([ 5.0000, -4.2857,  2.0000])
        >>> stats.linf
        7.0
    """

    theta: float = 0.999
    _maxima: dict[str, list[Any]] = field(init=False, repr=False, default_factory=dict, metadata={"check": _maxima})

    def __post_init__(self) -> None:
        self.theta = check_share("theta", self.theta)

    def clip_(self, parameters: NamedParameters) -> Stats:
        """Clip the gradients in place, and record the largest element of each.

        Args:
            parameters: A module, parameters, or pairs of name and parameter, as for :func:`normclip.grad_stats`. Maxima are recorded by
                name, or by position if there are no names, so pass the same parameters in the same way each time.

        Returns:
            The statistics of the gradients before clipping, with those of each tensor.

        Raises:
            TypeError: As for :func:`normclip.clip_grad_norm_`, or a gradient is complex, sparse, or a DTensor with a Partial placement.
            ValueError: A gradient cannot be written, or two parameters have one name. Nothing has changed.
        """
        pairs = named(parameters)
        batch, names = collect_named(pairs, writable=True)
        unique(names)
        batch.check_elementwise()
        gradients = [pairs[position][1].grad for position in batch.positions]
        for name, gradient in zip(names, gradients, strict=True):
            if gradient.is_sparse:
                raise TypeError(f"the gradient of parameter {name} is sparse: leave the parameter out, or make its gradient dense")
        stats, _, _ = measure(batch, names, per_tensor=True, orders=(), groups=None)
        assert stats.per_tensor is not None
        found = dict(self._maxima)
        for name, gradient, most in zip(names, gradients, stats.per_tensor.linf.tolist(), strict=True):
            if not math.isfinite(most):
                continue
            steps, average = self._maxima.get(name, (0, 0.0))
            weight = moving_weight(self.theta, steps + 1)
            limit = (1.0 - weight) * average + weight * most
            found[name] = [steps + 1, limit]
            if most > limit:
                _shrink(gradient.detach(), limit, limit / most)
        self._maxima = found
        return stats


def _shrink(gradient: torch.Tensor, limit: float, factor: float) -> None:
    """Multiply the elements beyond the limit by the factor, in float32 or the wider type of the elements."""
    import torch

    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    gradient.copy_(torch.where(wide.abs() > limit, wide * factor, wide))
