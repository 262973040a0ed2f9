"""Which backend takes a list of tensors: Rust, and only where some are not in CPU memory, what :mod:`normclip._devices` finds.

Around either :mod:`normclip._shards`, where other ranks hold parts of the tensors.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from normclip import _core
from normclip._core import DeviceList, Moments, NotOnCPU, TensorList

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from normclip._devices import Norm

AnyNorm: TypeAlias = "float | Norm"
"""A norm as a backend has it: a float, or on a device, where it stays."""

Member: TypeAlias = "tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor | None, bool]"
"""A parameter of an optimizer: its group and its place there, the tensor, its gradient, its momentum buffer, if there is one, and whether
that is new: it holds zeros, and takes all of the first direction."""


class Settings(NamedTuple):
    """What a step of gradient descent takes from a group of parameters."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


NORMS: dict[float, str] = {1.0: "l1", 2.0: "l2", math.inf: "linf"}
"""The orders of norms that :class:`~normclip._core.Moments` have, and what they are called there."""


class Batch(Protocol):
    """Tensors that were taken and checked once, to be measured and changed. :class:`~normclip._core.TensorList` is one.

    What changes tensors returns the torch tensors that may have been written. Nothing here waits for a device but ``statistics`` and
    ``nonfinite``, whose answers are Python's, and what changes CPU tensors by a norm that a device computes.
    """

    @property
    def is_torch(self) -> bool: ...
    @property
    def is_double(self) -> bool: ...
    @property
    def positions(self) -> list[int]: ...
    def __len__(self) -> int: ...

    def norm(self, order: float) -> AnyNorm: ...
    def statistics(self, groups: list[int] = ..., *, finite_only: bool = False) -> tuple[Moments, list[Moments], bytes]: ...
    def nonfinite(self) -> list[tuple[str, int, int]]: ...
    def clip_(self, limit: float, norm: Any, epsilon: float) -> list[Any]: ...
    def scale_(self, factor: float | torch.Tensor) -> list[Any]: ...
    def scale_each_(self, factors: list[float | None]) -> list[Any]: ...
    def clamp_(self, limit: float) -> list[Any]: ...
    def zero_nonfinite_(self, indices: list[int]) -> list[Any]: ...
    def check_elementwise(self) -> None: ...
    def check_unchanged(self) -> None:
        """Refuse tensors that have got other memory since they were taken. Asked where code of others has run, before writing."""


class Descent(Protocol):
    """Parameters that were taken and checked once, to be measured and moved. :class:`~normclip._core.Descent` is one."""

    def norm(self) -> AnyNorm:
        """The L2 norm of all gradients."""

    def step_(self, coefficient: Any, settings: list[Settings]) -> list[Any]:
        """One step with the gradients times the coefficient and the settings of each group. Returns what has to be marked as written."""


def descent(members: list[Member]) -> Descent:
    """The parameters of an optimizer.

    Raises:
        TypeError, ValueError: One of the tensors cannot be taken; the message names it.
    """
    try:
        return _core.Descent(members)
    except NotOnCPU:
        from normclip._descent import DeviceDescent

        return DeviceDescent(members)


def collect(tensors: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """A tensor, or the tensors of an iterable; with process groups, together with those of the ranks along each.

    Raises:
        TypeError, ValueError: One of them cannot be taken; the message names it.
    """
    if hasattr(tensors, "__next__"):
        tensors = list(tensors)  # which may be asked again
    if not process_groups:
        try:
            return _batch(_core.collect(tensors, writable=writable))
        except Exception:
            # DTensors have no memory of their own, so they are found here, where time no longer counts.
            if not _has_shards(tensors):
                raise
    from normclip._shards import Shards

    return Shards(tensors, grads=False, writable=writable, process_groups=process_groups or ())


def collect_grads(parameters: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """The gradients of a parameter, or of those parameters of an iterable that have one, as :func:`collect` takes tensors.

    Warns of what cannot be parameters, of which none has a gradient, and none ever will.

    Raises:
        TypeError, ValueError: As for :func:`collect`.
    """
    if hasattr(parameters, "__next__"):
        parameters = list(parameters)
    taken = _grads(parameters, writable=writable, process_groups=process_groups)
    if len(taken) == 0 and (items := listed(parameters, "grad")) and not any(getattr(item, "requires_grad", True) for item in items):
        _warn_caller(
            f"none of the {len(items)} tensors that were passed as parameters has a gradient, and none requires one, so nothing happens: "
            "pass parameters, such as model.parameters(), and not their gradients"
        )
    return taken


def _grads(parameters: Any, *, writable: bool, process_groups: Sequence[ProcessGroup] | None) -> Batch:
    if not process_groups:
        try:
            taken = _core.collect_grads(parameters, writable=writable)
        except Exception:
            if not _has_shards(parameters, "grad"):
                raise
        else:
            # Parameters that are DTensors and have no gradient here may have one on other ranks, which wait for this one.
            complete = isinstance(parameters, (list, tuple)) and len(parameters) == len(taken)
            if complete or not _has_shards(parameters):
                return _batch(taken)
    from normclip._shards import Shards

    return Shards(parameters, grads=True, writable=writable, process_groups=process_groups or ())


def take(given: Any, *, grads: bool, writable: bool = False) -> Batch:
    """What :func:`collect` and :func:`collect_grads` take, of which no other rank holds parts."""
    return _batch((_core.collect_grads if grads else _core.collect)(given, writable=writable))


def listed(given: Any, attribute: str) -> list[Any]:
    """One object that has the attribute by itself, else those of an iterable."""
    return [given] if hasattr(given, attribute) else list(given)


def _warn_caller(message: str) -> None:
    """Warn whoever has called normclip, at the line of the call."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "normclip":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _has_shards(given: Any, attribute: str | None = None) -> bool:
    """Whether some objects or their attributes are DTensors, which there are none of before their module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    items = list(given) if isinstance(given, Iterable) and not hasattr(given, "__dlpack__") else [given]
    if attribute is not None:
        items += [getattr(item, attribute, None) for item in items]
    return any(issubclass(kind, module.DTensor) for kind in set(map(type, items)))


@contextmanager
def together(taken: Batch) -> Iterator[None]:
    """What fails in here fails on all ranks that share the tensors, so that none is left waiting."""
    try:
        yield
    except Exception as error:
        fail = getattr(taken, "fail", None)
        if fail is not None:
            fail(error)
        raise


def _batch(taken: TensorList | DeviceList) -> Batch:
    if isinstance(taken, TensorList):
        return taken
    from normclip._devices import DeviceBatch

    return DeviceBatch(taken)


def moments(taken: DeviceList) -> Moments:
    """The moments of tensors on devices, with which :meth:`normclip.Moments.of` comes here."""
    return _batch(taken).statistics()[0]


def dot(xs: Any, ys: Any) -> tuple[float, float, float, float] | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σxy, √Σx², √Σy² and the cosine: floats for CPU tensors, else 0-dim float64 tensors on the device of the first pair.

    Raises:
        TypeError, ValueError: As for :func:`normclip.dot`.
    """
    # An iterator may be asked twice.
    xs, ys = (list(given) if hasattr(given, "__next__") else given for given in (xs, ys))
    try:
        return _core.dot(xs, ys)
    except NotOnCPU:
        pass
    taken = DeviceList(xs, name="xs"), DeviceList(ys, name="ys")
    from normclip._devices import dot as device_dot

    return device_dot(*taken)
