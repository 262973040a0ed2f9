"""Which backend takes a list of tensors: Rust, and only where some are not in CPU memory, what :mod:`.devices` finds.

Around either :mod:`.shards`, where other ranks hold parts of the tensors. The other backends are imported when the first tensor needs them.
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
    """Let backends serve other devices than usual, CPU tensors among them. For tests: so these pass for tensors of any device."""
    global _served
    former, _served = _served, served
    try:
        yield
    finally:
        _served = former


def optimizer_step(members: list[Member]) -> Step:
    """A step of an optimizer with these parameters.

    Raises:
        TypeError, ValueError: One of the tensors cannot be read, or written; the message names it.
    """
    if _served is USUAL:
        try:
            return _core.Step(members)
        except NotOnCPU:
            pass
    from normclip._backends.steps import DeviceStep

    return DeviceStep(members, _served)


def collect(tensors: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """A tensor, or the tensors of an iterable; with process groups, together with those of the ranks along each.

    Raises:
        TypeError, ValueError: One of them cannot be taken; the message names it.
    """
    if hasattr(tensors, "__next__"):
        tensors = list(tensors)  # which may be asked again
    if not process_groups:
        try:
            return local.collect(tensors, grads=False, writable=writable, served=_served)
        except Exception:
            # DTensors have no memory of their own, so they are found here, where time no longer counts.
            if not _has_shards(tensors):
                raise
    from normclip._backends.shards import Shards

    return Shards(tensors, grads=False, writable=writable, process_groups=process_groups or ())


def collect_grads(parameters: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """The gradients of a parameter, or of those parameters of an iterable that have one, as :func:`collect` takes tensors.

    Warns of what cannot be parameters, of which none has a gradient, and none ever will.

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
            # Parameters that are DTensors and have no gradient here may have one on other ranks, which wait for this one.
            complete = isinstance(parameters, (list, tuple)) and len(parameters) == len(found)
            if complete or not _has_shards(parameters):
                return found
    from normclip._backends.shards import Shards

    return Shards(parameters, grads=True, writable=writable, process_groups=process_groups or ())


def warn_caller(message: str) -> None:
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
def failing_together(batch: Batch) -> Iterator[None]:
    """What fails in here fails on all ranks that share the tensors: this one tells the others, which would wait for it else."""
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
    # An iterator may be asked twice.
    xs, ys = (list(given) if hasattr(given, "__next__") else given for given in (xs, ys))
    if _served is USUAL:
        try:
            return _core.dot(xs, ys)
        except NotOnCPU:
            pass
    from normclip._backends.devices import dot as device_dot

    return device_dot(DeviceList(xs, name="xs"), DeviceList(ys, name="ys"), _served)
