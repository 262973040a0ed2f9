"""The checks, and how each is shown to fail: by the bug that is planted for it."""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fuzz.draw import Draw

Plant = Callable[[Any], Any]
"""From a function of normclip to one with a bug."""


class Mismatch(AssertionError):  # noqa: N818 (it says what is the case)
    """normclip and an oracle differ."""


@dataclass(frozen=True)
class Check:
    """One kind of case."""

    name: str
    area: str
    weight: float
    run: Callable[[Draw], None]
    plants: dict[str, Plant]


CHECKS: dict[str, Check] = {}


def check(area: str, *, weight: float, plants: dict[str, Plant]) -> Callable[[Callable[[Draw], None]], Callable[[Draw], None]]:
    """Register a check. `plants` names functions, below the package, and the bug that each has to be found with."""

    def register(run: Callable[[Draw], None]) -> Callable[[Draw], None]:
        name = run.__name__
        CHECKS[name] = Check(name, area, weight, run, plants)
        return run

    return register


def load() -> dict[str, Check]:
    """All checks."""
    for module in ("changing", "dlpack", "measuring", "optimizing", "refusing", "ruling", "sharing"):
        importlib.import_module(f"fuzz.checks.{module}")
    return CHECKS


def expect(condition: Any, message: str) -> None:
    """Fail with a message unless the condition holds."""
    if not condition:
        raise Mismatch(message)


REFUSALS = (TypeError, ValueError, BufferError, MemoryError)
"""What input that cannot be taken may be answered with."""


def expect_refusal(what: str, call: Callable[[], Any]) -> None:
    """Fail unless the call is refused. Other exceptions than `REFUSALS` pass through, and are failures."""
    try:
        found = call()
    except REFUSALS:
        return
    raise Mismatch(f"{what} was accepted, with the result {found!r}")


@contextmanager
def planted(target: str, plant: Plant) -> Iterator[None]:
    """Put a bug into normclip meanwhile."""
    path, _, name = f"normclip.{target}".rpartition(".")
    owner: Any = importlib.import_module("normclip")
    for part in path.split(".")[1:]:
        owner = getattr(owner, part)
    with patch.object(owner, name, plant(getattr(owner, name))):
        yield


# ---- Bugs to plant ----


def off_by_1e9(function: Any) -> Any:
    """Results that are wrong in the ninth digit."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return _off(function(*args, **kwargs))

    return wrong


def _off(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return torch.nextafter(found, torch.full_like(found, math.inf)) * (1 + 1e-6)
    if isinstance(found, float):
        return found * (1 + 1e-9)
    return type(found)(*map(_off, found))


def then_nudge(function: Any) -> Any:
    """Functions that also change an element of the first tensor that they can write to."""

    def wrong(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = list(tensors)
        nudge(tensors)
        return function(tensors, *args, **kwargs)

    return wrong


def nudge(tensors: list[Any]) -> None:
    """Change an element of the first tensor that has one and can be written."""
    for item in tensors:
        grad = getattr(item, "grad", None)
        tensor = item if grad is None else grad
        if isinstance(tensor, np.ndarray):
            fits = tensor.flags.writeable and tensor.dtype.kind in "fc"
        else:
            fits = isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        if fits and 0 not in tensor.shape:
            first = (0,) * tensor.ndim
            with torch.no_grad():
                tensor[first] = 2.0 if tensor[first] == 1.0 else 1.0
            return


def swallow(function: Any) -> Any:
    """Functions that refuse nothing."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            return None

    return wrong
