"""README.md's table and figure of speed and error, and the page of benchmarks, have the figures of the recorded run."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import records

from normclip.bench import workloads
from normclip.bench.report import Report, duration, ratio_text

README = records.README.read_text(encoding="utf-8")


@pytest.fixture
def record() -> Report:
    (name,) = re.findall(r"\(benches/records/(\S+\.json)\)", README)
    assert name == next(iter(records.benchmarks())), "README.md is of an older run: python docs/records.py"
    return records.benchmarks()[name]


def test_readme_shows_what_was_recorded(record: Report) -> None:
    recorded = list(map(records.short_line, record.rows))
    shown = re.findall(r"^\| .*[mµ]s \| .*×.*\|$", README, re.MULTILINE)
    assert len(shown) == 10
    assert [row for row in shown if row not in recorded] == []
    assert records.readme(README, record) == README, "python docs/records.py"


def test_readme_shows_losses(record: Report) -> None:
    assert any(row.in_training.ratio < 1.0 for row in record.rows if records.short_line(row) in README)


def test_the_figure_is_of_the_same_run(record: Report) -> None:
    shown = [element.text for element in ElementTree.parse(records.FIGURE).iter("{http://www.w3.org/2000/svg}text")]
    rows = records.drawn(README, record).rows
    assert len(rows) == records.DRAWN
    for row in rows:
        speed = row.in_training
        for text in (row.operation, ratio_text(speed.ratio), f"{duration(speed.torch_ms)} → {duration(speed.normclip_ms)}"):
            assert text in shown, "python docs/records.py"


def test_stale_figures_are_replaced(record: Report) -> None:
    line = records.short_line(record.rows[0])
    gradients, call = records.key(record.rows[0])
    assert records.readme(f"| {gradients} | {call} | 1.0 ms | 2 µs | 0.5× | 0 | 0 |\n", record) == f"{line}\n"


def test_the_page_shows_all_rows(record: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PICTURES", tmp_path)
    page = records.benchmarks_page().replace("\u00a0", " ")
    assert [row for row in record.rows if records.long_line(row) not in page] == []
    for picture in re.findall(r"\(\.\./build/pictures/(.+)\)", page):
        assert (tmp_path / picture).stat().st_size > 0


@pytest.mark.parametrize(("load", "said"), [(None, "is not known"), (0.5, "Do not rely on these times"), (0.0, "0.0% of its CPU time")])
def test_the_page_says_what_else_the_machine_did(
    load: float | None, said: str, record: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: dict[str, Any] = {**vars(record), "other_load": load, "rows": record.rows[:2]}
    monkeypatch.setattr(records, "PICTURES", tmp_path)
    monkeypatch.setattr(records, "benchmarks", lambda: {"2000-01-01-machine.json": Report(**changed)})
    assert said in records.benchmarks_page()


def test_the_page_counts_losses_to_torch_alone(record: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PICTURES", tmp_path)
    beside_itself = {operation.label for operation in workloads._NORMCLIP_BESIDE_ITSELF}
    ratios = [row.in_training.ratio for row in record.rows if row.operation not in beside_itself]
    said = f"slower in {sum(ratio < 1.0 for ratio in ratios)} of the {len(ratios)} rows"
    assert said in records.benchmarks_page()
