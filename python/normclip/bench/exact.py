"""The reference that both contenders are judged by: float64 in NumPy, no code shared with normclip or torch's norms.

Input: tensors of any floating dtype. Each chunk is widened to float64, where the powers of float32 and narrower
values are exact or nearly so, and summed pairwise by NumPy; `math.fsum` adds the chunks without rounding. The
relative error stays near 1e-16 at any size.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_CHUNK = 65536  # widened to float64, half a megabyte: stays in cache


def exact_norm(tensors: Iterable[Tensor], order: float) -> float:
    """The norm over all values of all tensors, for `order` infinity or a positive whole number."""
    if math.isinf(order):
        return max(float(chunk.max()) for chunk in _magnitudes(tensors))
    power_sum = math.fsum(_power_sum(chunk, int(order)) for chunk in _magnitudes(tensors))
    return math.pow(power_sum, 1.0 / order)


def relative_error(value: float, exact: float) -> float:
    """How far `value` is from `exact`, as a share of `exact`."""
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
