r"""Thresholds that follow training: policies that remember earlier norms, and limits that are relative to weights.

:class:`AutoClip` and :class:`ZClip` are rules of the norm of all gradients. Every function that takes one of :mod:`normclip.rules` takes
them, with the norm that it has computed anyway. Each such call is a step of training to them, so use one object for one norm.
:class:`AdaGC` and :class:`AGC` clip each tensor, or each unit of a layer, by themselves, and have a ``clip_`` of their own.

All have ``state_dict()`` and ``load_state_dict()``, of plain numbers, lists and dicts, and go on bit for bit where they were saved. Where
there is a limit, a norm of NaN makes the gradients NaN and an infinite one makes finite elements 0, as in all of normclip; neither is
remembered.

    >>> import numpy as np
    >>> from normclip import clip_
    >>> rule = AutoClip(percentile=50)
    >>> gradients = [np.array([norm]) for norm in (1.0, 4.0, 2.0)]
    >>> [clip_(gradient, rule) for gradient in gradients]
    [1.0, 4.0, 2.0]
    >>> [float(gradient[0]) for gradient in gradients]  # the medians so far: 1, 2.5 and 2
    [1.0, 2.5, 2.0]
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from normclip._arguments import Parameters, check_not_negative, check_positive
from normclip._backends import collect_grads
from normclip._results import mark_written
from normclip.clip_grads import Clipped
from normclip.rules import Hard, Rule, Scalar
from normclip.statistics import measure, named, take_grads

if TYPE_CHECKING:
    import torch


class Policy:
    """What all policies have: the fields that they are not constructed with are what they remember."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, for a checkpoint. Its constants are no part of that."""
        return {name: copy.deepcopy(getattr(self, f"_{name}")) for name in self._remembered()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: It is not the state of such a policy. Nothing has changed.
        """
        if set(state) != set(self._remembered()):
            raise ValueError(f"the state has {sorted(state)} and {type(self).__name__} remembers {self._remembered()}: load one of its own")
        for name in self._remembered():
            setattr(self, f"_{name}", copy.deepcopy(state[name]))

    def _remembered(self) -> list[str]:
        return [remembered.name[1:] for remembered in dataclasses.fields(self) if not remembered.init]  # type: ignore[arg-type]


class Threshold(Policy, Rule):
    r"""Hard clipping to a limit γ that depends on the norms before: :math:`c(n) = \min(1, \gamma/n)`.

    ``multiplier``, which clipping calls once a step, notes the norm; ``coefficient`` and ``threshold`` only tell. For a norm on a device
    all of them wait for it.
    """

    max_norm = math.inf
    """The limit of the latest step."""

    @abstractmethod
    def threshold(self, norm: float) -> float:
        """The limit for a gradient of this norm; ``inf`` for none."""

    def observe(self, norm: float) -> float:
        """The limit for a gradient of this norm, which is noted if it is finite."""
        limit = self.max_norm = self.threshold(norm)
        if math.isfinite(norm):
            self._note(norm, limit)
        return limit

    def multiplier(self, norm: Scalar) -> Scalar:
        """As for any rule, and notes the norm."""
        return Hard(self.observe(float(norm))).multiplier(norm)

    @abstractmethod
    def _note(self, norm: float, limit: float) -> None: ...

    def _formula(self, xp: Any, n: Any) -> Any:
        return Hard(self.threshold(float(n)))._formula(xp, n)


@dataclass(eq=False)
class AutoClip(Threshold):
    r"""AutoClip: the limit is a percentile of all norms so far, with the current one.

    .. math:: \gamma_k = \operatorname{percentile}_p(n_1, \dots, n_k)

    interpolated linearly, as :func:`numpy.percentile` does. The history holds a float for each step.

    Args:
        percentile: p, from 0 to 100. With 10 all but a tenth of the steps are clipped.

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
    _history: list[float] = field(init=False, repr=False, default_factory=list)  # sorted

    def __post_init__(self) -> None:
        self.percentile = float(self.percentile)
        if not 0.0 <= self.percentile <= 100.0:
            raise ValueError(f"percentile is {self.percentile}: pass a number from 0 to 100")

    def threshold(self, norm: float) -> float:
        """The percentile of the norms that were noted and this one, if it is finite; ``inf`` if there is none."""
        history = self._history
        place = bisect_right(history, norm) if math.isfinite(norm) else len(history)
        count = len(history) + math.isfinite(norm)
        if count == 0:
            return math.inf

        def ranked(rank: int) -> float:
            return history[rank] if rank < place else norm if rank == place else history[rank - 1]

        position = (count - 1) * (self.percentile / 100.0)
        below = math.floor(position)
        low, high, share = ranked(below), ranked(min(below + 1, count - 1)), position - below
        # From the nearer end, as NumPy does, so that neither end is passed.
        return low + (high - low) * share if share < 0.5 else high - (high - low) * (1.0 - share)

    def _note(self, norm: float, limit: float) -> None:
        self._history.insert(bisect_right(self._history, norm), norm)


@dataclass(eq=False)
class ZClip(Threshold):
    r"""ZClip: norms that stand out from a moving mean μ and deviation σ are clipped, the more the further out they are.

    .. math:: \gamma = \mu + \frac{z \sigma}{z_k / z} \quad \text{where} \quad z_k = \frac{n - \mu}{\sigma} > z

    and no limit elsewhere. The norm after clipping, n', then enters the averages:

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha)\, n', \qquad \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (n' - \mu)^2

    The first steps are not clipped; μ and σ begin as their mean and deviation.

    Args:
        alpha: α, above 0 and below 1.
        z: The score z > 0 from which on a norm is an outlier.
        warmup: How many steps come first, at least 1.

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
    _first: list[float] = field(init=False, repr=False, default_factory=list)
    _mean: float = field(init=False, repr=False, default=0.0)
    _deviation: float = field(init=False, repr=False, default=0.0)

    def __post_init__(self) -> None:
        self.alpha, self.z, self.warmup = _check_share("alpha", self.alpha), check_positive("z", self.z), int(self.warmup)
        if self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: pass at least 1")

    def threshold(self, norm: float) -> float:
        """The limit for an outlier, and else ``inf``. A norm that is not finite is one, beyond all others."""
        excess, allowed = norm - self._mean, self.z * self._deviation
        if len(self._first) < self.warmup or excess <= allowed:
            return math.inf
        return self._mean + (allowed * (allowed / excess) if excess < math.inf else 0.0)

    def _note(self, norm: float, limit: float) -> None:
        if len(self._first) < self.warmup:
            self._first.append(norm)
            count = len(self._first)
            self._mean = sum(first / count for first in self._first)
            self._deviation = math.hypot(*(first - self._mean for first in self._first)) / math.sqrt(count)
            return
        norm = min(norm, limit)
        self._mean = self.alpha * self._mean + (1.0 - self.alpha) * norm
        # The root of the variance's formula, without squares that may overflow.
        self._deviation = math.hypot(math.sqrt(self.alpha) * self._deviation, math.sqrt(1.0 - self.alpha) * (norm - self._mean))


@dataclass(eq=False)
class AdaGC(Policy):
    r"""AdaGC: each tensor is clipped to a moving average of its own norm.

    .. math:: g_i \leftarrow h_i\, g_i, \qquad h_i = \min\Big(1, \frac{\lambda \gamma_i}{\|g_i\|}\Big), \qquad
        \gamma_i \leftarrow \beta \gamma_i + (1 - \beta)\, h_i \|g_i\|

    In the first steps all are clipped together, to a limit :math:`\lambda_\text{abs}` of the norm of all, and :math:`\gamma_i` is the least
    norm of tensor i after that. A tensor of zeros is passed over, as it would keep its limit at 0 for good; one that has its first gradient
    after those steps begins with its norm. All norms come from one read, and what is not clipped is not written.

    Args:
        relative: λ > 0.
        absolute: The limit :math:`\lambda_\text{abs}` ≥ 0 of the first steps, in the unit of the gradient.
        beta: β, above 0 and below 1.
        warmup: How many steps come first, at least 0.

    Raises:
        ValueError: A number is out of its range.

    References:
        Wang et al.: AdaGC: Enhancing LLM pretraining stability via adaptive gradient clipping, 2025 (arXiv 2502.11034).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> policy = AdaGC(relative=1.5, absolute=2.0, beta=0.5, warmup=1)
        >>> for gradient in ([3.0, 4.0], [3.0, 4.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     print(policy.clip_([("weight", weight)]).coefficients, policy.state_dict()["norms"])
        {'weight': 0.4} {'weight': 2.0}
        {'weight': 0.6} {'weight': 2.5}
    """

    relative: float = 1.05
    absolute: float = 1.0
    beta: float = 0.98
    warmup: int = 100
    _steps: int = field(init=False, repr=False, default=0)
    _norms: dict[str, float] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.relative, self.absolute = check_positive("relative", self.relative), check_not_negative("absolute", self.absolute)
        self.beta, self.warmup = _check_share("beta", self.beta), int(self.warmup)
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}: pass a number that is not negative")

    def clip_(self, parameters: torch.nn.Module | Parameters | Iterable[tuple[str, torch.nn.Parameter]]) -> Clipped:
        """Clip the gradients in place, and note their norms.

        Args:
            parameters: A module, parameters, or pairs of name and parameter, as for :func:`normclip.grad_stats`. Norms are remembered by
                name, so give them in the same way each time; without names by their position.

        Returns:
            As :func:`normclip.clip_grads_`, with ``stats.per_tensor``. Each tensor is a group: ``coefficients`` has that of each.

        Raises:
            TypeError: As for :func:`normclip.clip_grad_norm_`.
            ValueError: A gradient cannot be written, or two parameters have one name. Nothing has changed.
        """
        taken, names = take_grads(parameters, writable=True)
        if len(set(names)) != len(names):
            raise ValueError("two parameters have the same name: pass each with a name of its own")
        stats, _, _ = measure(taken, names, per_tensor=True, orders=(), groups=None)
        assert stats.per_tensor is not None
        norms = dict(zip(names, stats.per_tensor.l2.tolist(), strict=True))

        first, together = self._steps < self.warmup, Hard(self.absolute).multiplier(stats.l2)
        coefficients = {}
        for name, norm in norms.items():
            before = self._norms.get(name, math.inf)
            coefficient = coefficients[name] = together if first else Hard(self.relative * before).multiplier(norm)
            clipped = coefficient * norm
            if not 0.0 < clipped < math.inf:
                continue
            if first or before == math.inf:
                self._norms[name] = min(before, clipped)
            else:
                self._norms[name] = self.beta * before + (1.0 - self.beta) * clipped
        self._steps += 1
        if any(coefficient != 1.0 for coefficient in coefficients.values()):
            mark_written(taken.scale_each_([None if coefficients[name] == 1.0 else coefficients[name] for name in names]))
        return Clipped(
            norm=stats.l2,
            coefficient=together if first else 1.0,
            coefficients=coefficients,
            stats=stats,
            found_inf=stats.nans + stats.infs > 0,  # on any rank
            skipped=False,
        )


@dataclass(eq=False)
class AGC(Policy):
    r"""Adaptive gradient clipping by units: the gradient of each is limited in proportion to its weights. It remembers nothing.

    .. math:: g_u \leftarrow g_u \cdot \min\Big(1, \frac{\lambda \max(\|W_u\|, \varepsilon)}{\|g_u\|}\Big)

    A unit is what belongs to one index of the first dimension: an output of a linear layer or a convolution, a row of an embedding, but an
    input of a transposed convolution. Biases and other tensors with one dimension or none are units as a whole. The last layer is best left
    out, as the authors do.

    This reads weights and gradients once more, with torch's operations. On a device nothing waits, but version counters rise with every
    call.

    Args:
        clip: λ ≥ 0.
        eps: ε > 0, the norm that units of smaller weights are taken to have.

    Raises:
        ValueError: A number is out of its range.

    References:
        Brock, De, Smith, Simonyan: High-performance large-scale image recognition without normalization, 2021 (arXiv 2102.06171).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
        >>> weight.grad = torch.tensor([[0.6, 0.8], [0.3, 0.4]])
        >>> AGC(clip=0.01).clip_([weight])
        >>> weight.grad
        tensor([[0.0300, 0.0400],
                [0.3000, 0.4000]])
    """

    clip: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        self.clip, self.eps = check_not_negative("clip", self.clip), check_positive("eps", self.eps)

    def clip_(self, parameters: torch.nn.Module | Parameters | Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Clip the gradients in place.

        Args:
            parameters: A module, parameters, or pairs of name and parameter; those without a gradient are passed over.

        Raises:
            TypeError: As for :func:`normclip.clip_grad_norm_`, or a gradient is sparse.
            ValueError: A gradient cannot be written. Nothing has changed.
        """
        import torch

        pairs = named(parameters)
        given = {id(parameter): (name, parameter) for name, parameter in pairs if parameter.grad is not None}
        collect_grads([parameter for _, parameter in given.values()], writable=True)
        for name, parameter in given.values():
            if parameter.grad.layout != torch.strided:
                raise TypeError(f"the gradient of parameter {name} is sparse: leave it out, or make it dense")
        for _, parameter in given.values():
            weight, gradient = (torch.view_as_real(x) if x.is_complex() else x for x in (parameter.detach(), parameter.grad.detach()))
            limits, norms = (_unit_norms(x, whole=parameter.ndim <= 1) for x in (weight, gradient))
            limits = self.clip * limits.clamp(min=self.eps)
            within = norms <= limits
            if not gradient.is_cpu or not bool(within.all()):
                gradient.mul_(torch.where(within, 1.0, limits / norms).to(torch.promote_types(gradient.dtype, torch.float32)))


def _unit_norms(x: torch.Tensor, *, whole: bool) -> torch.Tensor:
    """The norm of each unit, in the shape that broadcasts; in float64, where the device has it."""
    import torch

    wide = torch.float32 if x.device.type == "mps" else torch.float64
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=tuple(range(0 if whole else 1, x.ndim)), keepdim=True, dtype=wide)
    return norms


def _check_share(name: str, value: float) -> float:
    value = float(value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is {value}: pass a number above 0 and below 1")
    return value
