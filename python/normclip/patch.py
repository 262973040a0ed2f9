"""normclip in place of torch's clipping functions, wherever a program has them: :func:`patch_torch`.

Arrows: sys.modules → the names that are torch's functions → the functions here, and back.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from normclip import clip, norms
from normclip._arguments import Parameters
from normclip._backends import listed

if TYPE_CHECKING:
    import torch

    from normclip.monitor import GradMonitor

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAMES = ("clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "get_total_norm")

_lock = threading.Lock()
_active: tuple[Patch, ...] = ()  # never changed but replaced, as calls read it without the lock
_replaced: dict[str, Any] = {}  # the functions that are replaced, for as long as they are
_torchs: dict[str, Any] = {}  # those that were replaced first. Later ones may be others' wrappers of ours


class Patch:
    """The replacement of torch's functions, made by :func:`patch_torch`, that lasts until it is undone or its ``with`` block ends.

    As long as there is another one the functions stay replaced.
    """

    def __init__(self, monitor: GradMonitor | None = None) -> None:
        self.monitor = monitor

    def __enter__(self) -> Patch:
        global _active
        import torch

        with _lock:
            if not _active:
                _replaced.update({name: getattr(torch.nn.utils, name) for name in _NAMES})
                for name, function in _replaced.items():
                    _torchs.setdefault(name, function)
                _replace({id(function): globals()[name] for name, function in _replaced.items()})
            if self not in _active:
                _active = (*_active, self)
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()

    def undo(self) -> None:
        """End the replacement; once it has ended this does nothing."""
        global _active
        with _lock:
            if self not in _active:
                return
            _active = tuple(patch for patch in _active if patch is not self)
            if not _active:
                _replace({id(globals()[name]): function for name, function in _replaced.items()})
                _replaced.clear()


def patch_torch(monitor: GradMonitor | None = None) -> Patch:
    """Put normclip in the place of ``clip_grad_norm_``, ``clip_grads_with_norm_``, ``clip_grad_value_`` and ``get_total_norm`` of torch.

    In :mod:`torch.nn.utils` and in every module that has imported one of them by name, so that Accelerate, Lightning, Transformers and
    training loops use normclip without a change. Undoing it puts torch's functions back, also in modules that were imported meanwhile. Who
    has kept a replacement elsewhere, as a default argument or in a wrapper, calls torch's function by it from then on.

    The deprecated ``torch.nn.utils.clip_grad_norm`` calls its successor, hence normclip. Not replaced are references that are no names of
    modules (default arguments, closures, attributes of objects) and what does not go through these functions: the method
    ``clip_grad_norm_`` of ``torch.distributed.fsdp.FullyShardedDataParallel``, DeepSpeed, Megatron. Inside a function that
    :func:`torch.compile` compiles, the call breaks the graph.

    Args:
        monitor: Tell it of every call of ``clip_grad_norm_`` with parameters of its model, from the same read. Of several that have
            them the first is told.

    Returns:
        What ends the replacement: by its method ``undo``, or as a context manager. Repeated and nested calls count.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3e20, 4e20])
        >>> with patch_torch():
        ...     torch.nn.utils.clip_grad_norm_([weight], 1.0)
        tensor(5.0000e+20)
    """
    return Patch(monitor).__enter__()


def tells(monitor: GradMonitor) -> bool:
    """Whether this monitor is told of calls of ``clip_grad_norm_``."""
    return any(patch.monitor is monitor for patch in _active)


def _replace(replacements: Mapping[int, Any]) -> None:
    """Let all names in all modules but this one that mean an object of such an identity mean another."""
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and module is not sys.modules[__name__]:
            # Past the attributes of modules that wait to be loaded until they are asked for one.
            names: dict[str, Any] = object.__getattribute__(module, "__dict__")
            for name, value in list(names.items()):
                if id(value) in replacements:
                    names[name] = replacements[id(value)]


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


@_while_patched
def clip_grad_norm_(
    parameters: Parameters, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> torch.Tensor:
    """:func:`normclip.clip_grad_norm_`, of which a monitor may be told."""
    if isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    for patch in _active:
        if patch.monitor is not None:
            parameters = listed(parameters, "grad")
            if patch.monitor.covers(parameters):
                return patch.monitor.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
    return clip.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


@_while_patched
def clip_grads_with_norm_(parameters: Parameters, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None) -> None:
    """:func:`normclip.clip_grads_with_norm_`."""
    clip.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)


@_while_patched
def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """:func:`normclip.clip_grad_value_`."""
    clip.clip_grad_value_(parameters, clip_value, foreach)


@_while_patched
def get_total_norm(
    tensors: Parameters, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> torch.Tensor:
    """:func:`normclip.get_total_norm`."""
    return norms.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
