"""What a case is made of: random choices, and the state of the process in which normclip is called."""

import ctypes
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Chosen = TypeVar("Chosen")

# As <fenv.h> numbers them on x86.
ROUNDINGS = {"up": 0x800, "down": 0x400, "to zero": 0xC00}
_libm = ctypes.CDLL("libm.so.6")


class Draw:
    """Random choices that seed and number alone decide."""

    def __init__(self, seed: int, number: int) -> None:
        self._random = random.Random(f"{seed}:{number}")
        self.rng = np.random.default_rng(self._random.getrandbits(64))
        self.random = self._random.random
        self.uniform = self._random.uniform
        self.integer = self._random.randint
        self.mode = "nearest"
        """The floating-point mode of the thread that calls normclip."""
        if self.chance(0.08):
            self.mode = self.pick(["flush", "flush", *ROUNDINGS])
        self.threads = self.pick([1, 2, 3])

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, options: Sequence[Chosen]) -> Chosen:
        return self._random.choice(options)

    def shuffled(self, items: Sequence[Chosen]) -> list[Chosen]:
        return self._random.sample(items, len(items))

    def magnitude(self, low: float = -308.0, high: float = 308.0) -> float:
        """Log-uniform between two powers of ten."""
        return float(10.0 ** self.uniform(low, high))

    def size(self) -> int:
        """A length: mostly short, rarely around the borders of lanes (32), gathered parts (1024) and blocks (65 536)."""
        kind = self.random()
        if kind < 0.9:
            return self.integer(0, 9 if kind < 0.6 else 70)
        border = 32 if kind < 0.95 else 1024 if kind < 0.999 else 65_536
        return max(0, self.integer(1, 3) * border + self.integer(-2, 2))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What normclip answers in the case's floating-point mode. Oracles run outside of it."""
        if self.mode == "nearest":
            return function(*args, **kwargs)
        if self.mode == "flush":
            torch.set_flush_denormal(True)
        else:
            _libm.fesetround(ROUNDINGS[self.mode])
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_flush_denormal(False)
            _libm.fesetround(0)

    def order(self) -> float:
        """The order of a norm."""
        kind = self.random()
        if kind < 0.7:
            return self.pick([0.0, 1.0, 2.0, 2.0, math.inf])
        if kind < 0.85:
            return self.pick([-math.inf, 0.5, 1.5, 2.5, 3.0, 4.0, -1.0, -2.0])
        return self.pick([1.0, 1.0, -1.0]) * self.magnitude(-1.0, 1.5)
