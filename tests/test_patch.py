"""`patch_torch`: what it replaces, for how long, and that it leaves no trace."""

import inspect
import math
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import utils

import normclip
from normclip import patch
from normclip.monitor import GradMonitor
from support.processes import output_of

NAMES = ("clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "get_total_norm")
TORCHS = {name: getattr(utils, name) for name in NAMES}

NewModule = Callable[[str], types.ModuleType]


@pytest.fixture
def new_module(monkeypatch: pytest.MonkeyPatch) -> NewModule:
    """Makes a module of this source, under a name that `sys.modules` knows."""

    def new_module(source: str) -> types.ModuleType:
        module = types.ModuleType(f"made_for_a_test_{len(sys.modules)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(source, vars(module))
        return module

    return new_module


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    yield
    assert not patch._active
    assert {name: getattr(utils, name) for name in NAMES} == TORCHS


def weight() -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.zeros(2))
    made.grad = torch.tensor([3.0, 4.0])
    return made


def huge() -> torch.nn.Parameter:
    """Whose norm is infinite by torch's functions."""
    made = weight()
    made.grad *= 1e20
    return made


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    ours, torchs = (inspect.signature(function).parameters.values() for function in (getattr(patch, name), TORCHS[name]))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in torchs]


def test_functions_are_replaced_and_put_back(new_module: NewModule) -> None:
    before = new_module("from torch.nn.utils import clip_grad_norm_ as clip, get_total_norm")
    with normclip.patch_torch():
        after = new_module("from torch.nn.utils import clip_grad_norm_ as clip, get_total_norm")
        for name in NAMES:
            assert getattr(utils, name) is getattr(patch, name)
        assert utils.clip_grad.clip_grad_norm_ is patch.clip_grad_norm_
        for module in (before, after):
            assert module.clip is patch.clip_grad_norm_
            assert module.get_total_norm is patch.get_total_norm
    for module in (before, after):
        assert module.clip is utils.clip_grad.clip_grad_norm_ is TORCHS["clip_grad_norm_"]
        assert module.get_total_norm is TORCHS["get_total_norm"]


def test_what_they_do() -> None:
    (ours,) = [weight()]
    with normclip.patch_torch():
        assert utils.clip_grad_norm_(ours, 100.0, foreach=True).item() == 5.0
        assert utils.get_total_norm([ours.grad], norm_type=1).item() == 7.0
        assert ours.grad._version == 0, "nothing to clip, nothing written: normclip's"
        utils.clip_grads_with_norm_([ours], 1.0, torch.tensor(2.0))
        torch.testing.assert_close(ours.grad, torch.tensor([1.5, 2.0]))
        utils.clip_grad_value_(iter([ours]), 1.0)
        torch.testing.assert_close(ours.grad, torch.tensor([1.0, 1.0]))


def test_deprecated_name_goes_to_its_successor() -> None:
    with normclip.patch_torch(), pytest.warns(FutureWarning, match="deprecated"):
        assert utils.clip_grad_norm(huge(), 1.0).item() == pytest.approx(5e20)


def test_what_modules_have_from_normclip_stays(new_module: NewModule) -> None:
    module = new_module("from normclip import clip_grad_norm_")
    with normclip.patch_torch():
        pass
    assert module.clip_grad_norm_ is normclip.clip_grad_norm_ is normclip.clip.clip_grad_norm_


class Lazy(types.ModuleType):
    """As `importlib.util.LazyLoader` makes them: loaded when they are asked for an attribute. Not even the name is set before."""

    def __init__(self) -> None: ...

    def __getattribute__(self, name: str) -> Any:
        raise ImportError(f"loaded, to find {name}")


def test_modules_that_are_loaded_later_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_for_a_test_lazy", Lazy())
    with normclip.patch_torch():
        assert utils.clip_grad_norm_ is patch.clip_grad_norm_


@pytest.mark.parametrize("names", [None, types.MappingProxyType({"clip": utils.clip_grad_norm_})], ids=["none", "read-only"])
def test_modules_whose_dictionary_is_something_else(monkeypatch: pytest.MonkeyPatch, names: Any) -> None:
    """As of module classes of Python 3.10 that do not initialize."""
    odd = type("Odd", (types.ModuleType,), {"__dict__": property(lambda self: names)})
    monkeypatch.setitem(sys.modules, "made_for_a_test_odd", odd("odd"))
    with normclip.patch_torch():
        assert utils.clip_grad_norm_ is utils.clip_grad.clip_grad_norm_ is patch.clip_grad_norm_


