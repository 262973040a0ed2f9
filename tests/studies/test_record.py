"""README.md shows what was recorded, and what was recorded is judged as the code judges now."""

import dataclasses
import importlib
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from normclip.studies import NAMES
from normclip.studies.default_norm import DefaultNorm
from normclip.studies.descent import Descent
from normclip.studies.implicit import Implicit
from normclip.studies.lower_bound import LowerBound
from normclip.studies.report import Options, Report
from normclip.studies.separation import Separation
from normclip.studies.smoothness import Smoothness
from normclip.studies.warmup import Warmup

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "benches" / "records" / "studies"
FINDINGS = dict(zip(NAMES, (Separation, LowerBound, Smoothness, DefaultNorm, Warmup, Descent, Implicit), strict=True))


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def rebuild(kind: Any, value: Any) -> Any:
    """A value of this type from JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is float:
        return math.inf if value is None else float(value)
    if dataclasses.is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        return kind(**{field: rebuild(kinds[field], item) for field, item in value.items()})
    if origin is tuple:
        return tuple(rebuild(arguments[0], item) for item in value)
    if isinstance(kind, type) and issubclass(kind, tuple):
        return kind(*(rebuild(each, item) for each, item in zip(typing.get_type_hints(kind).values(), value, strict=True)))
    if origin is dict:
        return {arguments[0](key): rebuild(arguments[1], item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("name", NAMES)
def test_verdicts_follow_from_the_recorded_figures(name: str) -> None:
    record, module = load(name), importlib.import_module(FINDINGS[name].__module__)
    findings = rebuild(FINDINGS[name], record["data"])
    report = Report(name, module.TITLE, module.CLAIMS, findings, Options(), 0.0, 0.0, "")
    again = json.loads(report.to_json())
    for key in ("claims", "setting", "title", "data"):
        assert again[key] == record[key]


@pytest.mark.parametrize("name", NAMES)
def test_readme_lists_every_claim_with_its_verdict(name: str) -> None:
    record = load(name)
    assert record["quick"] is False
    assert record["seeds"] == [0, 1, 2]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for claim in record["claims"]:
        assert f"| {claim['claim']} | {claim['predicted']} | {claim['measured']} | {claim['verdict']} |" in readme


def test_a_study_takes_at_most_ten_minutes_on_two_cores() -> None:
    assert max(load(name)["cpu_seconds"] for name in NAMES) <= 2 * 600.0


def test_readme_shows_the_plot_of_the_record() -> None:
    assert "(benches/records/studies/smoothness.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (RECORDS / "smoothness.svg").stat().st_size < 200_000
