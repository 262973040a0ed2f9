"""normclip in place of torch's clipping functions, wherever a program has them: :func:`patch_torch`.

Arrows: sys.modules → the names that are torch's functions → the functions here, and back.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from normclip import clip, norms
from normclip._arguments import Parameters, import_torch
from normclip._core import listed

if TYPE_CHECKING:
    import torch

    from normclip.monitor import GradMonitor

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAMES = ("clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "get_total_norm")

# A signal handler may patch or undo in the midst of either. So the lock is reentrant, each change of this state is a single operation of a
# dictionary, and `_settle` may be repeated at any point.
_lock = threading.RLock()
_active: dict[Patch, None] = {}  # in the order of their beginning
_replaced: dict[str, Any] = {}  # the functions that are or were replaced last
_torchs: dict[str, Any] = {}  # those that were replaced first. Later ones may be others' wrappers of ours

ClipsByNorm = Callable[[Sequence[Any], float, float, bool], "torch.Tensor"]
# The names of a module itself, past what its class makes of attributes: some wait to be loaded until they are asked for one.
_names_of: Any = vars(types.ModuleType)["__dict__"]


class Watcher(Protocol):
    """Who is asked before torch's functions change gradients."""

    monitor: GradMonitor  # of which it alone decides what is told, whoever else has given it to `patch_torch`

    def before(self, parameters: Sequence[Any], share: bool) -> ClipsByNorm | None:
        """See gradients that are about to change; or return what does and clips from the same read, where that may be shared."""

    def after(self) -> None:
        """Know that they have changed."""


