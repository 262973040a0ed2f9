"""The tensors that this process holds: those in CPU memory are measured and changed by Rust, all others by :mod:`.devices`."""

from __future__ import annotations

from typing import Any

from normclip import _core
from normclip._backends.protocol import USUAL, Batch, Served
from normclip._core import DeviceList, TensorList


def collect(given: Any, *, grads: bool, writable: bool = False, served: Served = USUAL) -> Batch:
    """A tensor or the tensors of an iterable; with ``grads`` the gradients of a parameter or of those of an iterable that have one.

    Raises:
        TypeError, ValueError: One of them cannot be measured, or written; the message names it.
    """
    if served is USUAL:
        return batch((_core.collect_grads if grads else _core.collect)(given, writable=writable))
    return batch((DeviceList.grads if grads else DeviceList)(given, writable=writable), served)


def batch(found: TensorList | DeviceList, served: Served = USUAL) -> Batch:
    """The batch of tensors that Rust has found: itself if all of them are in CPU memory."""
    if isinstance(found, TensorList):
        return found
    from normclip._backends.devices import DeviceBatch

    return DeviceBatch(found, served)
