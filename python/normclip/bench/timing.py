"""How calls are timed: in turn, in one process.

The machine drifts: frequencies, neighbours, caches. So the contenders alternate within every round and swap places
from round to round, and a ratio is taken between calls of the same round before the median over rounds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Call = Callable[[float], object]
"""One timed call. Its argument is what may differ from call to call: the limit, or the order of a norm."""


@dataclass(frozen=True)
class Budget:
    """How much time a contest may take, and how its samples are made."""

    seconds: float
    min_rounds: int = 5
    sample_ns: int = 200_000
    """Calls shorter than this are repeated within a sample, so that neither the clock nor a cold start decides."""
    max_calls: int = 50


def alternate(
    contenders: Mapping[str, Call],
    arguments: Callable[[int], Sequence[float]],
    *,
    settle: Callable[[], object],
    budget: Budget,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Time the contenders in turn, round after round.

    Args:
        contenders: the calls to time, by name.
        arguments: returns the arguments of the next n calls. Asked once a round for all contenders together, so
            that whatever it does to the caches falls to the one that goes first, which changes every round.
        settle: brings the machine into the state that a sample starts from; runs before every sample, untimed.
        budget: when to stop, and how long a sample should be.
        clock: nanoseconds, monotonic.

    Returns:
        Nanoseconds a call, one list for each contender with one entry for each round.
    """
    order = list(contenders)

    def play_round(calls: int) -> dict[str, float]:
        values = iter(arguments(calls * len(order)))
        elapsed: dict[str, float] = {}
        for name in order:
            call, own = contenders[name], [next(values) for _ in range(calls)]
            settle()
            start = clock()
            for value in own:
                call(value)
            elapsed[name] = (clock() - start) / calls
        order.reverse()
        return elapsed

    with _garbage_collection_paused():
        fastest = min(min(play_round(1).values()) for _ in range(2))  # this warms up, too
        calls = min(max(1, round(budget.sample_ns / max(1.0, fastest))), budget.max_calls)
        deadline = clock() + round(budget.seconds * 1e9)
        rounds: list[dict[str, float]] = []
        while len(rounds) < budget.min_rounds or clock() < deadline:
            rounds.append(play_round(calls))
    return {name: [elapsed[name] for elapsed in rounds] for name in contenders}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio within each round, which drift between rounds cannot reach."""
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
