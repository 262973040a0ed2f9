"""Make the source distribution, and from it the wheels that this machine can build; look into them, and try those that run here.

`python release/wheels.py [--target TRIPLE ...] [--out dist] [--without-torch]`. The wheels are for the Python that runs this: CPython's
stable ABI, or the free-threaded Python of its version. On Linux, Zig links, so that the wheels run with glibc 2.17 or later.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from project import ROOT, cargo
from smoke import smoke

# What is built on a kind of machine, and the oldest system that it is for.
PLATFORMS = {
    "linux": {
        "-unknown-linux-gnu": ["--zig", "--compatibility", "manylinux2014"],
        "-unknown-linux-musl": ["--zig", "--compatibility", "musllinux_1_2"],
    },
    "darwin": {"-apple-darwin": []},
    "win32": {"-pc-windows-msvc": []},
}

# Folders of people and of build machines, as they come to stand in compiled code.
FOLDERS = re.compile(rb"/home/|/root/|/Users/|[A-Z]:[\\/]Users[\\/]|\.cargo[\\/]|\.rustup[\\/]")


def rustc(*arguments: str) -> str:
    """What rustc prints."""
    return subprocess.run(["rustc", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def host() -> str:
    """The target of this machine."""
    return re.findall(r"^host: (.*)$", rustc("-vV"), flags=re.M)[0]


def flags(triple: str) -> list[str] | None:
    """How maturin builds for a target on this kind of machine; None where it cannot."""
    return next((flags for ending, flags in PLATFORMS[sys.platform].items() if triple.endswith(ending)), None)


def installed() -> list[str]:
    """The targets of the installed toolchain that can be built here."""
    libraries = Path(rustc("--print", "sysroot"), "lib", "rustlib").glob("*/lib")
    return sorted(library.parent.name for library in libraries if flags(library.parent.name) is not None)


def environment() -> dict[str, str]:
    """The environment of builds: compiled code names the sources of crates, but not where they lie on this machine."""
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    names = {home: "cargo", Path(rustc("--print", "sysroot")): "rust"}  # this package's own are relative
    remapped = "\x1f".join(f"--remap-path-prefix={folder}={name}" for folder, name in names.items())
    return os.environ | {
        "CARGO_ENCODED_RUSTFLAGS": remapped,
        "CARGO_TARGET_DIR": str(ROOT / "target" / "wheels"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # maturin asks the first python3 there for Zig
    }


def maturin(*arguments: str | Path, cwd: Path) -> None:
    """Call the maturin of this environment in a folder."""
    subprocess.run([sys.executable, "-m", "maturin", *arguments], check=True, cwd=cwd, env=environment())


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel: its version, licences that it lacks, folders of this machine that it names."""
    found = []
    if not wheel.name.startswith(f"normclip-{cargo('version')}-"):
        found.append(f"it is not of version {cargo('version')}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licences = {name.partition(".dist-info/licenses/")[2] for name in names}
        found += [f"it has no {licence}" for licence in ("LICENSE", "THIRD-PARTY.txt") if licence not in licences]
        compiled = [name for name in names if re.search(r"/_core\.[^/]*(so|pyd)$", name)]
        if len(compiled) != 1:
            found.append(f"it has {len(compiled)} compiled modules, not one")
        elsewhere = [str(folder).encode() for folder in {ROOT, Path.home(), Path(tempfile.gettempdir())} if len(folder.parts) > 1]
        for name in names:
            data = archive.read(name)
            paths = [folder for folder in elsewhere if folder + b"/" in data or folder + b"\\" in data]
            if name in compiled:
                paths += FOLDERS.findall(data)
            if paths:
                found.append(f"{name} names folders of the machine that built it: {sorted(set(paths))}")
    return found


def build(source: Path, triple: str, out: Path) -> Path:
    """The wheel for a target, from the unpacked source distribution."""
    with tempfile.TemporaryDirectory() as fresh:
        # This Python is of the host's system; for another, the stable ABI needs no Python.
        python = ["--interpreter", sys.executable] if triple == host() else []
        options = ["--release", "--locked", "--target", triple, *(flags(triple) or []), *python, "--out", fresh]
        maturin("build", *options, cwd=source)
        (wheel,) = Path(fresh).glob("*.whl")
        if found := faults(wheel):
            raise SystemExit(f"{wheel.name}: " + "; ".join(found))
        return Path(shutil.move(wheel, out / wheel.name))


def main() -> None:
    """Build, look, and try."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", help="a target of rustc; default: all that are installed and can be built here")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--without-torch", action="store_true", help="try wheels with NumPy alone")
    arguments = parser.parse_args()
    targets = arguments.target or installed()
    if unknown := [triple for triple in targets if flags(triple) is None]:
        raise SystemExit(f"{', '.join(unknown)}: not built on {sys.platform}, but on its own kind of machine")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    maturin("sdist", "--out", out, cwd=ROOT)
    name = f"normclip-{cargo('version')}"
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(out / f"{name}.tar.gz", folder)
        wheels = {triple: build(Path(folder, name), triple, out) for triple in targets}
    for triple, wheel in wheels.items():
        if triple == host():
            smoke(wheel, torch=not arguments.without_torch)
            verdict = "works"
        else:
            verdict = "built; it does not run here"
        sys.stdout.write(f"{wheel.name}: {verdict}\n")


if __name__ == "__main__":
    main()
