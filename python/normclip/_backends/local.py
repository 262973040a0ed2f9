"""Batches of the tensors that this process holds: by Rust if all are in CPU memory, else by :mod:`.devices`."""

from __future__ import annotations

from typing import Any

from normclip import _core
from normclip._backends.protocol import USUAL, Batch, Served
from normclip._core import DeviceList, TensorList


def collect(tensors: Any, writable: bool = False, served: Served = USUAL) -> Batch:
    """The batch of a tensor or an iterable of tensors.

    Raises:
        TypeError, ValueError: One of the tensors is not supported, or cannot be written; the message names it.
    """
    return batch((_core.collect if served is USUAL else DeviceList)(tensors, writable=writable), served)


def collect_grads(parameters: Any, writable: bool = False, served: Served = USUAL) -> Batch:
    """The batch of the gradients of a parameter or an iterable of parameters, without those that are None.

    Raises:
        TypeError, ValueError: As for :func:`collect`.
    """
    return batch((_core.collect_grads if served is USUAL else DeviceList.grads)(parameters, writable=writable), served)


def batch(found: TensorList | DeviceList, served: Served = USUAL) -> Batch:
    """The batch of a checked list. A :class:`TensorList`, whose tensors are all in CPU memory, is a batch already."""
    if isinstance(found, TensorList):
        return found
    from normclip._backends.devices import DeviceBatch

    return DeviceBatch(found, served)
