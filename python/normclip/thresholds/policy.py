"""What all policies have: a state that is saved and loaded, and for rules the norm that is noted at each step."""

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
    """What all policies have.

    The fields that it is not constructed with are what it remembers. Each has a check in its metadata: from the policy and a value that is
    loaded to what is kept, in plain numbers. It raises ``ValueError`` about a value that no such policy has saved.
    """

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, for a checkpoint. Its constants are no part of that."""
        return {name: copy.deepcopy(getattr(self, f"_{name}")) for name in self._checks()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: It is not the state of such a policy. Nothing has changed.
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
    r"""Hard clipping to a limit γ that depends on the norms before: :math:`c(n) = \min(1, \gamma/n)`.

    ``applying``, which clipping goes through once a step, notes the norm when all is written, as ``multiplier`` and ``observe`` do at once;
    ``coefficient`` and ``threshold`` only tell. For a norm on a device all of them wait for it.
    """

    max_norm = math.inf
    """The limit of the latest step."""

    @abstractmethod
    def threshold(self, norm: float) -> float:
        """The limit for a gradient of this norm; ``inf`` for none."""

    def observe(self, norm: float) -> float:
        """The limit for a gradient of this norm, which is noted if it is finite.

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
        """As for any rule, and notes the norm."""
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
    """A check: a norm that is finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= float(value) < math.inf:
        raise ValueError(f"holds {value!r}, where a norm is a finite number that is not negative")
    return float(value)


def as_norms(policy: Policy, value: Any) -> list[float]:
    """A check: a list of them."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"is a {type(value).__name__}, not a list")
    return [as_norm(policy, norm) for norm in value]


def check_share(name: str, value: float) -> float:
    """A number between 0 and 1 as a float.

    Raises:
        ValueError: It is not.
    """
    value = float(value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is {value}: pass a number above 0 and below 1")
    return value
