"""Chooses the backend of a list of tensors.

Tensors in CPU memory go to Rust. If some are on another device, :mod:`.devices` splits the list into one part per device. If other ranks
hold shards of the tensors, :mod:`.shards` wraps the batch of this rank's shards. Modules other than Rust's are imported on first use, as
they need torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from normclip import _core
from normclip._backends import local
from normclip._backends.protocol import USUAL, Batch, Member, Served, Step
from normclip._core import DeviceList, Moments, NotOnCPU

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


_served = USUAL


@contextmanager
def serving(served: Served) -> Iterator[None]:
    """Change which backend serves which kind of device, within a ``with`` block. Tests use it to run device backends on CPU tensors."""
    global _served
    previous, _served = _served, served
    try:
        yield
    finally:
        _served = previous


def optimizer_step(members: list[Member]) -> Step:
    """One optimizer step of these parameters, checked and not yet taken.

    Raises:
        TypeError, ValueError: One of the tensors cannot be read or written; the message names it.
    """
    if _served is USUAL:
        try:
            return _core.Step(members)
        except NotOnCPU:
            pass
    from normclip._backends.steps import DeviceStep

    return DeviceStep(members, _served)


def collect(tensors: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """The batch of a tensor or of an iterable of tensors.

    With process groups, the norms and statistics of the batch include the tensors of the other ranks of each group.

    Raises:
        TypeError, ValueError: One of the tensors is not supported, or cannot be written; the message names it.
    """
    if hasattr(tensors, "__next__"):
        tensors = list(tensors)  # an iterator can be read once only, and `_has_shards` may read it again
    if not process_groups:
        try:
            return local.collect(tensors, grads=False, writable=writable, served=_served)
        except Exception:
            # DTensors have no memory of their own, so Rust refuses them. Looking for them only now keeps the common path fast.
            if not _has_shards(tensors):
                raise
    from normclip._backends.shards import Shards

    return Shards(tensors, grads=False, writable=writable, process_groups=process_groups or ())


def collect_grads(parameters: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """The batch of the gradients of a parameter or of an iterable of parameters. Parameters without a gradient are passed over.

    Warns if no item has a gradient and none requires one: these are probably gradients that were passed in place of parameters.

    Raises:
        TypeError, ValueError: As for :func:`collect`.
    """
    if hasattr(parameters, "__next__"):
        parameters = list(parameters)
    found = _grads(parameters, writable=writable, process_groups=process_groups)
    if (
        len(found) == 0
        and (items := _core.listed(parameters, grads=True))
        and not any(getattr(item, "requires_grad", True) for item in items)
    ):
        warn_caller(
            f"none of the {len(items)} tensors that were passed as parameters has a gradient, and none requires one, so nothing happens: "
            "pass parameters, such as model.parameters(), and not their gradients"
        )
    return found


def _grads(parameters: Any, *, writable: bool, process_groups: Sequence[ProcessGroup] | None) -> Batch:
    if not process_groups:
        try:
            found = local.collect(parameters, grads=True, writable=writable, served=_served)
        except Exception:
            if not _has_shards(parameters, "grad"):
                raise
        else:
            # A DTensor parameter without a gradient on this rank may have one on others, whose collective waits for this rank.
            complete = isinstance(parameters, (list, tuple)) and len(parameters) == len(found)
            if complete or not _has_shards(parameters):
                return found
    from normclip._backends.shards import Shards

    return Shards(parameters, grads=True, writable=writable, process_groups=process_groups or ())


def warn_caller(message: str) -> None:
    """Warn at the line that called into normclip."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "normclip":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _has_shards(given: Any, attribute: str | None = None) -> bool:
    """Whether any of the objects is a DTensor, or has one as this attribute."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:  # no DTensor can exist before its module is loaded
        return False
    items = list(given) if isinstance(given, Iterable) and not hasattr(given, "__dlpack__") else [given]
    if attribute is not None:
        items += [getattr(item, attribute, None) for item in items]
    return any(issubclass(kind, module.DTensor) for kind in set(map(type, items)))


@contextmanager
def sharing_errors(batch: Batch) -> Iterator[None]:
    """Report an error of the ``with`` block to the other ranks, which would otherwise wait in their next collective for this rank.

    All of them raise then. Where no ranks share the tensors of the batch, this does nothing.
    """
    try:
        yield
    except Exception as error:
        fail = getattr(batch, "fail", None)
        if fail is not None:
            fail(error)
        raise


def moments(tensors: Any) -> Moments:
    """The moments of a tensor, or of the tensors of an iterable, as one vector.

    Raises:
        TypeError, ValueError: As for :func:`collect`, or one is a DTensor.
    """
    return local.collect(tensors, grads=False, served=_served).statistics()[0]


def dot(xs: Any, ys: Any) -> tuple[float, float, float, float] | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σxy, √Σx², √Σy² and the cosine: floats for CPU tensors, else 0-dim float64 tensors on the device of the first pair.

    Raises:
        TypeError, ValueError: As for :func:`normclip.dot`.
    """
    # Lists, as an iterator can be read once only and a second backend may have to read it.
    xs, ys = (list(given) if hasattr(given, "__next__") else given for given in (xs, ys))
    if _served is USUAL:
        try:
            return _core.dot(xs, ys)
        except NotOnCPU:
            pass
    from normclip._backends.devices import dot as device_dot

    return device_dot(DeviceList(xs, name="xs"), DeviceList(ys, name="ys"), _served)
