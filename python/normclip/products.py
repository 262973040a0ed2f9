"""Inner products of two lists of tensors, as if each were one vector: within 1e-12·Σ|xy|, NaN if an element is."""

from __future__ import annotations

from typing import Any, NamedTuple

from normclip import _backends
from normclip._arguments import Tensors


class DotStats(NamedTuple):
    """An inner product with the norms of both vectors. Floats; for tensors on a device, 0-dim float64 tensors on that device."""

    dot: Any
    """Σxy."""
    norm_x: Any
    """√Σx²."""
    norm_y: Any
    """√Σy²."""
    cosine: Any
    """Σxy / (√Σx² √Σy²); NaN if a vector is zero or not finite."""


def dot(xs: Tensors, ys: Tensors) -> Any:
    r"""Inner product of two lists of tensors, in one read of both.

    .. math:: \langle x, y \rangle = \sum_i x_i y_i

    Args:
        xs: A tensor or an iterable of tensors, as for :func:`normclip.total_norm`, but dense.
        ys: As many tensors of the same shapes in the same order. Element types and strides may differ.

    Returns:
        The product, a float, or for tensors on a device a 0-dim float64 tensor on that device. Its error is at most 1e-12 times
        :math:`\sum_i |x_i y_i|`, and it has the same bits for any number of threads. For complex tensors it is the real part of
        :math:`\sum_i \bar x_i y_i`. A pair with the same memory as an earlier pair is not counted again.

    Raises:
        TypeError: As for :func:`normclip.total_norm`, or a tensor is sparse, or one tensor of a pair is complex and the other real.
        ValueError: The lists differ in length, or the tensors of a pair in shape; the message names the pair.

    Example:
        >>> import numpy as np
        >>> dot([np.array([1.0, 2.0]), np.array([3.0])], [np.array([4.0, 5.0]), np.array([6.0])])
        32.0
    """
    return dot_stats(xs, ys).dot


def dot_stats(xs: Tensors, ys: Tensors) -> DotStats:
    r"""Inner product, norms and cosine of two lists of tensors, in one read of both.

    For an optimizer's update u and the gradient g, a step with the learning rate η is predicted to lower the loss by
    :math:`\eta \langle u, g \rangle`.

    Args:
        xs: As for :func:`dot`.
        ys: As for :func:`dot`.

    Returns:
        ``(dot, norm_x, norm_y, cosine)``.

    Raises:
        TypeError, ValueError: As for :func:`dot`.

    Example:
        >>> import numpy as np
        >>> dot_stats(np.array([3.0, 4.0]), np.array([4.0, 3.0]))
        DotStats(dot=24.0, norm_x=5.0, norm_y=5.0, cosine=0.96)
    """
    return DotStats(*_backends.dot(xs, ys))
