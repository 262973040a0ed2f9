"""Arrows point down: the imports of all modules, in Python and in Rust, against the layers that the documentation draws."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "normclip"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def drawn(rows: list[str]) -> dict[str, int]:
    """The height of each name in rows of names, top row first; text after two blanks is description."""
    heights = {}
    for height, row in enumerate(reversed(rows)):
        for name in re.split(r"\s*·\s*", re.split(r"(?<=\S)\s{2,}(?!·)", row.strip())[0]):
            if name:
                heights[name.strip().rstrip("/")] = height
    return heights


def layers() -> dict[str, int]:
    """The layers of the package, from the diagram in ARCHITECTURE.md."""
    section = ARCHITECTURE.split("## The layers")[1]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    rows: list[str] = []
    for line in lines:
        if line.strip().startswith("·"):
            rows[-1] = re.split(r"(?<=\S)\s{2,}", rows[-1].strip())[0] + " " + line.strip()
        else:
            rows.append(line)
    return drawn(rows)


def backends() -> dict[str, int]:
    """The order of the modules in `_backends`, from the table in ARCHITECTURE.md."""
    section = ARCHITECTURE.split("### `python/normclip/_backends`")[1].split("###")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return drawn([" · ".join(re.findall(r"`([\w/]+)`", row)) for row in rows])


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, by its path below it: `clip`, `_backends.shards`, `optim` for a package itself."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "__main__":
            yield name, path


def imported(path: Path) -> set[str]:
    """What a module imports of the package, wherever in the file, and for types alone too."""
    known = {name for name, _ in modules()} | {"_core"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            inside = name.removeprefix("normclip.") if name.startswith("normclip.") else None
            while inside and inside not in known:
                inside = inside.rpartition(".")[0]  # from the module, not the module
            if inside:
                found.add(inside)
    return found


GRAPH = {name: imported(path) - {name} for name, path in modules()}
LAYERS, BACKENDS = layers(), backends()


def test_diagrams_name_what_there_is() -> None:
    tops = {name.partition(".")[0] for name, _ in modules()}
    assert tops == {name for name in LAYERS if not name.startswith("rust")}
    assert {name.split(".")[1] for name in GRAPH if name.startswith("_backends.")} == BACKENDS.keys() - {"__init__"}


@pytest.mark.parametrize("module", GRAPH)
def test_modules_import_what_stands_below_them(module: str) -> None:
    top, _, part = module.partition(".")
    for other in GRAPH[module]:
        other_top, _, other_part = other.partition(".")
        if other_top == "_core":
            continue
        if top != other_top:
            assert LAYERS[other_top] <= LAYERS[top], f"{module} imports {other}, which stands above it"
        elif top == "_backends" and part and other_part:
            lower, own = other_part.partition(".")[0], part.partition(".")[0]
            assert lower == own or BACKENDS[lower] < BACKENDS[own], f"{module} imports {other}, which does not stand below it"


def test_python_has_no_circles() -> None:
    # A package's own `__init__` imports its parts; that they are inside it is no import.
    list(TopologicalSorter(GRAPH).static_order())


def crate(source: Path) -> tuple[dict[str, int], dict[str, set[str]]]:
    """The diagram of a crate's lib.rs, and what each of its modules uses."""
    text = (source / "lib.rs").read_text(encoding="utf-8")
    block = text.split("//! ```text\n")[1].split("//! ```")[0]
    heights = drawn([re.sub(r"\s{2,}\S.*$", "", line.removeprefix("//!").strip()) for line in block.splitlines()])
    uses: dict[str, set[str]] = {}
    for path in sorted(source.rglob("*.rs")):
        module = path.relative_to(source).parts[0].removesuffix(".rs")
        if module in ("lib", "main"):
            continue
        code = path.read_text(encoding="utf-8").split("#[cfg(test)]")[0]
        code = re.sub(r"//.*", "", code)
        uses.setdefault(module, set()).update(set(re.findall(r"\bcrate::(\w+)", code)) - {module})
    return heights, uses


@pytest.mark.parametrize("name", ["core", "bindings"])
def test_rust_modules_use_what_stands_below_them(name: str) -> None:
    heights, uses = crate(ROOT / "rust" / name / "src")
    assert uses.keys() == heights.keys(), "the diagram names what there is"
    wrong = [f"{module} uses {other}" for module, others in uses.items() for other in others if heights[other] >= heights[module]]
    assert not wrong
