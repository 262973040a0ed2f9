"""What the tests of device tensors share."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normclip import _backends

from .conftest import CHUNK, INTERPRETED

Place = Callable[[Tensor], Tensor]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37)
ORDERS = (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, 4.0, 0.5, -1.0)

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def make(dtype: torch.dtype, size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + size)).to(dtype)


def every_kind() -> list[Tensor]:
    return [make(dtype, size, seed) for seed, dtype in enumerate(DTYPES) for size in SIZES]


def exact_norm(tensors: list[Tensor], order: float) -> float:
    """Not rounded to a result's type, and where it is computed."""
    return float(_backends.collect(tensors).norm(order))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        # Triton's interpreter truncates to bfloat16, where devices round.
        truncated = INTERPRETED and x.dtype == torch.bfloat16
        torch.testing.assert_close(x.detach().cpu(), y, rtol=2**-7 if truncated else 0.0, atol=1e-37 if truncated else 0.0, equal_nan=True)


def layouts() -> dict[str, Tensor]:
    memory = make(torch.float32, 40 * 50)
    return {
        "off the border of a vector": memory[1:],
        "transposed": memory.view(40, 50).T,
        "columns": memory.view(40, 50)[:, 3:9],
        "every third": memory[::3],
        "channels last": memory.view(2, 5, 10, 20).to(memory_format=torch.channels_last),
        "complex64": torch.view_as_complex(memory.view(-1, 2)),
        "complex128": torch.view_as_complex(memory.double().view(-1, 2)),
        "complex columns": torch.view_as_complex(memory.view(-1, 2)).view(25, 40)[:, 1:7],
    }
