"""Write THIRD-PARTY.txt: the licences of all that is linked into the wheels. `python release/licences.py`.

Linked are the crates that the bindings depend on, on any platform, and Rust's standard library with the crates that it consists of.
Where a crate offers several licences, the MIT licence is the one that is taken up.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from project import ROOT

FILE = ROOT / "THIRD-PARTY.txt"

# The crates of the standard library on Linux, macOS and Windows. Rust names them in its sysroot, to which a test compares this.
STANDARD = (
    "addr2line",
    "adler2",
    "cfg-if",
    "compiler_builtins",
    "foldhash",
    "gimli",
    "hashbrown",
    "libc",
    "memchr",
    "miniz_oxide",
    "object",
    "rustc-demangle",
    "windows-link",
)

HEAD = """\
The compiled part of normclip, normclip._core, contains the works named below, under these licences. Of works that
offer several licences, the MIT licence is taken up.
"""

RUST = """\
Copyright (c) The Rust Project Contributors

"""


def linked() -> list[tuple[str, str]]:
    """Name and version of each crate of others that the bindings link, on any platform."""
    command = "cargo tree --locked --package normclip-bindings --edges normal,no-proc-macro --target all --prefix none --format {p}"
    lines = subprocess.run(command.split(), cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    crates = {tuple(line.split()[:2]) for line in lines if not line.startswith("normclip-")}
    return sorted((name, version.removeprefix("v")) for name, version in crates)


def folders(crates: Iterable[tuple[str, str]]) -> dict[str, Path]:
    """Where cargo keeps the sources of these crates."""
    with tempfile.TemporaryDirectory() as scratch:
        manifest = Path(scratch, "Cargo.toml")
        # Two versions of a crate are two dependencies, so each has a name of its own.
        needs = "".join(f'd{index} = {{ package = "{name}", version = "{wanted}" }}\n' for index, (name, wanted) in enumerate(crates))
        manifest.write_text(
            f'[package]\nname = "scratch"\nedition = "2024"\n[lib]\npath = "lib.rs"\n[dependencies]\n{needs}', encoding="utf-8"
        )
        Path(scratch, "lib.rs").touch()
        command = ["cargo", "metadata", "--format-version", "1", "--manifest-path", str(manifest)]
        packages = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["packages"]
    return {f"{package['name']} {package['version']}": Path(package["manifest_path"]).parent for package in packages}


def licence(folder: Path) -> str:
    """The MIT licence of a crate, or what else it has for a licence."""
    texts = sorted(path for path in folder.iterdir() if re.match(r"(?i)(licen[sc]e|copying|unlicense)", path.name) and path.is_file())
    chosen = [path for path in texts if re.search(r"(?i)mit", path.name)] or texts
    if not chosen:
        raise SystemExit(f"{folder.name} has no file with its licence: see what it says of it, and add that")
    return "\n".join(path.read_text(encoding="utf-8").strip() for path in chosen) + "\n"


def section(title: str, text: str) -> str:
    """A part of the file, by whose title the test finds what is there."""
    return f"\n{'=' * 80}\n{title}\n{'=' * 80}\n\n{text}"


def main() -> None:
    """Write the file anew."""
    crates = linked()
    found = folders([(name, f"={version}") for name, version in crates])
    parts = [section(f"{name} {version}", licence(found[f"{name} {version}"])) for name, version in crates]
    standard = {
        key.split()[0]: licence(folder) for key, folder in folders((name, "*") for name in STANDARD).items() if key.split()[0] in STANDARD
    }
    mit = licence(found["pyo3 " + dict(crates)["pyo3"]])
    rust = RUST + mit[mit.index("Permission is hereby granted") :]
    parts += [section("The Rust standard library", rust)]
    parts += [section(f"{name}, in the Rust standard library", standard[name]) for name in STANDARD]
    FILE.write_text(HEAD + "".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
