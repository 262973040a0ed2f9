"""Clip rules: from the norm n of a gradient to the coefficient that the gradient is multiplied by.

Rules are small frozen values. :func:`normclip.clip_`, :func:`normclip.clip_grad_norm_`, :func:`normclip.clip_grads_`,
:class:`normclip.monitor.GradMonitor` and the optimizers of :mod:`normclip.optim` take any of them; a plain number means :class:`Hard`.
:class:`Least` combines several, and a subclass of :class:`Formula` is a rule of your own.

    >>> rule = Soft(1.0)
    >>> rule.coefficient(1.0)
    0.5
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from normclip._arguments import check_limit, check_not_negative, check_positive, check_smoothness
from normclip._backends import hard_coefficient
from normclip._formulas import Fraction, evaluate, least
from normclip.typing import Scalar

__all__ = ["DescentLimit", "Formula", "Hard", "Least", "Normalize", "Rule", "Smoothness", "Soft", "as_rule"]


class Rule(ABC):
    """A function from a norm to a coefficient. A norm of NaN gives NaN, except for a rule that never changes a gradient."""

    @abstractmethod
    def coefficient(self, norm: Scalar) -> Scalar:
        """What a gradient of this norm is multiplied by.

        Args:
            norm: The norm n ≥ 0, in the unit of the gradient's elements. NaN gives NaN.

        Returns:
            The coefficient, of the type, precision and device of ``norm``. Does not wait for a device.
        """

    @abstractmethod
    def multiplier(self, norm: Scalar) -> Scalar:
        """What clipping multiplies a gradient of this norm by: the coefficient, or 1 if the coefficient is infinite or the norm 0.

        Args:
            norm: As for :meth:`coefficient`.

        Returns:
            As :meth:`coefficient`.
        """

    @contextmanager
    def applying(self, norm: Scalar) -> Iterator[Scalar]:
        """A context manager that yields the multiplier. The gradients are to be multiplied by it in the ``with`` block.

        A rule that follows training records the norm when the block ends, and does not if the block raises.

        Args:
            norm: As for :meth:`coefficient`.

        Yields:
            As :meth:`multiplier` returns.
        """
        yield self.multiplier(norm)

    @property
    def writes(self) -> bool:
        """Whether the rule can change a gradient. If not, gradients need not be writable."""
        return True


class Formula(Rule):
    """A rule whose coefficient depends on the norm alone. For a rule of your own, write its formula in a subclass, once for all numbers.

    What the rule needs besides comes from here: conversion to float64 and back to the type of the norm, NaN for a norm of NaN, and a
    gradient of zeros that is left unchanged.

    Example:
        Clipping that starts at the limit γ and grows slowly beyond it, to √(γn) instead of γ:

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Root(Formula):
        ...     max_norm: float
        ...
        ...     def formula(self, xp, n):
        ...         return xp.where(n > self.max_norm, xp.sqrt(self.max_norm / n), 1.0)
        >>> Root(1.0).coefficient(4.0)
        0.5
        >>> import numpy as np
        >>> from normclip import clip_
        >>> gradient = np.array([24.0, 32.0])
        >>> clip_(gradient, Root(2.5)), gradient
        (40.0, array([6., 8.]))
    """

    @abstractmethod
    def formula(self, xp: Any, n: Any) -> Any:
        """The coefficient of a norm.

        Args:
            xp: ``numpy`` or ``torch``: the module whose functions, such as ``where``, ``sqrt`` and ``log1p``, work on ``n``.
            n: The norm n ≥ 0 in float64: a NumPy scalar, or a torch tensor, of which an ``if`` would wait for its device. So choose by
                ``xp.where``. A quotient by 0 is infinite, and does not warn.

        Returns:
            The coefficient, of the type of ``n``, or a plain number. (If the method returns nothing, clipping raises a ``TypeError``.)
        """

    def coefficient(self, norm: Scalar) -> Scalar:
        """What a gradient of this norm is multiplied by: see :meth:`Rule.coefficient`."""
        return evaluate(lambda xp, n: self._spread(xp, n, self._returned(xp, n)), norm)

    def multiplier(self, norm: Scalar) -> Scalar:
        """What clipping multiplies a gradient of this norm by: see :meth:`Rule.multiplier`."""

        def formula(xp: Any, n: Any) -> Any:
            coefficient = self._of_norm(xp, n)
            return self._spread(xp, n, xp.where((n == 0.0) | (coefficient == math.inf), 1.0, coefficient))

        return evaluate(formula, norm)

    def _spread(self, xp: Any, n: Any, found: Any) -> Any:
        """NaN where the norm is NaN, else ``found``. Formulas that compare the norm or do not depend on it would lose the NaN."""
        return xp.where(n == n, found, n) if self.writes else found

    def _of_norm(self, xp: Any, n: Any) -> Any:
        """The coefficient for a gradient of norm n, if the argument of the formula is not the norm."""
        return self._returned(xp, n)

    def _returned(self, xp: Any, n: Any) -> Any:
        found = self.formula(xp, n)
        if found is None:  # of which NumPy would make NaN
            raise TypeError(f"{type(self).__name__}.formula has returned None: return the coefficient")
        return xp.full_like(n, found) if type(found) in (int, float) else found  # `where` of plain numbers alone is float32 in torch


def as_rule(name: str, rule: Rule | float) -> Rule:
    """The rule itself, or for a number :class:`Hard` clipping to it.

    Raises:
        TypeError, ValueError: It is neither a rule nor a number, or the number is negative or NaN.
    """
    if type(rule) is float:  # the most frequent case first: isinstance of an abstract class takes longer
        return Hard(check_limit(name, rule))
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise TypeError(f"{name} is the class {rule.__name__}: pass an object of it, {rule.__name__}(...)")
    return Hard(check_limit(name, rule))


@dataclass(frozen=True)
class Hard(Formula):
    """Hard clipping: a norm above γ becomes γ.

        c(n) = min(1, γ / n)

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

    def formula(self, xp: Any, n: Any) -> Any:
        """The coefficient of a norm: see :meth:`Formula.formula`."""
        return hard_coefficient(self.max_norm, n)


