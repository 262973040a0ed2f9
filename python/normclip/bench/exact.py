"""The exact reference for the norms of torch and normclip: float64 in NumPy, sharing no code with either.

Input: tensors of any floating dtype. Each chunk is widened to float64, where the powers of float32 and narrower
values are exact or nearly so, and summed pairwise by NumPy; `math.fsum` adds the sums of the chunks and rounds
once. The relative error is near 1e-16 at any size.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["exact_norm", "relative_error"]

_CHUNK = 65536  # elements; half a megabyte when widened to float64, which stays in cache


def exact_norm(tensors: Iterable[Tensor], order: float) -> float:
    """The norm of all elements of all tensors. `order` is infinity or a positive whole number."""
    if math.isinf(order):
        return max(float(chunk.max()) for chunk in _magnitudes(tensors))
    power_sum = math.fsum(_power_sum(chunk, int(order)) for chunk in _magnitudes(tensors))
    return math.pow(power_sum, 1.0 / order)


def relative_error(value: float, exact: float) -> float:
    """|value − exact| / exact."""
    return abs(value - exact) / exact


def _magnitudes(tensors: Iterable[Tensor]) -> Iterator[npt.NDArray[np.float64]]:
    for tensor in tensors:
        for chunk in torch.split(tensor.reshape(-1), _CHUNK):
            yield np.abs(chunk.double().numpy())


def _power_sum(magnitudes: npt.NDArray[np.float64], order: int) -> float:
    powers = magnitudes.copy()
    for _ in range(order - 1):
        powers *= magnitudes  # far quicker than `**`, and rounded at most `order - 1` times
    return float(powers.sum())
