"""A minute of fuzzing, and proof that each check can fail."""

from collections.abc import Callable, Iterator

import pytest

from fuzz.cases import Failure, draw_of, run_case
from fuzz.registry import CHECKS, Check, planted
from fuzz.run import fuzz

SEED, CASES = 1, 15_000


def test_a_minute_of_fuzzing() -> None:
    report = fuzz(SEED, cases=CASES)
    lines = [f'{failure}\nmake fuzz ARGS="--replay {SEED}:{failure.number}"' for failure in report.failures]
    assert not lines, "\n".join(lines)
    assert report.cases.total() == CASES
    assert set(report.cases) == set(CHECKS), "not every check had its turn"


def numbers_of(check: Check) -> Iterator[int]:
    return (number for number in range(1_000_000) if draw_of(SEED, number)[0] is check)


def outcome_of(number: int) -> Failure | None:
    return run_case(*draw_of(SEED, number), number)


@pytest.mark.parametrize(("name", "target"), [(name, target) for name, check in CHECKS.items() for target in check.plants])
def test_planted_bugs_are_found(name: str, target: str, set_threads: Callable[[int], None]) -> None:
    check = CHECKS[name]
    with planted(target, check.plants[target]):
        found = next((failure for _, number in zip(range(100), numbers_of(check), strict=False) if (failure := outcome_of(number))), None)
        assert found is not None, "the bug was not found in 100 cases"
        # The number alone brings it back.
        assert outcome_of(found.number) == found
    assert outcome_of(found.number) is None
