"""What the documentation shows does what it says: README.md and the examples of docstrings."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import normclip
from support.frameworks import LIGHTNINGS_WARNINGS

README = Path(__file__).parent.parent / "README.md"


def python_blocks() -> list[str]:
    """The blocks of Python in README.md, each after as many empty lines as stand before it, so that errors point to its lines."""
    text = README.read_text(encoding="utf-8")
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
def test_readme(session: None) -> None:
    """All blocks in order: later ones may use what earlier ones have defined."""
    blocks = python_blocks()
    assert blocks, "README.md shows no Python"
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        if ">>>" in block:
            example = doctest.DocTestParser().get_doctest(block, names, "README.md", str(README), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(example, clear_globs=False)
            assert runner.summarize(verbose=False).failed == 0
            names = example.globs
        else:
            exec(compile(block, str(README), "exec"), names)


NAMES = ("clip", "clip_grads", "distributed", "norms", "optim.sgd", "patch", "products", "statistics")
MODULES = [f"normclip.{name}" for name in NAMES] + [f"normclip.monitor.{name}" for name in ("monitor", "plot", "sinks")]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, session: None) -> None:
    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


def test_every_function_has_an_example() -> None:
    for name in normclip.__all__:
        function = getattr(normclip, name)
        if inspect.isfunction(function) and function.__module__ in MODULES:
            assert doctest.DocTestFinder().find(function)[0].examples, name
