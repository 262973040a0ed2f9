"""Replaces torch's clipping functions by normclip's in all modules that have imported them: :func:`patch_torch`.

The names of all modules in ``sys.modules`` are searched for torch's functions, which are replaced by the functions at the end of this file;
undoing the last patch replaces them back.
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
from normclip._arguments import import_torch
from normclip._core import listed
from normclip.typing import Parameters

if TYPE_CHECKING:
    import torch

    from normclip.monitor import GradMonitor

__all__ = ["Patch", "patch_torch"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAMES = ("clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "get_total_norm")

# A signal handler may patch or undo while this thread patches or undoes. So the lock is reentrant, each change of this state is a single
# dictionary operation, and `_update_modules` may be interrupted and repeated at any point.
_lock = threading.RLock()
_active: dict[Patch, None] = {}  # patches that have not been undone, the oldest first
_replaced: dict[str, Any] = {}  # by name, the function that the current or latest patch has replaced
_original: dict[str, Any] = {}  # by name, the function that the first patch has replaced; later ones may be wrappers of ours

ClipsByNorm = Callable[[Sequence[Any], float, float, bool], "torch.Tensor"]
# Reads the dictionary of a module without attribute access, which would load modules that are imported lazily.
_names_of: Any = vars(types.ModuleType)["__dict__"]


class Watcher(Protocol):
    """An object that is notified before and after torch's functions change gradients."""

    monitor: GradMonitor
    """Only the watcher logs to this monitor, even if it was also given to `patch_torch`."""

    def before(self, parameters: Sequence[Any], share: bool) -> ClipsByNorm | None:
        """Measure gradients that are about to change; or, if ``share``, return a function that clips and measures by one read."""

    def after(self) -> None:
        """Called when the gradients have changed."""


class Patch:
    """A replacement of torch's functions by :func:`patch_torch`, which lasts until it is undone or its ``with`` block ends.

    Torch's functions return when no patch is left.
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
                        _original.setdefault(name, function)
                        _replaced[name] = function
            try:
                _active[self] = None
                _update_modules()
            except BaseException:
                self.undo()
                raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """Use the patch as a decorator: torch's functions are replaced only during calls of the function."""
        self.undo()
        # A call of any of these returns before its code has run.
        deferred = (inspect.isclass, inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if not callable(function) or any(is_kind(function) for is_kind in deferred):
            raise TypeError(f"patch_torch() cannot decorate {function!r}, only plain functions: put `with patch_torch():` inside it")

        @functools.wraps(function)
        def patched(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
            with Patch(self.monitor, self.watcher):
                return function(*arguments, **keywords)

        return patched

    def undo(self) -> None:
        """End the replacement. A second call does nothing."""
        with _lock:
            try:
                _active.pop(self, None)
                _update_modules()
            except BaseException:  # such as Ctrl-C: finish, so that nothing is half replaced, and then raise it
                _active.pop(self, None)
                _update_modules()
                raise


def patch_torch(monitor: GradMonitor | None = None) -> Patch:
    """Replace torch's ``clip_grad_norm_``, ``clip_grads_with_norm_``, ``clip_grad_value_`` and ``get_total_norm`` by normclip's functions.

    They are replaced in :mod:`torch.nn.utils` and in every module that has imported one of them by name, so that Accelerate, Lightning,
    Transformers and training loops use normclip without a change. Undoing the patch puts torch's functions back, also in modules that were
    imported in the meantime. A replacement that is still referenced elsewhere, as a default argument or in a wrapper, calls torch's
    function from then on.

    Either all names are replaced or, if that fails, none. As a decorator, ``@patch_torch()``, the patch lasts for each call of a function.

    The deprecated ``torch.nn.utils.clip_grad_norm`` calls its successor and so uses normclip. The following keep torch's functions:
    references that are not names in modules (default arguments, closures, attributes of objects), and code that does not call these
    functions (the method ``clip_grad_norm_`` of ``torch.distributed.fsdp.FullyShardedDataParallel``, DeepSpeed, Megatron). Inside a
    function that :func:`torch.compile` compiles, ``clip_grad_norm_`` is an operator of the graph, and the other functions break the graph.

    Args:
        monitor: Logs every call of ``clip_grad_norm_`` with parameters of its model, from the same read. If several patches have a monitor
            of these parameters, the first one logs.

    Returns:
        The patch, to be ended by its method ``undo`` or as a context manager. If patches are repeated or nested, torch's functions return
        when all of them have ended.

    Raises:
        TypeError: ``monitor`` is not a monitor but, say, the model. Nothing is replaced.

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


def logs_to(monitor: GradMonitor) -> bool:
    """Whether this monitor was given to :func:`patch_torch`."""
    return any(patch.monitor is monitor for patch in tuple(_active))


def _update_modules() -> None:
    """Make the names in all modules refer to our functions if a patch is active, else to those that ours replace."""
    while True:
        wanted = bool(_active)
        pairs = [(theirs, globals()[name]) for name, theirs in _replaced.items()]
        _replace({id(theirs): ours for theirs, ours in pairs} if wanted else {id(ours): theirs for theirs, ours in pairs})
        if wanted == bool(_active):  # else a signal handler has patched or undone in the meantime
            return


def _replace(replacements: Mapping[int, Any]) -> None:
    """Rebind names in all modules but this one: a name of an object whose id is a key then refers to the value."""
    found: list[tuple[dict[str, Any], str, Any]] = []
    for module in list(sys.modules.values()):
        if issubclass(type(module), types.ModuleType) and module is not sys.modules[__name__]:
            names = _names_of.__get__(module)
            for name, value in list(names.items()) if names else ():  # in Python 3.10 a module may have no dictionary
                if id(value) in replacements:
                    found.append((names, name, replacements[id(value)]))
    for names, name, value in found:  # only now, as the search may raise in code of other modules, and this cannot
        names[name] = value


# The functions that replace torch's, with torch's arguments. They are not normclip's own functions, so that undoing does not rebind names
# that a module has imported from normclip.


def _while_patched(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function call torch's function of the same name while no patch is active."""

    @functools.wraps(function)
    def chosen(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        if _active:
            return function(*arguments, **keywords)
        import torch

        name = function.__name__
        # In a process that has unpickled this function, no patch may ever have been active.
        original: Callable[_P, _R] = _original.get(name) or getattr(torch.nn.utils, name)
        return original(*arguments, **keywords)

    return chosen


def _watchers() -> list[Watcher]:
    return [patch.watcher for patch in tuple(_active) if patch.watcher is not None]


@_while_patched
def clip_grad_norm_(
    parameters: Parameters, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> torch.Tensor:
    """:func:`normclip.clip_grad_norm_`, which monitors of the parameters log."""
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
    """Change the gradients of parameters, and notify the watchers before and after."""
    watchers = _watchers()
    given: Any = listed(parameters, grads=True) if watchers else parameters  # a list, as an iterator can be read once only
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
