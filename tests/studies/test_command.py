"""`normclip study` as a person starts it."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest

from normclip.cli import _Results, main
from normclip.studies import NAMES
from normclip.studies.claims import Verdict

KEYS = {
    *("study", "title", "setting", "claims", "data", "quick", "seeds", "seconds", "cpu_seconds"),
    *("cpu", "cores", "normclip", "torch", "numpy", "python", "date", "command"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run of all studies."""
    folder = tmp_path_factory.mktemp("runs") / "studies"
    command = [sys.executable, "-m", "normclip", "study", "all", "--quick", "--seed", "3", "--out", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    (folder / "stdout").write_text(run.stdout, encoding="utf-8")
    return folder


def load(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_json_says_what_was_claimed_and_what_was_found(folder: Path, name: str) -> None:
    report = load(folder, name)
    assert set(report) == KEYS
    assert report["study"] == name
    assert report["quick"] is True
    assert report["seeds"] == [3]
    assert report["command"].startswith("normclip study all --quick --seed 3")
    assert report["data"]
    assert report["claims"]
    for claim in report["claims"]:
        assert set(claim) == {"name", "claim", "source", "predicted", "measured", "figures", "criterion", "verdict"}
        assert all(claim.values())
        assert claim["verdict"] in get_args(Verdict)
        assert claim["verdict"] == "undecided"  # by one seed


@pytest.mark.parametrize("name", NAMES)
def test_plot_is_an_svg_with_text(folder: Path, name: str) -> None:
    root = ElementTree.parse(folder / f"{name}.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", NAMES)
def test_terminal_shows_predictions_beside_measurements(folder: Path, name: str) -> None:
    printed = (folder / "stdout").read_text(encoding="utf-8")
    report = load(folder, name)
    assert f"{name}: {report['title']}" in printed
    assert "theory predicts" in printed
    for claim in report["claims"]:
        assert claim["claim"].split()[0] in printed
        assert claim["verdict"] in printed


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", "lower-bound", "--quick"]) == 0
    assert "theorem 4" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_png(tmp_path: Path) -> None:
    assert main(["study", "lower-bound", "--quick", "--out", str(tmp_path), "--format", "png"]) == 0
    assert (tmp_path / "lower-bound.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_counted_from_the_first(tmp_path: Path) -> None:
    def seeds(*arguments: str) -> list[int]:
        assert main(["study", "implicit", "--quick", "--out", str(tmp_path), *arguments]) == 0
        found: list[int] = load(tmp_path, "implicit")["seeds"]
        return found

    assert seeds() == [0]
    assert seeds("--seeds", "2", "--seed", "5") == [5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seperation"], "invalid choice"),
        ([], "NAME"),
        (["separation", "--out", "taken"], "cannot be made a folder"),
        (["separation", "--seed", "one"], "invalid int value"),
        (["separation", "--seeds", "0"], "'0' is not a whole number above 0"),
        (["separation", "--seeds", "two"], "'two' is not a whole number above 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["study", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_extras_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("normclip.cli.find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(SystemExit) as stopped:
        main(["study", "separation"])
    assert stopped.value.code == 2
    assert "matplotlib not installed; run: pip install 'normclip[cli]'" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to offer")
def test_full_disk_and_ascii(tmp_path: Path) -> None:
    """Neither loses what goes elsewhere, nor what can be said."""
    (tmp_path / "lower-bound.json").symlink_to("/dev/full")
    command = [sys.executable, "-m", "normclip", "study", "lower-bound", "--quick", "--out", str(tmp_path)]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, capture_output=True, text=True, encoding="ascii", timeout=300, check=False, env=ascii_only)
    said = f"normclip study: cannot write {tmp_path / 'lower-bound.json'}: No space left on device"
    assert run.returncode == 1
    assert run.stderr.strip() == said
    assert "theorem 4" in run.stdout
    assert (tmp_path / "lower-bound.svg").stat().st_size > 0
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, encoding="utf-8", timeout=300, check=False)
    assert run.returncode == 1
    assert run.stderr.split("\n")[-3:-1] == [said, "normclip study: cannot write standard output: No space left on device"]


def test_a_reader_that_leaves_loses_nobody_elses_files(tmp_path: Path) -> None:
    """As `normclip study all | head -1` does."""
    program = """
        import os, sys
        from types import SimpleNamespace
        from normclip import studies
        from normclip.cli import main

        class Report:
            def __init__(self, name): self.name = name
            def to_json(self): return self.name
            def draw(self, path): path.write_text(self.name)
            def print(self, console): console.print("printed " * 10_000)

        asked = []
        def study(name, options, command):
            asked.append(name)
            return Report(name)

        studies.study = study
        status = main(["study", "all", *sys.argv[1:]])
        sys.stderr.write(f"{status} {len(asked)}")
    """
    for arguments, expected in (["--out", str(tmp_path)], len(NAMES)), ([], 1):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
        run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
        os.close(write)
        assert run.returncode == 0
        assert run.stderr.strip() == f"0 {expected}"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{name}.{suffix}" for name in NAMES for suffix in ("json", "svg"))


@pytest.mark.skipif(os.name != "posix", reason="links are for administrators here")
def test_a_file_that_cannot_be_written_whole_is_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link = tmp_path / "old.json", tmp_path / "link.json"
    path.write_text("old", encoding="utf-8")
    link.symlink_to(path)

    def fill_the_disk(path: Path) -> None:
        path.write_text("half of the", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    results = _Results("study")
    for name in (path, tmp_path / "new.json"):
        results.write(name, fill_the_disk)
    assert results.status == 1
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert path.read_text(encoding="utf-8") == "old"
    assert sorted(tmp_path.iterdir()) == [link, path]
    results.write(link, lambda path: path.write_text("new", encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == "new"
    assert link.is_symlink()
