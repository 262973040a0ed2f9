"""Norms of many tensors, as if they were one vector: within 1e-12, 0 without elements, NaN if any element is NaN."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

from normclip._arguments import check_order
from normclip._backends import collect
from normclip._results import as_given, as_tensor, check_finite
from normclip.typing import Order, Parameters, Tensors

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["get_total_norm", "total_norm"]


@overload
def total_norm(tensors: npt.NDArray[Any], ord: Order = 2.0) -> float: ...
@overload
def total_norm(tensors: Parameters, ord: Order = 2.0) -> torch.Tensor: ...
@overload
def total_norm(tensors: Iterable[npt.NDArray[Any]], ord: Order = 2.0) -> float: ...
@overload
def total_norm(tensors: Tensors, ord: Order = 2.0) -> torch.Tensor | float: ...
def total_norm(tensors: Tensors, ord: Order = 2.0) -> torch.Tensor | float:
    """Norm of all elements of all tensors, exact at any size.

        ``‖x‖ₚ = (Σ |xᵢ|ᵖ)^(1/p)``

    For p = ``inf`` it is ``max |xᵢ|``, for ``-inf`` ``min |xᵢ|``, and for 0 the number of elements that are not zero.
    Elements are read once and summed in float64: the result is within 1e-12 of the exact value, overflows only if the exact value does,
    and has the same bits for any number of threads.

    Args:
        tensors: A tensor or an iterable of tensors, of any shapes: torch tensors, NumPy arrays or other objects in CPU memory with
            ``__dlpack__``, of float16, bfloat16, float32, float64, complex64 or complex128 elements. The same memory listed
            twice is counted once. Of a torch sparse COO tensor the coalesced values are counted. A DTensor is counted as a whole, and all
            ranks of its mesh must make this call: see :mod:`normclip.distributed`. No other thread may free or resize the memory of a
            tensor during the call. Torch tensors without memory (meta tensors, fake tensors, subclasses that keep their elements elsewhere)
            are measured by torch's operations, and the norm of a meta or fake tensor is a meta or fake tensor.
        ord: The order p, any real number, ``inf`` or ``-inf``.

    Returns:
        For torch tensors a 0-dim tensor, on the device of the first if some are not in CPU memory; float64 if any tensor is of double
        precision, else float32. For other tensors a float. 0 if there are no elements, NaN if any element is NaN.

    Raises:
        TypeError: An object is not a tensor, is of another library than torch and not in CPU memory, or has another element type.
        ValueError: ``ord`` is NaN, or a tensor has no memory and torch cannot compute with it.
        RuntimeError: While the tensors were read from the list, code of one of them has freed or replaced the memory of another.

    Example:
        >>> import numpy as np
        >>> total_norm([np.array([3.0]), np.array([[4.0]])])
        5.0
        >>> total_norm(np.array([3.0, -4.0]), ord=1)
        7.0
    """
    ord = check_order("ord", ord)
    batch = collect(tensors)
    return as_given(batch.norm(ord), batch)


def get_total_norm(
    tensors: Parameters,
    norm_type: Order = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_groups: Sequence[ProcessGroup] | None = None,
) -> torch.Tensor:
    """Drop-in for :func:`torch.nn.utils.get_total_norm`: norm of an iterable of tensors as one vector.

    The norm of :func:`total_norm`, always as a tensor. Differences from torch: the norm is exact, an order of 0 counts elements and not
    tensors, and empty tensors have norm 0 in every order.

    Args:
        tensors: A tensor or an iterable of tensors, as for :func:`total_norm`.
        norm_type: The order, a number or ``'inf'``.
        error_if_nonfinite: Raise if the norm is NaN or infinite in float64; a finite norm that is too large for the float32 result does not
            raise. Waits for the device.
        foreach: Ignored; accepted for compatibility with torch.
        process_groups: As for :func:`normclip.clip_grad_norm_`.

    Returns:
        A 0-dim tensor, on the device of the first tensor; float64 if any tensor is of double precision, else float32.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is true, or another rank has raised an error.
        TypeError, ValueError: As for :func:`total_norm`.

    Example:
        >>> import torch
        >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    norm_type = check_order("norm_type", norm_type)
    batch = collect(tensors, process_groups=process_groups)
    norm = batch.norm(norm_type)
    if error_if_nonfinite:
        check_finite(norm, norm_type, batch, source="gradients from `tensors`")
    return as_tensor(norm, batch)