@dataclass(frozen=True)
class Soft(Formula):
    """Soft clipping: norms are mapped smoothly to [0, γ).

        c(n) = γ / (n + γ)

    The coefficient lies between half of that of hard clipping and that itself; it is exactly half of it at n = γ.

    Attributes:
        max_norm: The bound γ > 0 on the norm after clipping.

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

    def formula(self, xp: Any, n: Any) -> Any:
        """The coefficient of a norm: see :meth:`Formula.formula`."""
        return Fraction(self.max_norm, self.max_norm, 1.0).at(xp, n)


@dataclass(frozen=True)
class Normalize(Formula):
    """Normalized gradients: every norm n becomes γ, or with β > 0 γ·n/(n + β), which tends to 0 with n.

        c(n) = γ / (n + β)

    Gradient descent of learning rate η with this rule is normalized gradient descent (NGD) of step η·γ. Unlike clipping, the rule makes
    small gradients larger. A gradient of zeros is left unchanged.

    Attributes:
        norm: The norm γ > 0 after normalization.
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

    def formula(self, xp: Any, n: Any) -> Any:
        """The coefficient of a norm: see :meth:`Formula.formula`."""
        return Fraction(self.norm, self.beta, 1.0).at(xp, n)


@dataclass(frozen=True)
class Smoothness(Formula):
    """The step that an (L0, L1)-smooth function allows, whatever the learning rate η.

        c(n) = 1 / (η·(L0 + L1·n))

    so that gradient descent with η takes the step 1/(L0 + L1·n). With η = 1/L0 and γ = L0/L1 this is soft clipping. With ``exact=True``

        c(n) = ln(1 + L1·n / (L0 + L1·n)) / (η·L1·n)

    which minimizes the exact bound on the descent (:func:`normclip.theory.descent_bound`); it tends to 1/(η·L0) as n → 0. With L0 = 0 all
    gradients are normalized, to 1/(η·L1) or ln 2/(η·L1). If the optimizer's learning rate changes, ``lr`` must change with it.

    Attributes:
        L0: L0 ≥ 0, the bound on the curvature where the gradient is 0.
        L1: L1 ≥ 0, the growth of that bound with the norm of the gradient. One of L0 and L1 must be positive.
        lr: The learning rate η > 0 of the optimizer.
        exact: Use the second formula.

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
        L0, L1 = check_smoothness(self.L0, self.L1)
        object.__setattr__(self, "L0", L0)
        object.__setattr__(self, "L1", L1)
        object.__setattr__(self, "lr", check_positive("lr", self.lr))

    def formula(self, xp: Any, n: Any) -> Any:
        """The coefficient of a norm: see :meth:`Formula.formula`."""
        fraction = Fraction(1.0, self.L0, self.L1, self.lr)
        coefficient = fraction.at(xp, n)
        if not self.exact:
            return coefficient
        # ln(1 + r)/(L1 n) = ln(1 + r)/r · 1/(L0 + L1 n) with r = L1 n/(L0 + L1 n), between 0 and 1. For r → 0, ln(1 + r)/r → 1.
        ratio = fraction.share(xp, n)
        return coefficient * xp.where(ratio == 0.0, 1.0, xp.log1p(ratio) / ratio)


@dataclass(frozen=True)
class DescentLimit(Formula):
    """A limit T on u·g, the predicted descent of a step per unit of the learning rate, for the update u and the gradient g.

        c = min(1, T / (u·g))

    is what to multiply the learning rate by. It is 1 if u·g is not positive, as there is no predicted descent to limit. NaN gives NaN, as
    for all rules. As a clip rule it assumes u = g, as in SGD, so that u·g = n². The length of SGD's step, η·min(n, T/n), then first grows
    and then falls with n: it is largest, η√T, at n = √T.

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
            The coefficient, of the type, precision and device of ``descent``. Does not wait for a device.
        """
        return super().coefficient(descent)

    def formula(self, xp: Any, n: Any) -> Any:
        """The coefficient of a predicted descent: see :meth:`Formula.formula`."""
        return xp.where(n > self.limit, self.limit / n, 1.0)

    def _of_norm(self, xp: Any, n: Any) -> Any:
        # T/n/n rather than T/n², as n² may overflow.
        return xp.where(self.limit / n < n, self.limit / n / n, 1.0)


@dataclass(frozen=True, init=False)
class Least(Rule):
    """The smallest coefficient of several rules, such as a fixed limit and a threshold that follows training.

        c(n) = min(c₁(n), c₂(n), …)

    NaN if one of them is. Each threshold that follows training records the norm as if it were alone, once the gradients are written. Save
    its state with your checkpoint: ``rule.rules[0].state_dict()``, and so on.

    Args:
        *rules: One or more rules; a number means :class:`Hard`. An object with a memory may be given once only.

    Attributes:
        rules: The rules.

    Raises:
        TypeError: An argument is neither a rule nor a number.
        ValueError: There is no rule, the same threshold is given twice, or a number is negative or NaN.

    Example:
        >>> rule = Least(2.0, DescentLimit(4.5))
        >>> [rule.multiplier(norm) for norm in (1.0, 2.5, 3.0)]  # by neither, by the first, by the second
        [1.0, 0.72, 0.5]
    """

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule | float) -> None:
        if not rules:
            raise ValueError("there is no rule: pass one or more rules or limits")
        checked = tuple(as_rule(f"rules[{position}]", rule) for position, rule in enumerate(rules))
        for position, rule in enumerate(checked):
            if hasattr(rule, "state_dict") and any(rule is other for other in checked[:position]):
                raise ValueError(f"rules[{position}] is given twice and would record each norm twice: pass each object once")
        object.__setattr__(self, "rules", checked)

    @property
    def writes(self) -> bool:
        """Whether one of the rules can change a gradient."""
        return any(rule.writes for rule in self.rules)

    def coefficient(self, norm: Scalar) -> Scalar:
        """The smallest coefficient of the rules."""
        # The coefficient of a descent limit is of u·g, not of the norm.
        found = [rule.multiplier(norm) if isinstance(rule, DescentLimit) else rule.coefficient(norm) for rule in self.rules]
        return cast("Scalar", least(found))

    def multiplier(self, norm: Scalar) -> Scalar:
        """The smallest multiplier of the rules."""
        with self.applying(norm) as multiplier:
            return multiplier

    @contextmanager
    def applying(self, norm: Scalar) -> Iterator[Scalar]:
        """A context manager that yields the multiplier: see :meth:`Rule.applying`."""
        with ExitStack() as stack:
            yield cast("Scalar", least([stack.enter_context(rule.applying(norm)) for rule in self.rules]))
