"""The alternation, with a clock that only calls move."""

import gc
from collections.abc import Callable, Sequence

import pytest

from normclip.bench.timing import Budget, alternate, median_ratio


class Bench:
    """A fake clock, contenders that advance it by what they cost, and a log of all that happened."""

    def __init__(self, **costs: int) -> None:
        self.now = 0
        self.log: list[str] = []
        self.asked: list[int] = []
        self.given: list[float] = []
        self.contenders = {name: self._contender(name, cost) for name, cost in costs.items()}

    def _contender(self, name: str, cost: int) -> Callable[[float], None]:
        def call(argument: float) -> None:
            self.now += cost
            self.log.append(name)
            self.given.append(argument)

        return call

    def arguments(self, count: int) -> Sequence[float]:
        """Numbers that never repeat, so that a test sees who got which."""
        start = sum(self.asked)
        self.asked.append(count)
        self.now += 1_000_000  # untimed, so it must not show
        return [float(number) for number in range(start, start + count)]

    def before(self) -> None:
        """Work of its own, which must not show in the times either."""
        self.now += 5_000_000
        self.log.append("before")

    def alternate(self, budget: Budget) -> dict[str, list[float]]:
        """Run the contest on the fake clock."""
        return alternate(self.contenders, self.arguments, before=self.before, budget=budget, clock=lambda: self.now)


def test_every_sample_is_the_cost_of_one_call() -> None:
    bench = Bench(slow=3_000_000, fast=1_000_000)
    times = bench.alternate(Budget(seconds=0.0, min_rounds=4))
    assert times == {"slow": [3_000_000.0] * 4, "fast": [1_000_000.0] * 4}


def test_contenders_swap_places_every_round_and_each_sample_is_prepared() -> None:
    bench = Bench(a=1_000_000, b=1_000_000)
    bench.alternate(Budget(seconds=0.0, min_rounds=2))
    there_and_back = ["before", "a", "before", "b", "before", "b", "before", "a"]
    assert bench.log == there_and_back * 2  # two rounds to warm up, two that count


def test_short_calls_are_repeated_within_a_sample() -> None:
    bench = Bench(a=50_000, b=20_000)
    times = bench.alternate(Budget(seconds=0.0, min_rounds=1, sample_ns=200_000))
    assert times == {"a": [50_000.0], "b": [20_000.0]}
    assert bench.log[-22:] == ["before", *["a"] * 10, "before", *["b"] * 10]


def test_repetition_is_capped() -> None:
    bench = Bench(a=1)
    bench.alternate(Budget(seconds=0.0, min_rounds=1, max_calls=7))
    assert bench.asked == [1, 1, 7]


def test_arguments_are_drawn_once_a_round_and_handed_out_in_order() -> None:
    bench = Bench(a=100_000, b=100_000)
    bench.alternate(Budget(seconds=0.0, min_rounds=1, sample_ns=200_000))
    assert bench.asked == [2, 2, 4]
    assert bench.given == [float(number) for number in range(8)]


def test_rounds_go_on_until_time_is_up() -> None:
    bench = Bench(a=1_000_000)
    times = bench.alternate(Budget(seconds=0.07, min_rounds=2))  # 7 ms a round with its overheads
    assert len(times["a"]) == 10


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_during_calls_and_as_before_afterwards(enabled: bool) -> None:
    seen: list[bool] = []
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        alternate(
            {"a": lambda _: seen.append(gc.isenabled())},
            lambda count: [0.0] * count,
            before=lambda: None,
            budget=Budget(seconds=0.0, min_rounds=1),
        )
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen
    assert not any(seen)


def test_ratio_is_taken_within_rounds() -> None:
    # The machine becomes ten times slower in the middle of the second round. One round is spoilt, the median is not;
    # the medians on their own would say 2 : 10.
    assert median_ratio([2.0, 2.0, 20.0], [1.0, 10.0, 10.0]) == 2.0
