r"""Clip rules: from the norm n of a gradient to the coefficient that the gradient is multiplied by.

Rules are small frozen values. :func:`normclip.clip_`, :func:`normclip.clip_grad_norm_`, :func:`normclip.clip_grads_` and
:class:`normclip.optim.ClippedSGD` take any of them; a plain number means :class:`Hard`.

    >>> rule = Soft(1.0)
    >>> rule.coefficient(1.0)
    0.5
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from normclip._arguments import check_limit, check_not_negative, check_positive
from normclip._backends import hard_coefficient
from normclip._formulas import Fraction, Scalar, evaluate


class Rule(ABC):
    """From a norm to a coefficient. A norm of NaN gives NaN, unless there is no limit at all."""

    @abstractmethod
    def coefficient(self, norm: Scalar) -> Scalar:
        """What a gradient of this norm is multiplied by.

        Args:
            norm: The norm n ≥ 0, in the unit of the gradient's elements. NaN gives NaN.

        Returns:
            The coefficient, of the type, precision and device of ``norm``. Nothing waits for a device.
        """

    @abstractmethod
    def multiplier(self, norm: Scalar) -> Scalar:
        """What clipping multiplies a gradient of this norm by: the coefficient, but 1 where that is infinite or the norm 0.

        Args:
            norm: As for :meth:`coefficient`.

        Returns:
            As :meth:`coefficient`.
        """

    @contextmanager
    def applying(self, norm: Scalar) -> Iterator[Scalar]:
        """The multiplier, to multiply by it meanwhile. A rule that remembers notes the norm at the end, and nothing if that raises.

        Args:
            norm: As for :meth:`coefficient`.

        Yields:
            As :meth:`multiplier` returns.
        """
        yield self.multiplier(norm)

    @property
    def writes(self) -> bool:
        """Whether any gradient is changed by it."""
        return True


class Formula(Rule):
    """A rule without a memory. Subclasses write the formula once, for floats, NumPy and torch."""

    def coefficient(self, norm: Scalar) -> Scalar:
        """As for any rule."""
        return evaluate(lambda xp, n: self._spread(xp, n, self._formula(xp, n)), norm)

    def multiplier(self, norm: Scalar) -> Scalar:
        """As for any rule."""

        def formula(xp: Any, n: Any) -> Any:
            coefficient = self._of_norm(xp, n)
            return self._spread(xp, n, xp.where((n == 0.0) | (coefficient == math.inf), 1.0, coefficient))

        return evaluate(formula, norm)

    def _spread(self, xp: Any, n: Any, found: Any) -> Any:
        """NaN where the norm is NaN, whatever the formula makes of it: some compare, or leave out the norm."""
        return xp.where(n == n, found, n) if self.writes else found

    @abstractmethod
    def _formula(self, xp: Any, n: Any) -> Any:
        """The coefficient by the functions of `xp`, which are numpy's or torch's."""

    def _of_norm(self, xp: Any, n: Any) -> Any:
        return self._formula(xp, n)


def as_rule(name: str, rule: Rule | float) -> Rule:
    """The rule itself, or hard clipping to a number.

    Raises:
        TypeError, ValueError: It is neither, or the number is negative or NaN.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise TypeError(f"{name} is the class {rule.__name__}: pass an object of it, {rule.__name__}(...)")
    return Hard(check_limit(name, rule))


@dataclass(frozen=True)
class Hard(Formula):
    r"""Hard clipping: a norm above γ becomes γ.

    .. math:: c(n) = \min\Big(1, \frac{\gamma}{n}\Big)

    Attributes:
        max_norm: The limit γ ≥ 0; ``inf`` clips nothing.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013 (arXiv 1211.5063).

    Example:
        >>> Hard(1.0).coefficient(5.0)
        0.2
    """

    max_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", check_limit("max_norm", self.max_norm))

    @property
    def writes(self) -> bool:
        """False for a limit of ``inf``."""
        return self.max_norm < math.inf

    def _formula(self, xp: Any, n: Any) -> Any:
        return hard_coefficient(self.max_norm, n)


@dataclass(frozen=True)
class Soft(Formula):
    r"""Soft clipping: norms are mapped smoothly to [0, γ).

    .. math:: c(n) = \frac{\gamma}{n + \gamma}

    Between half of hard clipping and hard clipping; exactly half of it at n = γ.

    Attributes:
        max_norm: The bound γ > 0 of the norm afterwards.

    Raises:
        ValueError: ``max_norm`` is not positive and finite.

    References:
        Zhang, He, Sra, Jadbabaie: Why gradient clipping accelerates training, 2020 (arXiv 1905.11881), section 5;
        Su: kexue.fm/archives/7469.

    Example:
        >>> Soft(1.0).coefficient(3.0)
        0.25
    """

    max_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", check_positive("max_norm", self.max_norm))

    def _formula(self, xp: Any, n: Any) -> Any:
        return Fraction(self.max_norm, self.max_norm, 1.0).at(xp, n)


