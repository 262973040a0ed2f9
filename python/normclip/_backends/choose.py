"""Chooses the backend of a list of tensors.

Tensors in CPU memory go to Rust. If some are on another device, :mod:`.devices` splits the list into one part per device. If other ranks
hold shards of the tensors, :mod:`.shards` wraps the batch of this rank's shards. Modules other than Rust's are imported on first use, as
they need torch.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from normclip import _core
from normclip._backends import local
from normclip._backends.protocol import USUAL, Batch, PacedStep, Served, Step
from normclip._core import DeviceList, Moments, NotOnCPU, Stepper, TensorList

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


def optimizer_step(
    stepper: Stepper, groups: list[dict[str, Any]], states: dict[Any, Any], counts: list[int], make: Any, *, limited: bool
) -> Step:
    """One optimizer step of those parameters of these groups that have a gradient, checked and not yet taken.

    Args:
        stepper: The formula.
        groups: Parameter groups of an optimizer.
        states: What the optimizer keeps, by parameter. It is not changed.
        counts: How many tensors it keeps for each parameter of a group.
        make: Returns a new tensor to keep for a parameter, by the parameter and the name.
        limited: Whether the step is to be taken within limits, for which ranks have to list the same parameters.

    Raises:
        TypeError, ValueError: One of the tensors cannot be read or written; the message names it.
    """
    if _served is USUAL:
        try:
            step = stepper.take(groups, states, counts, make)
        except NotOnCPU:
            pass
        except Exception:
            # DTensors have no memory of their own, so Rust refuses them. Looking for them only now keeps the common path fast.
            if not _has_shards(_parameters(groups), grads=False):
                raise
        else:
            # A DTensor without a gradient on this rank may have one on others, whose collective waits for this rank.
            if step.is_complete or not _has_shards(_parameters(groups), grads=False):
                return step

    def on_devices(members: list[Any], fresh: list[Any]) -> PacedStep:
        from normclip._backends.steps import DeviceStep

        return DeviceStep(stepper, members, fresh, _served)

    def local_step(members: list[Any]) -> PacedStep:
        if _served is USUAL:
            try:
                return stepper.take_members(members)
            except NotOnCPU:
                pass
        return on_devices(members, [])

    if _has_shards(_parameters(groups), grads=False):
        from normclip._backends.shard_steps import ShardStep

        return ShardStep(stepper, groups, states, counts, make, local_step, _served, limited=limited)
    return on_devices(*stepper.members(groups, states, counts, make))


def share_error(groups: list[dict[str, Any]], error: Exception) -> None:
    """Tell the other ranks that hold parts of these parameters of an error of this rank, and raise it. Without such ranks, do nothing."""
    parameters = _parameters(groups)
    if _has_shards(parameters, grads=False):
        from normclip._backends.shards import Shards

        Shards(parameters, grads=True, writable=False, process_groups=()).fail(error)


def _parameters(groups: list[dict[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"]]


def collect(tensors: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """The batch of a tensor or of an iterable of tensors.

    With process groups, the norms and statistics of the batch include the tensors of the other ranks of each group.

    Raises:
        TypeError, ValueError: One of the tensors is not supported, or cannot be written; the message names it.
    """
    tensors = _rereadable(tensors)
    found: Batch = _taken(tensors, False, writable, process_groups, local.collect, writable, _served)
    return found


def collect_grads(parameters: Any, *, writable: bool = False, process_groups: Sequence[ProcessGroup] | None = None) -> Batch:
    """The batch of the gradients of a parameter or of an iterable of parameters. Parameters without a gradient are passed over.

    Warns if no item has a gradient and none requires one: these are probably gradients that were passed in place of parameters.

    Raises:
        TypeError, ValueError: As for :func:`collect`.
    """
    parameters = _rereadable(parameters)
    found: Batch = _taken(parameters, True, writable, process_groups, local.collect_grads, writable, _served)
    _warn_of_gradients(parameters, found)
    return found


def clip_grads(
    parameters: Any, limit: float, order: float, epsilon: float, finite: bool, process_groups: Sequence[ProcessGroup] | None = None
) -> torch.Tensor | Batch:
    """Scale gradients by min(1, limit / (norm + epsilon)), for the norm of this order of all together, if one call of Rust can do it.

    Returns:
        The norm, as torch has it. Or, with the gradients as they were, their batch, by whose methods the caller has to do the same: where
        some are not in CPU memory or ranks share them, where there are none, and where ``finite`` is true and the norm is not finite.

    Raises:
        TypeError, ValueError: As for :func:`collect`.
    """
    if _served is not USUAL:
        return collect_grads(parameters, writable=limit < math.inf, process_groups=process_groups)
    parameters = _rereadable(parameters)
    found = _taken(parameters, True, limit < math.inf, process_groups, _core.clip_grads, limit, order, epsilon, finite)
    if isinstance(found, (TensorList, DeviceList)):
        found = local.batch(found)
        _warn_of_gradients(parameters, found)
    return found  # type: ignore[no-any-return]


def _rereadable(given: Any) -> Any:
    """What was passed, an iterator as a list: it can be read once only, and another backend may have to read it again."""
    return list(given) if hasattr(given, "__next__") else given


def _taken(
    given: Any,
    grads: bool,
    writable: bool,
    process_groups: Sequence[ProcessGroup] | None,
    take: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """What ``take`` makes of what was passed, with these arguments, or the batch of this rank's shards if ranks share it."""
    if not process_groups:
        try:
            return take(given, *arguments)
        except Exception:
            # DTensors have no memory of their own, so Rust refuses them. Looking for them only now keeps the common path fast.
            if not _has_shards(given, grads=grads):
                raise
    from normclip._backends.shards import Shards

    return Shards(given, grads=grads, writable=writable, process_groups=process_groups or (), served=_served)


