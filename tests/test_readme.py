"""What the documentation shows does what it says: README.md, the pages of docs/ and the examples of docstrings."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import normclip
from support.frameworks import LIGHTNINGS_WARNINGS

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python in a page, each after as many empty lines as stand before it, so that errors point to its lines."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, fence.start(1)) + fence[1] for fence in fences]


@pytest.fixture
def session(set_threads: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place where examples may write files, set threads, seed torch and form a group of one process."""
    monkeypatch.chdir(tmp_path)
    # As torchrun sets them for one process; the system chooses the port.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)


@pytest.mark.filterwarnings(*LIGHTNINGS_WARNINGS)
@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if name == "README.md" or python_blocks(path)])
def test_pages(page: str, session: None) -> None:
    """All blocks of a page in order: later ones may use what earlier ones have defined."""
    blocks = python_blocks(PAGES[page])
    assert blocks, "README.md shows no Python"
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        if ">>>" in block:
            example = doctest.DocTestParser().get_doctest(block, names, page, str(PAGES[page]), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(example, clear_globs=False)
            assert runner.summarize(verbose=False).failed == 0
            names = example.globs
        else:
            exec(compile(block, str(PAGES[page]), "exec"), names)


NAMES = ("clip", "clip_grads", "distributed", "norms", "optim.sgd", "patch", "products", "statistics")
MODULES = [f"normclip.{name}" for name in NAMES] + [f"normclip.monitor.{name}" for name in ("monitor", "plot", "sinks", "trackers")]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, session: None) -> None:
    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


def described(page: Path) -> set[str]:
    """The names that a page of the API has Sphinx describe."""
    text = page.read_text(encoding="utf-8")
    module, names = "normclip", set()
    for directive, name, options in re.findall(r"^\.\. (\w+):: ([\w.]+)(?:\(\))?$((?:\n   :.*$)*)", text, re.MULTILINE):
        if directive in ("automodule", "currentmodule"):
            module = name
        if directive == "automodule" and ":members:" in options:
            members = importlib.import_module(name)
            public = [part for part in vars(members) if not part.startswith("_") and getattr(vars(members)[part], "__module__", "") == name]
            names |= {f"{name}.{part}" for part in getattr(members, "__all__", public)}
        elif directive.startswith("auto") and directive != "automodule":
            names.add(name if name.startswith("normclip.") else f"{module}.{name}")
    return names


PUBLIC = (
    "normclip",
    "normclip.distributed",
    "normclip.monitor",
    "normclip.optim",
    "normclip.rules",
    "normclip.theory",
    "normclip.thresholds",
)


def test_every_public_name_is_in_the_api() -> None:
    found = set().union(*(described(path) for name, path in PAGES.items() if name.startswith("docs/api/")))
    for module in (*PUBLIC, "normclip.integrations.lightning", "normclip.integrations.transformers"):
        members = importlib.import_module(module)
        own = [name for name, value in vars(members).items() if inspect.isclass(value) and value.__module__ == module]
        names = {name for name in getattr(members, "__all__", own) if not name.startswith("_")}
        assert {f"{module}.{name}" for name in names if f"{module}.{name}" not in found} == set()


def test_every_function_has_an_example() -> None:
    for name in normclip.__all__:
        function = getattr(normclip, name)
        if inspect.isfunction(function) and function.__module__ in MODULES:
            assert doctest.DocTestFinder().find(function)[0].examples, name
