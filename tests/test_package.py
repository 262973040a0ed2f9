"""The package as it is installed: names, types, version, and what it needs."""

import ast
import importlib.metadata
import importlib.resources
import inspect
import re
import types
from pathlib import Path

import pytest

import normclip
from normclip import _core
from support.processes import output_of

WITHOUT_TORCH = """
    import sys
    import numpy as np
    import normclip

    array = np.array([3.0, 4.0])
    assert normclip.clip_([array], 1.0) == 5.0
    normclip.scale_(array, 2.0)
    normclip.clamp_(array, 0.5)
    assert normclip.total_norm(array, float("inf")) == 0.5
    print(sorted(name for name in sys.modules if name.partition(".")[0] in {"torch", "matplotlib", "rich"}))
"""


def test_numpy_is_enough() -> None:
    assert output_of(WITHOUT_TORCH) == "[]\n"


NO_TORCH_TO_BE_HAD = """
    import sys
    from types import SimpleNamespace
    sys.modules["torch"] = None  # importing it fails
    import importlib
    import numpy as np
    import normclip
    print(normclip.clip_([np.array([3.0, 4.0])], 1.0))
    for needs_torch in (
        lambda: normclip.get_total_norm([np.ones(1)]),
        lambda: normclip.clip_grad_norm_([SimpleNamespace(grad=np.ones(1))], 1.0),
        lambda: normclip.patch_torch(),
        lambda: importlib.import_module("normclip.optim"),
    ):
        try:
            needs_torch()
        except ImportError as error:
            print(error)
"""


def test_only_drop_ins_need_torch() -> None:
    assert output_of(NO_TORCH_TO_BE_HAD) == "5.0\n" + 4 * "this needs torch, which is not installed: pip install 'normclip[torch]'\n"


def test_torch_imported_later_is_noticed() -> None:
    program = "import normclip, torch; print(normclip.total_norm(torch.tensor([3.0, 4.0])))"
    assert output_of(program) == "tensor(5.)\n"


def test_public_names() -> None:
    public = {name for name, value in vars(normclip).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert {*public, "__version__"} - {"TYPE_CHECKING"} == set(normclip.__all__) <= set(dir(normclip))
    assert normclip.__all__ == sorted(normclip.__all__)


@pytest.mark.parametrize("name", sorted(set(normclip.__all__) - {"__version__"}))
def test_public_functions_are_documented(name: str) -> None:
    function = getattr(normclip, name)
    assert inspect.getdoc(function)
    described = inspect.getdoc(function) or ""
    if "Args:" in described:
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"^    {parameter}: ", described, re.MULTILINE), parameter


def test_version() -> None:
    assert normclip.__version__ == importlib.metadata.version("normclip")


def test_types_are_shipped() -> None:
    files = importlib.resources.files("normclip")
    assert files.joinpath("py.typed").is_file()
    stub = ast.parse(files.joinpath("_core.pyi").read_text(encoding="utf-8"))
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    declared |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    compiled = {name for name in vars(_core) if not name.startswith("_")}
    assert declared == {*compiled, "__version__"}


@pytest.mark.parametrize("kind", [_core.TensorList, _core.Moments])
def test_stub_declares_what_classes_can_do(kind: type) -> None:
    stub = ast.parse(importlib.resources.files("normclip").joinpath("_core.pyi").read_text(encoding="utf-8"))
    (declaration,) = (node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    declared = {node.name for node in declaration.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in vars(kind) if not name.startswith("_")}
    assert public == {name for name in declared if not name.startswith("_")}


def test_numpy_is_the_only_requirement() -> None:
    required = [line for line in importlib.metadata.requires("normclip") or [] if "extra ==" not in line]
    assert [re.split(r"[<>=!~ ]", line)[0] for line in required] == ["numpy"]


def test_the_oldest_versions_are_those_that_are_tested() -> None:
    required = (line.partition(";")[0].strip() for line in importlib.metadata.requires("normclip") or [])
    floors = {line.replace(">=", "==") for line in required if not line.startswith("normclip")}
    pins = (Path(__file__).parent / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert floors == {line for line in pins if not line.startswith("#")}
