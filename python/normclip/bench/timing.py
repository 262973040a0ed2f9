"""Times calls alternately, in one process.

The speed of a machine drifts with its clock frequency, other load and the state of caches. So every round times all
contenders, in an order that is reversed from round to round, and ratios are taken within a round before their median.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Budget", "Call", "alternate", "median_ratio"]

Call = Callable[[float], object]
"""A call to time. Its argument, which may differ from call to call, is the limit of clipping or the order of a norm."""


@dataclass(frozen=True)
class Budget:
    """How long to measure, and how long a sample is."""

    seconds: float
    min_rounds: int = 5
    sample_ns: int = 200_000
    """Shorter calls are repeated to make a sample of about this length, so that the clock's resolution and cold caches matter little."""
    max_calls: int = 50


def alternate(
    contenders: Mapping[str, Call],
    arguments: Callable[[int], Sequence[float]],
    *,
    before: Callable[[], object],
    budget: Budget,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Time the contenders alternately, round after round.

    Args:
        contenders: The calls to time, by name.
        arguments: Returns the arguments of the next n calls. Called once a round for all contenders, so that its
            effect on the caches is on the first contender, which is another one in the next round.
        before: Brings the machine into the state in which a sample starts. Called before every sample, untimed.
        budget: When to stop, and how long a sample should be.
        clock: A monotonic clock, in nanoseconds.

    Returns:
        For each contender, a list with the nanoseconds of one call in each round.
    """
    order = list(contenders)

    def play_round(calls: int) -> dict[str, float]:
        values = iter(arguments(calls * len(order)))
        elapsed: dict[str, float] = {}
        for name in order:
            call, own = contenders[name], [next(values) for _ in range(calls)]
            before()
            start = clock()
            for value in own:
                call(value)
            elapsed[name] = (clock() - start) / calls
        order.reverse()
        return elapsed

    with _garbage_collection_paused():
        fastest = min(min(play_round(1).values()) for _ in range(2))  # these rounds also warm up
        calls = min(max(1, round(budget.sample_ns / max(1.0, fastest))), budget.max_calls)
        deadline = clock() + round(budget.seconds * 1e9)
        rounds: list[dict[str, float]] = []
        while len(rounds) < budget.min_rounds or clock() < deadline:
            rounds.append(play_round(calls))
    return {name: [elapsed[name] for elapsed in rounds] for name in contenders}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio within each round, which drift from round to round does not affect."""
    return statistics.median(above / below for above, below in zip(numerators, denominators, strict=True))


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