class Modules(dict[str, Any]):
    """`sys.modules` that does something when the n-th module after one is looked through."""

    def __init__(self, at: int, then: Callable[[], None]) -> None:
        super().__init__(sys.modules)
        self.at, self.then = at, then

    def values(self) -> Any:
        for count, module in enumerate(list(super().values())):
            if count == self.at:
                self.at = -1  # once
                self.then()
            yield module


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error or Ctrl-C on the way leaves torch as it was, and with the next call all is well."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "modules", Modules(10, raise_interrupt))
        with pytest.raises(KeyboardInterrupt):
            normclip.patch_torch()
    assert {name: getattr(utils, name) for name in NAMES} == TORCHS
    made = normclip.patch_torch()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "modules", Modules(10, raise_interrupt))
        with pytest.raises(KeyboardInterrupt):
            made.undo()
    assert {name: getattr(utils, name) for name in NAMES} == TORCHS


class Names(dict[int, Any]):
    """Replacements, of which some are written when something happens."""

    then: Callable[[], None]

    def __getitem__(self, key: int) -> Any:
        self.then()
        return super().__getitem__(key)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals are POSIX's")
@pytest.mark.parametrize("handler", ["patches", "patches and undoes"])
@pytest.mark.parametrize("during", ["patching", "undoing"])
def test_signal_handlers_may_patch_and_undo(monkeypatch: pytest.MonkeyPatch, handler: str, during: str) -> None:
    """In the midst of either, where a lock is held. (Signals come between any two operations; here each time that a name is looked up.)"""
    made: list[patch.Patch] = []
    replace = patch._replace
    busy = False

    def handle(*given: Any) -> None:
        with normclip.patch_torch():
            assert utils.clip_grad_norm_ is patch.clip_grad_norm_
            assert utils.clip_grad_norm_(weight(), 1.0).item() == 5.0
        if handler == "patches":
            made.append(normclip.patch_torch())

    def signalled(replacements: dict[int, Any]) -> None:
        names = Names(replacements)
        names.then = lambda: None if busy else interrupt()
        replace(names)

    def interrupt() -> None:
        nonlocal busy
        busy = True
        signal.raise_signal(signal.SIGUSR1)
        busy = len(made) > 3

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        outer = normclip.patch_torch() if during == "undoing" else None
        monkeypatch.setattr(patch, "_replace", signalled)
        if outer is None:
            outer = normclip.patch_torch()
            assert utils.clip_grad_norm_ is utils.clip_grad.clip_grad_norm_ is patch.clip_grad_norm_
        outer.undo()
        busy = True
        assert made or handler != "patches"
        for function in (utils.clip_grad_norm_, utils.clip_grad.clip_grad_norm_):
            assert function is (patch.clip_grad_norm_ if made else TORCHS["clip_grad_norm_"])
    finally:
        busy = True
        signal.signal(signal.SIGUSR1, before)
        for each in made:
            each.undo()


def test_as_a_decorator() -> None:
    @normclip.patch_torch()
    def clip(depth: int) -> float:
        if depth:
            clip(depth - 1)
        assert utils.clip_grad_norm_ is patch.clip_grad_norm_
        return utils.clip_grad_norm_(huge(), 1.0).item()

    assert utils.clip_grad_norm_ is TORCHS["clip_grad_norm_"], "not before it is called"
    assert clip(2) == pytest.approx(5e20)
    assert clip.__name__ == "clip"
    assert utils.clip_grad_norm_ is TORCHS["clip_grad_norm_"]


def test_what_is_no_monitor_and_no_function_is_refused() -> None:
    for wrong in (torch.nn.Linear(2, 1), lambda: None, "gradients.jsonl"):
        with pytest.raises(TypeError, match=r"pass a normclip.monitor.GradMonitor"):
            normclip.patch_torch(wrong)

    async def coroutine() -> None: ...

    def generator() -> Iterator[None]:
        yield

    for function in (coroutine, generator, Lazy, 3):
        with pytest.raises(TypeError, match=r"put `with patch_torch\(\):` inside it"):
            normclip.patch_torch()(function)


