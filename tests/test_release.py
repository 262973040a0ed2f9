"""What makes releases: the licences of what is linked, what is looked for in wheels, tags, the smoke test, and the workflows."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import licences
import project
import pytest
import smoke
import tag
import wheels
import yaml

import normclip
from support.processes import output_of

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github" / "workflows").glob("*.yml")}

needs_cargo = pytest.mark.skipif(shutil.which("cargo") is None, reason="there is no Rust")


def titles() -> list[str]:
    """The works that THIRD-PARTY.txt has licences of."""
    text = licences.FILE.read_text(encoding="utf-8")
    return re.findall(r"^={80}\n(.+)\n={80}$", text, flags=re.M)


@needs_cargo
def test_linked_crates_have_their_licences() -> None:
    crates = licences.linked()
    assert "pyo3" in dict(crates)
    missing = {f"{name} {version}" for name, version in crates} - set(titles())
    assert not missing, "python release/licences.py writes THIRD-PARTY.txt anew"


# What is Rust's own in the folder of its libraries, or is for tests and macros.
RUST = {"alloc", "core", "getopts", "panic_abort", "panic_unwind", "proc_macro", "profiler_builtins", "rustc_literal_escaper", "std"}
RUST |= {"std_detect", "sysroot", "test", "unwind", "rustc_std_workspace_alloc", "rustc_std_workspace_core", "rustc_std_workspace_std"}


@needs_cargo
def test_crates_of_the_standard_library_have_their_licences() -> None:
    libraries = Path(wheels.rustc("--print", "sysroot"), "lib", "rustlib", wheels.host(), "lib")
    crates = {path.stem.removeprefix("lib").rpartition("-")[0] for path in libraries.glob("lib*.rlib")}
    assert "std" in crates
    known = {title.partition(",")[0].replace("-", "_") for title in titles() if title.endswith(", in the Rust standard library")}
    assert not {name for name in crates if not name.startswith("rustc_std_")} - RUST - known, "name it in release/licences.py"


def test_every_licence_has_a_text() -> None:
    parts = licences.FILE.read_text(encoding="utf-8").split("=" * 80 + "\n")[2::2]
    assert len(parts) == len(titles())
    for title, part in zip(titles(), parts, strict=True):
        assert re.search(r"Permission is (hereby )?granted|This software is provided 'as-is'", part), title


@pytest.fixture
def wheel(tmp_path: Path) -> Any:
    """Makes a wheel of these files beside its licences."""

    def make(version: str = normclip.__version__, licences: tuple[str, ...] = ("LICENSE", "THIRD-PARTY.txt"), **files: bytes) -> Path:
        path = tmp_path / f"normclip-{version}-cp310-abi3-linux_x86_64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in licences:
                archive.writestr(f"normclip-{version}.dist-info/licenses/{name}", "as is")
            for name, data in files.items():
                archive.writestr(f"normclip/{name}", data)
        return path

    return make


LIBRARY = {"_core.abi3.so": b"\x7fELF cargo/registry/src/index/pyo3/src/lib.rs rust/core/src/lib.rs"}


def test_a_sound_wheel_has_no_faults(wheel: Any) -> None:
    assert wheels.faults(wheel(**LIBRARY)) == []


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"version": "9.9.9", **LIBRARY}, "not of version"),
        ({"licences": ("LICENSE",), **LIBRARY}, "no THIRD-PARTY.txt"),
        ({"licences": ("THIRD-PARTY.txt",), **LIBRARY}, "no LICENSE"),
        ({}, "0 compiled modules"),
        ({"_core.abi3.so": b"/home/ann/.cargo/registry/src/pyo3/src/lib.rs"}, "names folders"),
        ({"_core.pyd": rb"C:\Users\ann\x.pdb"}, "names folders"),
        ({"_core.abi3.so": b"/builds/.cargo/registry/src/pyo3/src/lib.rs"}, "names folders"),
        ({**LIBRARY, "sbom.json": f"file://{ROOT}/rust".encode()}, "sbom.json names folders"),
    ],
)
def test_faults_of_wheels_are_found(wheel: Any, options: dict[str, Any], fault: str) -> None:
    (found,) = wheels.faults(wheel(**options))
    assert fault in found


@needs_cargo
def test_the_targets_that_are_built_are_installed() -> None:
    assert wheels.host() in wheels.installed()
    run = subprocess.run(
        [sys.executable, ROOT / "release" / "wheels.py", "--target", "wasm32-unknown-unknown"], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "wasm32-unknown-unknown: not built on" in run.stderr


def test_the_smoke_test_works_on_this_installation() -> None:
    assert output_of(smoke.NUMPY).startswith(f"normclip {normclip.__version__} with NumPy")
    assert output_of(smoke.TORCH).startswith(f"normclip {normclip.__version__} with torch")


def test_versions_agree() -> None:
    assert project.cargo("version") == normclip.__version__


def test_the_tag_is_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tag, "ROOT", tmp_path)
    monkeypatch.setattr(tag, "cargo", lambda key: {"version": "1.2.3"}[key])
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text("## [Unreleased]\n", encoding="utf-8")
    for wrong in ("v1.2.4", "1.2.3", "v1.2.3rc1", ""):
        assert "Cargo.toml has version 1.2.3" in (tag.refusal(wrong) or "")
    assert "CHANGELOG.md has no heading" in (tag.refusal("v1.2.3") or "")
    changes.write_text("## [Unreleased]\n\n## [1.2.3] - 2026-12-24\n", encoding="utf-8")
    assert tag.refusal("v1.2.3") is None


def test_a_wrong_tag_ends_the_workflow() -> None:
    run = subprocess.run([sys.executable, ROOT / "release" / "tag.py", "v0.0.0"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "Cargo.toml has version" in run.stderr


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_name_what_there_is(name: str) -> None:
    jobs = WORKFLOWS[name]["jobs"]
    for job in jobs.values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= jobs.keys()
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
        for step in job.get("steps", []):
            command = step.get("run", "")
            for path in re.findall(r"\b(?:release|tests|\.ci)/[\w./-]+", command):
                assert (ROOT / path).exists(), command
            for target in re.findall(r"\bmake ([a-z-]+)", command):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M), command


def test_nothing_is_published_before_all_else_has_passed() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert set(jobs["publish"]["needs"]) == jobs.keys() - {"publish"}
    for name in ("sdist", "wheel", "musl"):
        commands = [step.get("run", "") for step in jobs[name]["steps"]]
        tried = [index for index, command in enumerate(commands) if "release/smoke.py" in command or "release/wheels.py" in command]
        uploaded = [index for index, step in enumerate(jobs[name]["steps"]) if "upload" in step.get("uses", "")]
        assert tried
        assert max(tried) < min(uploaded)


def test_ci_has_the_oldest_rust_and_every_python() -> None:
    (rust,) = [step["with"] for step in WORKFLOWS["ci"]["jobs"]["oldest-rust"]["steps"] if "toolchain" in step.get("with", {})]
    assert rust["toolchain"] == project.cargo("rust-version")
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert WORKFLOWS["ci"]["jobs"]["check"]["strategy"]["matrix"]["python"] == pythons
