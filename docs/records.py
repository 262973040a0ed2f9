"""What the recorded runs say, as Markdown and pictures: for the pages of benchmarks and studies, and for README.md.

`docs/conf.py` puts it into the pages when they are built. `python docs/records.py` writes README.md's table and figure anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

from normclip.bench.figure import BESIDE, draw
from normclip.bench.measure import Row
from normclip.bench.report import QUIET, Report, duration, error_text, ratio_text, share_text, short_dtype
from normclip.studies import NAMES
from normclip.studies.claims import Judged, Verdict
from normclip.studies.report import Report as Study

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benches" / "records"
PICTURES = ROOT / "build" / "pictures"
README, FIGURE = ROOT / "README.md", RECORDS / "bench.svg"
DRAWN = 6
"""How many rows of README.md's table its figure shows."""

VERDICTS: tuple[Verdict, ...] = ("holds", "partly", "does not hold", "undecided")


def benchmarks() -> dict[str, Report]:
    """The recorded runs of `normclip bench` by the names of their files, the newest first."""
    found = {}
    for path in RECORDS.glob("*.json"):
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain.get("command", "").startswith("normclip bench"):
            found[path.name] = Report(**{**plain, "rows": tuple(Row.from_dict(row) for row in plain["rows"])})
    return dict(sorted(found.items(), key=lambda item: item[1].date, reverse=True))


def studies() -> dict[str, Study]:
    """The recorded studies by their names, in the order of `normclip study all`."""
    paths = {name: RECORDS / "studies" / f"{name}.json" for name in NAMES}
    return {name: Study.from_json(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def key(row: Row) -> tuple[str, str]:
    """What a row of a table begins with."""
    return f"{row.workload} {short_dtype(row.dtype)}", row.operation


def short_line(row: Row) -> str:
    """A row of README.md's table."""
    speed = row.in_training
    times = [duration(speed.torch_ms), duration(speed.normclip_ms), ratio_text(speed.ratio)]
    return _line(*key(row), *times, error_text(row.torch_error), error_text(row.normclip_error))


def long_line(row: Row) -> str:
    """A row of the page's table."""
    speed = row.in_training
    times = [duration(speed.torch_ms), duration(speed.normclip_ms), ratio_text(speed.ratio), ratio_text(row.back_to_back.ratio)]
    errors = [error_text(row.torch_error), error_text(row.normclip_error)]
    return _line(*key(row), *times, share_text(speed.read_share), *errors)


def benchmarks_page() -> str:
    """A section for each recorded run."""
    return "\n".join(line for name, report in benchmarks().items() for line in _benchmark(name, report))


def studies_page() -> str:
    """A table of all studies, and a section for each."""
    found = studies()
    lines = [_line("study", "subject", *VERDICTS), "|---|---|--:|--:|--:|--:|"]
    for name, study in found.items():
        verdicts = [claim.verdict for claim in study.judged()]
        lines.append(_line(f"[{name}](#{name})", study.title, *[str(verdicts.count(verdict) or "") for verdict in VERDICTS]))
    if missing := [f"`{name}`" for name in NAMES if name not in found]:
        lines += ["", f"No run of {', '.join(missing)} is recorded yet."]
    return "\n".join([*lines, *(line for name, study in found.items() for line in _study(name, study))])


def readme(text: str, report: Report) -> str:
    """README.md with the figures of this run in its table."""
    rows = {key(row): short_line(row) for row in report.rows}
    return re.sub(r"^\| ([^|\n]+) \| ([^|\n]+) \| [\d.]+ [mµ]s \|.*$", lambda line: rows[line[1], line[2]], text, flags=re.M)


def drawn(text: str, report: Report) -> Report:
    """The run with the rows that README.md's figure shows: the first of its table."""
    rows = {short_line(row): row for row in report.rows}
    shown = [rows[line] for line in text.splitlines() if line in rows]
    return dataclasses.replace(report, rows=tuple(shown[:DRAWN]))


def _benchmark(name: str, report: Report) -> Iterator[str]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    picture = f"{Path(name).stem}.svg"
    draw(report, PICTURES / picture)
    cores = f"{report.cores} cores, {report.threads} threads, {report.isa.upper()}"
    bandwidth = "" if report.read_gb_per_s is None else f" It reads {report.read_gb_per_s:.1f} GB/s."
    yield f"\n## {report.cpu}, {report.cores} cores\n"
    yield f"`{report.command}` on {report.date[:10]}: {cores}; torch {report.torch}, Python {report.python}.{bandwidth}"
    if report.other_load is None:
        yield "How much other programs used the machine meanwhile is not known."
    else:
        warning = " Do not rely on these times." if report.other_load > QUIET else ""
        yield f"Other programs used {report.other_load:.1%} of its CPU time meanwhile.{warning}"
    ratios = [row.in_training.ratio for row in report.rows if not BESIDE.get(row.operation, "").startswith("normclip")]
    losses = sum(ratio < 1.0 for ratio in ratios)
    yield f"normclip is slower in {losses} of the {len(ratios)} rows that compare with torch. {_download('All figures', RECORDS / name)}."
    yield f"\n![Speed and error beside torch](../build/pictures/{picture})\n"
    yield "```{rst-class} wide\n```\n"
    yield _line("gradients", "call", "torch", "normclip", "faster", "back to back", "share of a read", "torch's error", "normclip's error")
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    yield from (long_line(row).replace(" ms", "\u00a0ms").replace(" µs", "\u00a0µs") for row in report.rows)
    yield ""


def _study(name: str, study: Study) -> Iterator[str]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    study.draw(PICTURES / f"{name}.svg")
    record = RECORDS / "studies" / f"{name}.json"
    plain = json.loads(record.read_text(encoding="utf-8"))
    seeds = ", ".join(map(str, study.options.seeds))
    machine = f"{study.cpu_seconds:.0f} s of CPU time on {plain['cpu']}, {plain['cores']} cores, with torch {plain['torch']}"
    yield f"\n## {name}\n\n{study.title[0].upper()}{study.title[1:]}. {study.findings.setting()}"
    if study.options.quick:
        yield "\n**A quick run: its figures mean little.**"
    yield f"\n![{study.title}](../build/pictures/{name}.svg)\n"
    yield _line("claim", "theory predicts", "measured: median (range over seeds)", "verdict")
    yield "|---|---|---|---|"
    judged = study.judged()
    yield from (_line(claim.claim, claim.predicted, claim.measured, claim.verdict) for claim in judged)
    yield f"\nSeeds {seeds}; {machine}, on {plain['date'][:10]}. {_download('All figures and criteria', record)}. Claims are from:\n"
    yield from (f"- {source}: {names}" for source, names in _sources(judged).items())


def _sources(judged: list[Judged]) -> dict[str, str]:
    """By their sources, the numbers of the claims."""
    found: dict[str, list[str]] = {}
    for number, claim in enumerate(judged, 1):
        found.setdefault(claim.source, []).append(str(number))
    return {source: f"claim{'s' * (len(numbers) > 1)} {', '.join(numbers)}" for source, numbers in found.items()}


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _download(text: str, path: Path) -> str:
    return f"{{download}}`{text} <../{path.relative_to(ROOT).as_posix()}>`"


if __name__ == "__main__":
    report = next(iter(benchmarks().values()))
    README.write_text(readme(README.read_text(encoding="utf-8"), report), encoding="utf-8")
    draw(drawn(README.read_text(encoding="utf-8"), report), FIGURE)