def test_what_was_kept_elsewhere_is_torchs_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with normclip.patch_torch():
        kept = utils.clip_grad_norm_
        assert kept(huge(), 1.0).item() == pytest.approx(5e20)
    assert kept(huge(), max_norm=1.0).item() == math.inf, "torch's"
    monkeypatch.setattr(utils, "clip_grad_norm_", lambda *given: kept(*given))  # as others wrap it
    with normclip.patch_torch():
        assert utils.clip_grad_norm_(huge(), 1.0).item() == pytest.approx(5e20)
    assert utils.clip_grad_norm_(huge(), 1.0).item() == math.inf


def test_as_a_function() -> None:
    made = normclip.patch_torch()
    assert utils.clip_grad_norm_ is patch.clip_grad_norm_
    made.undo()
    assert utils.clip_grad_norm_ is TORCHS["clip_grad_norm_"]
    made.undo()
    with made:
        assert utils.clip_grad_norm_ is patch.clip_grad_norm_


def test_repeated_and_nested_calls_count() -> None:
    first, second = normclip.patch_torch(), normclip.patch_torch()
    with normclip.patch_torch():
        pass
    first.undo()
    first.undo()
    assert utils.clip_grad_norm_ is patch.clip_grad_norm_
    second.undo()


def test_undone_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), normclip.patch_torch():
        raise ZeroDivisionError


def test_what_others_have_replaced_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def others() -> None: ...

    with normclip.patch_torch():
        monkeypatch.setattr(utils.clip_grad, "clip_grad_value_", others)
    assert utils.clip_grad.clip_grad_value_ is others
    monkeypatch.setattr(utils.clip_grad, "clip_grad_value_", TORCHS["clip_grad_value_"])


def test_threads() -> None:
    """Each thread finds what it has asked for, whatever the others do."""
    wrong: list[Any] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(5):
            with normclip.patch_torch():
                if utils.clip_grad_norm_ is not patch.clip_grad_norm_ or utils.clip_grad_norm_(weight(), 1.0).item() != 5.0:
                    wrong.append(utils.clip_grad_norm_)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_empty_generator_is_warned_of() -> None:
    with normclip.patch_torch(), pytest.warns(UserWarning, match="empty generator") as caught:
        utils.clip_grad_norm_((parameter for parameter in []), 1.0)
    assert caught[0].filename == __file__, "it points to the caller"


def test_functions_can_be_pickled() -> None:
    with normclip.patch_torch():
        pickled = pickle.dumps(utils.clip_grad_norm_)
        assert pickle.loads(pickled) is patch.clip_grad_norm_
    program = "import pickle, torch; w = torch.ones(2); w.grad = torch.tensor([3e20, 4e20])"
    assert output_of(f"{program}; print(pickle.loads({pickled})(w, 1.0))") == "tensor(inf)\n", "where nothing is replaced, torch's"


PARAMETERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "generator": lambda model: model.parameters(),
    "iterator": lambda model: iter(list(model.parameters())),
    "alone": lambda model: model.weight,
}


@pytest.mark.parametrize("given", PARAMETERS)
def test_monitor_is_told_of_clipping(given: str) -> None:
    model, told = torch.nn.Linear(2, 1), []
    model(torch.tensor([3.0, 4.0])).sum().backward()
    expected = normclip.grad_stats(PARAMETERS[given](model)).l2
    monitor = GradMonitor(model, lambda figures, step: told.append(figures))
    with normclip.patch_torch(monitor):
        assert utils.clip_grad_norm_(PARAMETERS[given](model), 1.0).item() == pytest.approx(expected)
        utils.clip_grad_norm_([*model.parameters(), weight()], 1.0)
        utils.clip_grad_norm_([], 1.0)
    utils.clip_grad_norm_(model.parameters(), 1.0)
    assert [figures["clip/norm"] for figures in told] == [expected], "neither of others' parameters, nor when undone"


WITHOUT_TORCH = """
    import sys
    import normclip
    before = "torch" in sys.modules
    with normclip.patch_torch():
        import torch
        from torch.nn.utils import clip_grad_norm_
        assert clip_grad_norm_.__module__ == "normclip.patch"
    assert clip_grad_norm_.__module__.startswith("torch.nn.utils")
    print(before)
"""


def test_torch_is_imported_when_it_is_patched() -> None:
    assert output_of(WITHOUT_TORCH) == "False\n"
