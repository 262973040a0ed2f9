"""README.md shows what was recorded, and what was recorded is judged as the code judges now."""

import dataclasses
import importlib
import json
import math
import re
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
RECORDED = [name for name in NAMES if (RECORDS / f"{name}.json").exists()]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
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


@pytest.mark.parametrize("name", RECORDED)
def test_verdicts_follow_from_the_recorded_figures(name: str) -> None:
    record, module = load(name), importlib.import_module(FINDINGS[name].__module__)
    findings = rebuild(FINDINGS[name], record["data"])
    report = Report(name, module.TITLE, module.CLAIMS, findings, Options(), 0.0, 0.0, "")
    again = json.loads(report.to_json())
    for key in ("claims", "setting", "title", "data"):
        assert again[key] == record[key]


@pytest.mark.parametrize("name", RECORDED)
def test_readme_lists_every_claim_with_its_verdict(name: str) -> None:
    record = load(name)
    assert record["quick"] is False
    assert record["seeds"] == [0, 1, 2]
    for claim in record["claims"]:
        assert f"| {claim['claim']} | {claim['predicted']} | {claim['measured']} | {claim['verdict']} |" in README


def test_readme_says_which_studies_have_no_record() -> None:
    told = re.search(r"No run of (.+?) is recorded yet", README)
    assert re.findall(r"`([\w-]+)`", told[1] if told else "") == [name for name in NAMES if name not in RECORDED]


def test_readme_says_what_remains_of_smoothness() -> None:
    verdicts = {claim["name"]: claim["verdict"] for claim in load("smoothness")["claims"]}
    assert {verdicts[name] for name in ("secant, clipped", "secant, plain")} <= {"partly", "holds"}
    assert {verdicts[name] for name in ("hessian, clipped", "hessian, plain", "bound")} == {"undecided"}
    assert "For the norm of the Hessian itself, and for a bound L0 + L1·n that is closer than a constant, the seeds disagree." in README


def test_a_study_takes_at_most_ten_minutes_on_two_cores() -> None:
    assert max(load(name)["cpu_seconds"] for name in RECORDED) <= 2 * 600.0


def test_readme_shows_the_plot_of_the_record() -> None:
    assert "(benches/records/studies/smoothness.svg)" in README
    assert (RECORDS / "smoothness.svg").stat().st_size < 200_000