@dataclass(frozen=True)
class Normalize(Formula):
    r"""Normalized gradients: every norm becomes γ, or with β > 0 tends to 0 with the gradient.

    .. math:: c(n) = \frac{\gamma}{n + \beta}

    Gradient descent with it is normalized gradient descent (NGD) of step :math:`\eta_n = \eta\gamma`.
    It makes small gradients larger, where clipping leaves them alone. A gradient of zeros stays.

    Attributes:
        norm: The norm γ > 0 afterwards.
        beta: β ≥ 0, in the unit of the norm.

    Raises:
        ValueError: ``norm`` is not positive and finite, or ``beta`` negative or not finite.

    References:
        Zhang, He, Sra, Jadbabaie: Why gradient clipping accelerates training, 2020 (arXiv 1905.11881), equation 6.

    Example:
        >>> Normalize(1.0).coefficient(0.25)
        4.0
    """

    norm: float
    beta: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_positive("norm", self.norm))
        object.__setattr__(self, "beta", check_not_negative("beta", self.beta))

    def _formula(self, xp: Any, n: Any) -> Any:
        return Fraction(self.norm, self.beta, 1.0).at(xp, n)


@dataclass(frozen=True)
class Smoothness(Formula):
    r"""The step that an (L0, L1)-smooth function allows, whatever the learning rate η.

    .. math:: c(n) = \frac{1}{\eta\,(L_0 + L_1 n)}, \qquad
        c_\text{exact}(n) = \frac{1}{\eta L_1 n} \ln\Big(1 + \frac{L_1 n}{L_0 + L_1 n}\Big)

    so that gradient descent with η takes the step 1/(L0 + L1·n). With η = 1/L0 and γ = L0/L1 the first is soft clipping. The second
    minimizes the exact bound on the descent; it tends to 1/(η L0) as n → 0. A learning rate that changes has to change in both places.

    Attributes:
        L0: L0 > 0, the curvature where the gradient vanishes.
        L1: L1 ≥ 0, its growth with the norm of the gradient.
        lr: The learning rate η > 0 of the optimizer.
        exact: Take the second formula.

    Raises:
        ValueError: A number is out of its range.

    References:
        Zhang, He, Sra, Jadbabaie: Why gradient clipping accelerates training, 2020 (arXiv 1905.11881);
        Vankov, Rodomanov, Nedich, Sankar, Stich: Optimizing (L0, L1)-smooth functions by gradient methods, 2024 (arXiv 2410.10800).

    Example:
        >>> step = Smoothness(L0=16.0, L1=1.0, lr=1.0).coefficient(4000.0)
        >>> round(step, 12)
        0.000249003984
    """

    L0: float
    L1: float
    lr: float
    exact: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "L0", check_positive("L0", self.L0))
        object.__setattr__(self, "L1", check_not_negative("L1", self.L1))
        object.__setattr__(self, "lr", check_positive("lr", self.lr))

    def _formula(self, xp: Any, n: Any) -> Any:
        fraction = Fraction(1.0, self.L0, self.L1, self.lr)
        coefficient = fraction.at(xp, n)
        if not self.exact:
            return coefficient
        # ln(1 + r)/(L1 n) = ln(1 + r)/r · 1/(L0 + L1 n) with r = L1 n/(L0 + L1 n), whose limits are 0, where the factor is 1, and 1.
        ratio = fraction.share(xp, n)
        return coefficient * xp.where(ratio == 0.0, 1.0, xp.log1p(ratio) / ratio)


@dataclass(frozen=True)
class DescentLimit(Formula):
    r"""A limit T on the descent that a step predicts: u·g for the update u and the gradient g, times the learning rate.

    .. math:: c = \min\Big(1, \frac{T}{u \cdot g}\Big)

    is what to multiply the learning rate by. Where u·g is not positive it is 1: no descent is predicted, none is limited. NaN gives NaN, as
    for all rules. Clipping takes u = g, as in SGD, hence u·g = n². The length of SGD's step, η·min(n, T/n), is not monotone then: it is
    largest, η√T, at n = √T.

    Attributes:
        limit: T > 0, in the unit of the loss per unit of the learning rate.

    Raises:
        ValueError: ``limit`` is not positive and finite.

    References:
        Su: kexue.fm/archives/10657.

    Example:
        >>> rule = DescentLimit(0.5)
        >>> rule.coefficient(2.0), rule.coefficient(-1.0)
        (0.25, 1.0)
        >>> rule.multiplier(2.0)  # of a norm of 2, whose u·g is 4
        0.125
    """

    limit: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_positive("limit", self.limit))

    def coefficient(self, descent: Scalar) -> Scalar:
        """What to multiply the learning rate by.

        Args:
            descent: u·g, as from :func:`normclip.dot`.

        Returns:
            The coefficient, of the type, precision and device of ``descent``. Nothing waits for a device.
        """
        return super().coefficient(descent)

    def _formula(self, xp: Any, n: Any) -> Any:
        return xp.where(n > self.limit, self.limit / n, 1.0)

    def _of_norm(self, xp: Any, n: Any) -> Any:
        # Without squares, which overflow where the quotients do not.
        return xp.where(self.limit / n < n, self.limit / n / n, 1.0)
