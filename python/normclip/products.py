"""Inner products of many tensors, as if they were two vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

from normclip import _backends
from normclip._arguments import Tensors


class DotStats(NamedTuple):
    """An inner product and what it takes to judge it. For tensors on a device 0-dim float64 tensors there, for others floats."""

    dot: Any
    """Σxy."""
    norm_x: Any
    """√Σx²."""
    norm_y: Any
    """√Σy²."""
    cosine: Any
    """Σxy / (√Σx² √Σy²); NaN where a vector is zero or not finite."""


def dot(xs: Tensors, ys: Tensors) -> Any:
    r"""Inner product of two lists of tensors, in one read of both.

    .. math:: \langle x, y \rangle = \sum_i x_i y_i

    Args:
        xs: A tensor or an iterable of tensors, as for :func:`normclip.total_norm`, but dense.
        ys: As many tensors of the same shapes in the same order. Element types and strides may differ.

    Returns:
        The product, a float, or for tensors on a device a 0-dim float64 tensor there. It is within 1e-12 of :math:`\sum_i |x_i y_i|`, with
        the same bits for any number of threads. Of complex tensors the real part of :math:`\sum_i \bar x_i y_i`. The same pair of memory
        listed twice counts once.

    Raises:
        TypeError: As for :func:`normclip.total_norm`, or a tensor is sparse, or complex and its partner real.
        ValueError: The lists differ in length, or a pair in shape; the message names the pair.

    Example:
        >>> import numpy as np
        >>> dot([np.array([1.0, 2.0]), np.array([3.0])], [np.array([4.0, 5.0]), np.array([6.0])])
        32.0
    """
    return dot_stats(xs, ys).dot


def dot_stats(xs: Tensors, ys: Tensors) -> DotStats:
    r"""Inner product, norms and cosine of two lists of tensors, in one read of both.

    With an optimizer's update u and the gradient g, the loss is predicted to fall by :math:`\eta \langle u, g \rangle` in a step.

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