class Patch:
    """The replacement of torch's functions, made by :func:`patch_torch`, that lasts until it is undone or its ``with`` block ends.

    As long as there is another one the functions stay replaced.
    """

    def __init__(self, monitor: GradMonitor | None = None, watcher: Watcher | None = None) -> None:
        self.monitor = monitor
        self.watcher = watcher

    def __enter__(self) -> Patch:
        torch = import_torch()
        with _lock:
            if not _active:
                for name in _NAMES:
                    function = getattr(torch.nn.utils, name)
                    if function is not globals()[name]:
                        _torchs.setdefault(name, function)
                        _replaced[name] = function
            try:
                _active[self] = None
                _settle()
            except BaseException:
                self.undo()
                raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """As a decorator: torch's functions are replaced in calls of this function, and no longer outside of them."""
        self.undo()
        lasting = (inspect.isclass, inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if not callable(function) or any(lasts(function) for lasts in lasting):
            raise TypeError(f"patch_torch() cannot decorate {function!r}, only plain functions: put `with patch_torch():` inside it")

        @functools.wraps(function)
        def patched(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
            with Patch(self.monitor, self.watcher):
                return function(*arguments, **keywords)

        return patched

    def undo(self) -> None:
        """End the replacement; once it has ended this does nothing."""
        with _lock:
            try:
                _active.pop(self, None)
                _settle()
            except BaseException:  # Ctrl-C: the first one is heeded when nothing is left half done
                _active.pop(self, None)
                _settle()
                raise


def patch_torch(monitor: GradMonitor | None = None) -> Patch:
    """Put normclip in the place of ``clip_grad_norm_``, ``clip_grads_with_norm_``, ``clip_grad_value_`` and ``get_total_norm`` of torch.

    In :mod:`torch.nn.utils` and in every module that has imported one of them by name, so that Accelerate, Lightning, Transformers and
    training loops use normclip without a change. Undoing it puts torch's functions back, also in modules that were imported meanwhile. Who
    has kept a replacement elsewhere, as a default argument or in a wrapper, calls torch's function by it from then on.

    All names are replaced or, where that fails, none. As a decorator, ``@patch_torch()``, it lasts for each call of a function.

    The deprecated ``torch.nn.utils.clip_grad_norm`` calls its successor, hence normclip. Not replaced are references that are no names of
    modules (default arguments, closures, attributes of objects) and what does not go through these functions: the method
    ``clip_grad_norm_`` of ``torch.distributed.fsdp.FullyShardedDataParallel``, DeepSpeed, Megatron. Inside a function that
    :func:`torch.compile` compiles, ``clip_grad_norm_`` is an operator of the graph, and the others break it.

    Args:
        monitor: Tell it of every call of ``clip_grad_norm_`` with parameters of its model, from the same read. Of several that have
            them the first is told.

    Returns:
        What ends the replacement: by its method ``undo``, or as a context manager. Repeated and nested calls count.

    Raises:
        TypeError: ``monitor`` is something else, such as the model. Nothing is replaced.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3e20, 4e20])
        >>> with patch_torch():
        ...     torch.nn.utils.clip_grad_norm_([weight], 1.0)
        tensor(5.0000e+20)
    """
    if monitor is not None:
        from normclip.monitor import GradMonitor

        if not isinstance(monitor, GradMonitor):
            raise TypeError(
                f"monitor is a {type(monitor).__name__}: pass a normclip.monitor.GradMonitor, or nothing; "
                "a decorator is written @patch_torch()"
            )
    return Patch(monitor).__enter__()


def tells(monitor: GradMonitor) -> bool:
    """Whether this monitor was given to :func:`patch_torch`."""
    return any(patch.monitor is monitor for patch in tuple(_active))


def _settle() -> None:
    """Let all names mean what they should: our functions as long as anybody wants them, and else those they replace."""
    while True:
        wanted = bool(_active)
        pairs = [(theirs, globals()[name]) for name, theirs in _replaced.items()]
        _replace({id(theirs): ours for theirs, ours in pairs} if wanted else {id(ours): theirs for theirs, ours in pairs})
        if wanted == bool(_active):  # else a signal handler has come between
            return


def _replace(replacements: Mapping[int, Any]) -> None:
    """Let all names in all modules but this one that mean an object of such an identity mean another."""
    found: list[tuple[dict[str, Any], str, Any]] = []
    for module in list(sys.modules.values()):
        if issubclass(type(module), types.ModuleType) and module is not sys.modules[__name__]:
            names = _names_of.__get__(module)
            for name, value in list(names.items()) if names else ():  # Python 3.10 makes modules without a dictionary, too
                if id(value) in replacements:
                    found.append((names, name, replacements[id(value)]))
    for names, name, value in found:  # when all has been found, as only the search meets what others have made
        names[name] = value


# What torch's functions are replaced by: functions of their own, with torch's arguments, so that undoing finds these alone and not what a
# module has imported from normclip.


def _while_patched(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """This function for as long as torch's is replaced, and else that."""

    @functools.wraps(function)
    def chosen(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        if _active:
            return function(*arguments, **keywords)
        import torch

        name = function.__name__
        torchs: Callable[_P, _R] = _torchs.get(name) or getattr(torch.nn.utils, name)  # unpickled where nothing was ever replaced
        return torchs(*arguments, **keywords)

    return chosen


def _watchers() -> list[Watcher]:
    return [patch.watcher for patch in tuple(_active) if patch.watcher is not None]


@_while_patched
def clip_grad_norm_(
    parameters: Parameters, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> torch.Tensor:
    """:func:`normclip.clip_grad_norm_`, of which a monitor may be told."""
    parameters = clip.read_generator(parameters)
    watchers = _watchers()
    watched = [watcher.monitor for watcher in watchers]
    monitors = [patch.monitor for patch in tuple(_active) if patch.monitor is not None and patch.monitor not in watched]
    if watchers or monitors:
        parameters = listed(parameters, grads=True)
        clips: ClipsByNorm | None = next((monitor.clip_grad_norm_ for monitor in monitors if monitor.covers(parameters)), None)
        for watcher in watchers:
            clips = watcher.before(parameters, clips is None) or clips
        clips = clips or clip.clip_grad_norm_
        total_norm = clips(parameters, max_norm, norm_type, error_if_nonfinite)
        for watcher in watchers:
            watcher.after()
        return total_norm
    return clip.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def _watched(change: Callable[[Any], None], parameters: Parameters) -> None:
    """Change the gradients of parameters, which watchers see before."""
    watchers = _watchers()
    given: Any = listed(parameters, grads=True) if watchers else parameters  # an iterator is read once for all
    for watcher in watchers:
        watcher.before(given, share=False)
    change(given)
    for watcher in watchers:
        watcher.after()


@_while_patched
def clip_grads_with_norm_(parameters: Parameters, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None) -> None:
    """:func:`normclip.clip_grads_with_norm_`."""
    _watched(lambda given: clip.clip_grads_with_norm_(given, max_norm, total_norm, foreach), parameters)


@_while_patched
def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """:func:`normclip.clip_grad_value_`."""
    _watched(lambda given: clip.clip_grad_value_(given, clip_value, foreach), parameters)


@_while_patched
def get_total_norm(
    tensors: Parameters, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> torch.Tensor:
    """:func:`normclip.get_total_norm`."""
    return norms.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