def _warn_of_gradients(parameters: Any, found: Batch) -> None:
    if len(found) > 0:
        return
    items = _core.listed(parameters, grads=True)
    if items and not any(getattr(item, "requires_grad", True) for item in items):
        warn_caller(
            f"none of the {len(items)} tensors that were passed as parameters has a gradient, and none requires one, so nothing happens: "
            "pass parameters, such as model.parameters(), and not their gradients"
        )


def warn_caller(message: str) -> None:
    """Warn at the line that called into normclip."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "normclip":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _has_shards(given: Any, *, grads: bool) -> bool:
    """Whether any of the objects is a DTensor, or has one as its gradient."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:  # no DTensor can exist before its module is loaded
        return False
    items = list(given) if isinstance(given, Iterable) and not hasattr(given, "__dlpack__") else [given]
    if grads:
        items += [getattr(item, "grad", None) for item in items]
    return any(issubclass(kind, module.DTensor) for kind in set(map(type, items)))


@contextmanager
def sharing_errors(batch: Batch | Step) -> Iterator[None]:
    """Report an error of the ``with`` block to the other ranks, which would otherwise wait in their next collective for this rank.

    All of them raise then. Where no ranks share the tensors of the batch or step, this does nothing.
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
    return local.collect(tensors, served=_served).statistics(table=False)[0]


def dot(xs: Any, ys: Any) -> tuple[float, float, float, float] | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σxy, √Σx², √Σy² and the cosine: floats for CPU tensors, else 0-dim float64 tensors on the device of the first pair.

    Raises:
        TypeError, ValueError: As for :func:`normclip.dot`.
    """
    xs, ys = _rereadable(xs), _rereadable(ys)
    if _served is USUAL:
        try:
            return _core.dot(xs, ys)
        except NotOnCPU:
            pass
    from normclip._backends.devices import dot as device_dot

    return device_dot(DeviceList(xs, name="xs"), DeviceList(ys, name="ys"), _served)
