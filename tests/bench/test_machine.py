"""What the report says of the machine."""

from collections.abc import Iterator
from itertools import chain, repeat

import pytest

from normclip.bench import machine


def fake(monkeypatch: pytest.MonkeyPatch, *stats: str, own: tuple[float, ...]) -> None:
    """Replace /proc and this process's clock; each list of values is read in turn."""
    lines: Iterator[str] = chain(stats, repeat(""))
    seconds = iter(own)
    monkeypatch.setattr(machine, "_read", lambda path: [next(lines)])
    monkeypatch.setattr(machine.time, "process_time", lambda: next(seconds))


def test_other_load_is_what_is_neither_idle_nor_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = "cpu  1000 0 500 4000 100 0 0 0 77 0"
    after = "cpu  1500 0 600 4300 200 0 0 0 99 0"  # 10 s: 6 busy, 4 idle or waiting
    fake(monkeypatch, before, after, own=(1.0, 5.0))
    assert machine.OtherLoad().share() == pytest.approx((6.0 - 4.0) / 10.0)


def test_other_load_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = "cpu  0 0 0 0 0 0 0 0 0 0", "cpu  100 0 0 100 0 0 0 0 0 0"
    fake(monkeypatch, before, after, own=(0.0, 1.004))  # the clocks tick differently
    assert machine.OtherLoad().share() == 0.0


def test_other_load_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: [])
    assert machine.OtherLoad().share() is None


def test_cpu_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: ["processor\t: 0", "model name\t: A CPU @ 1 GHz", "model name\t: B"])
    assert machine.cpu_model() == "A CPU @ 1 GHz"
    monkeypatch.setattr(machine, "_read", lambda path: [])
    assert machine.cpu_model()
