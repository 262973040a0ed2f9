"""README.md's table of speed and error has the figures of the recorded run."""

import json
import re
from pathlib import Path

from normclip.bench.measure import Row
from normclip.bench.report import duration, error_text, ratio_text, share_text, short_dtype

ROOT = Path(__file__).parent.parent.parent


def line(row: Row) -> str:
    cells = [
        f"{row.workload} {short_dtype(row.dtype)}",
        row.operation,
        duration(row.in_training.torch_ms),
        duration(row.in_training.normclip_ms),
        ratio_text(row.in_training.ratio),
        share_text(row.in_training.read_share),
        ratio_text(row.back_to_back.ratio),
        error_text(row.torch_error),
        error_text(row.normclip_error),
    ]
    return f"| {' | '.join(cells)} |"


def test_the_readme_shows_what_was_recorded() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (record,) = re.findall(r"\(benches/records/(\S+\.json)\)", readme)
    recorded = [line(Row.from_dict(row)) for row in json.loads((ROOT / "benches" / "records" / record).read_text(encoding="utf-8"))["rows"]]
    shown = re.findall(r"^\| .*[mµ]s \| .*×.*\|$", readme, re.MULTILINE)
    assert len(shown) >= 20
    assert [row for row in shown if row not in recorded] == []
