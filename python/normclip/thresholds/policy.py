"""Base classes of policies: a state that can be saved and loaded and, for rules, the recording of the norm of each step."""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from normclip._formulas import Scalar
from normclip.rules import Hard, Rule


class Policy:
    """A clipping method with a state. Subclasses are dataclasses.

    Their fields with ``init=False`` are the state. Each has a function ``check`` in its metadata, which gets the policy and a loaded value
    and returns the value to store, in plain numbers. It raises ``ValueError`` if no such policy could have saved the value.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint, without the arguments that the policy was constructed with."""
        return {name: copy.deepcopy(getattr(self, f"_{name}")) for name in self._checks()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that :meth:`state_dict` has returned.

        Raises:
            ValueError: ``state`` is not the state of such a policy. Nothing has changed.
        """
        checks = self._checks()
        if not isinstance(state, Mapping):
            raise ValueError(f"the state is a {type(state).__name__}: load what state_dict() has returned")
        if set(state) != set(checks):
            raise ValueError(
                f"the state has {sorted(map(str, state))} and {type(self).__name__} remembers {list(checks)}: load one of its own"
            )
        found = {name: self._checked(name, check, state[name]) for name, check in checks.items()}
        for name, value in found.items():
            setattr(self, f"_{name}", value)

    def _checked(self, name: str, check: Callable[[Any, Any], Any], value: Any) -> Any:
        try:
            return check(self, value)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name} in the state {error}: load one that {type(self).__name__} has saved. Nothing has changed") from None

    def _checks(self) -> dict[str, Callable[[Any, Any], Any]]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name[1:]: field.metadata["check"] for field in fields if not field.init}


class Threshold(Policy, Rule):
    r"""Hard clipping to a limit γ that depends on the norms of earlier steps: :math:`c(n) = \min(1, \gamma/n)`.

    ``applying``, which clipping functions use once a step, records the norm when the gradients have been written. ``multiplier`` and
    ``observe`` record it at once; ``coefficient`` and ``threshold`` do not record it. All of them wait for the device of the norm.
    """

    max_norm = math.inf
    """The limit of the latest step; ``inf`` before the first step and where there was none."""

    @abstractmethod
    def threshold(self, norm: float) -> float:
        """The limit for a gradient of this norm; ``inf`` if it is not to be clipped."""

    def observe(self, norm: float) -> float:
        """Record the norm of a step, if it is finite, and return the limit for it.

        Raises:
            ValueError: The norm is negative.
        """
        with self.applying(float(norm)):
            pass
        return self.max_norm

    def coefficient(self, norm: Scalar) -> Scalar:
        """As for any rule."""
        return Hard(self.threshold(float(norm))).coefficient(norm)

    def multiplier(self, norm: Scalar) -> Scalar:
        """As for any rule. Records the norm."""
        with self.applying(norm) as multiplier:
            return multiplier

    @contextmanager
    def applying(self, norm: Scalar) -> Iterator[Scalar]:
        """As for any rule.

        Raises:
            ValueError: The norm is negative.
        """
        value = float(norm)
        if value < 0.0:
            raise ValueError(f"norm is {value}: a norm is not negative")
        limit = self.threshold(value)
        yield Hard(limit).multiplier(norm)
        self.max_norm = limit
        if math.isfinite(value):
            self._note(value, limit)

    @abstractmethod
    def _note(self, norm: float, limit: float) -> None: ...


def as_norm(_: Policy, value: Any) -> float:
    """A check for a loaded value: a finite norm."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= float(value) < math.inf:
        raise ValueError(f"holds {value!r}, where a norm is a finite number that is not negative")
    return float(value)


def as_norms(policy: Policy, value: Any) -> list[float]:
    """A check for a loaded value: a list of finite norms."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"is a {type(value).__name__}, not a list")
    return [as_norm(policy, norm) for norm in value]


def check_share(name: str, value: float) -> float:
    """A number between 0 and 1, exclusive, as a float.

    Raises:
        ValueError: It is not between 0 and 1.
    """
    value = float(value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is {value}: pass a number above 0 and below 1")
    return value
