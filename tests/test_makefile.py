"""`make install` where Python makes virtual environments without pip, as Debian's does until python3-venv is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"

# Stands in for Python: `-m venv` makes an environment of which this script is the interpreter, with pip where the file `has-pip` is.
PYTHON = """#!/bin/sh
here=$(dirname "$0")
for folder; do :; done
case "$2 $3" in
    "venv "*)
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python"
        test -e has-pip && touch "$folder/bin/pip" || { echo "ensurepip is not available"; exit 1; } ;;
    "pip --version") test -e "$here/pip" ;;
    "pip install") test -e "$here/pip" && echo "$@" >> "$here/../installed" ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None or os.name != "posix", reason="there is no make, or no shell for it")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "README.md", "THIRD-PARTY.txt", "Cargo.toml", "Cargo.lock", "rust/", "python/"):
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    (tmp_path / "stub").write_text(PYTHON, encoding="utf-8")
    (tmp_path / "stub").chmod(0o755)
    return tmp_path


def make_install(tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of a make that runs the tests
    command = ["make", "install", "PYTHON=./stub"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_nothing_is_left_behind_without_venv(tree: Path) -> None:
    run = make_install(tree)
    assert run.returncode != 0
    assert "apt-get install python3-venv" in run.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("left", ["nothing", "an environment without pip", "an environment without Python"])
def test_recovery(tree: Path, left: str) -> None:
    if left != "nothing":
        (tree / ".venv" / "bin").mkdir(parents=True)
    if left == "an environment without pip":
        shutil.copy(tree / "stub", tree / ".venv" / "bin" / "python")
    (tree / "has-pip").touch()
    run = make_install(tree)
    assert run.returncode == 0, run.stderr
    assert (tree / ".venv" / ".installed").exists()
    installed = tree / ".venv" / "installed"
    assert ".[lint]" in installed.read_text(encoding="utf-8")
    (tree / "README.md").touch()
    os.utime(tree / ".venv" / ".installed", (0, 0))
    assert make_install(tree).returncode == 0
    assert len(installed.read_text(encoding="utf-8").splitlines()) == 2, "an environment with pip was made anew"
