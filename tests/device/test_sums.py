"""Sums of the Triton kernels against exact ones, in float64 and in pairs of float32, at the sizes that they are launched with."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from normclip import _backends
from normclip._backends.choose import serving
from normclip._backends.cuda import Tuning
from normclip._backends.protocol import USUAL, Served
from normclip._backends.tables import Chunking
from normclip._backends.totals import COLUMN
from normclip._backends.triton import compensated

from .conftest import INTERPRETED, _on_cuda
from .tensors import Place

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

CHUNK = 1 << 15
BOUND = 1e-12


def _serving(*, in_pairs: bool, **sizes: int) -> Iterator[Place]:
    tuning = Tuning(Chunking(chunk=2 * CHUNK), in_pairs=in_pairs, **sizes)
    with serving(Served(rust=(), triton=(1,), tuning=tuning) if INTERPRETED else Served(triton=USUAL.triton, tuning=tuning)):
        yield (lambda tensor: tensor) if INTERPRETED else _on_cuda


by_path = pytest.mark.parametrize("in_pairs", [False, True], ids=["float64", "pairs"])


@pytest.fixture
def place(in_pairs: bool) -> Iterator[Place]:
    yield from _serving(in_pairs=in_pairs)


@pytest.fixture
def small(in_pairs: bool) -> Iterator[Place]:
    """With fewer lanes, as the interpreter folds them one by one."""
    yield from _serving(in_pairs=in_pairs, tile=256)


def _normal(size: int, random: torch.Generator) -> Tensor:
    return torch.randn(size, generator=random)


def _alike(size: int, random: torch.Generator) -> Tensor:
    """Every addition of the same number rounds in the same direction for long."""
    return torch.full((size,), 0.1)


def _wide(size: int, random: torch.Generator) -> Tensor:
    return torch.randn(size, generator=random) * torch.exp2(torch.empty(size).uniform_(-14, 3, generator=random))


def _sparse(size: int, random: torch.Generator) -> Tensor:
    return torch.randn(size, generator=random) * (torch.rand(size, generator=random) < 0.01)


def _one_large(size: int, random: torch.Generator) -> Tensor:
    """What each lane begins with is so large that what follows is below its last digit."""
    tensor = torch.full((size,), 2.0**-12) * (1.0 + torch.rand(size, generator=random))
    tensor[:1024] = 1.0
    return tensor


def _falling(size: int, random: torch.Generator) -> Tensor:
    return 1.0 / torch.arange(1, size + 1)


DISTRIBUTIONS = (_normal, _alike, _wide, _sparse, _one_large, _falling)


def exact_sums(tensor: Tensor) -> tuple[float, float]:
    """Σx² and Σ|x|, rounded once: squares of at most 24 digits are exact in float64."""
    wide = tensor.double()
    return math.fsum(wide.square().tolist()), math.fsum(wide.abs().tolist())


def sums(tensors: list[Tensor]) -> tuple[float, float]:
    (row,) = _backends.collect(tensors)._moments(finite_only=False)
    return row[COLUMN["medium"]], row[COLUMN["sum_abs"]]


@by_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda distribution: distribution.__name__.strip("_"))
def test_sums_are_within_the_bound(place: Place, distribution: Callable[[int, torch.Generator], Tensor], dtype: torch.dtype) -> None:
    # Not quite to a border of vectors, and over one border of the blocks after which pairs go to float64.
    tensor = distribution(CHUNK + 1029, torch.Generator().manual_seed(7)).to(dtype)[3:]
    np.testing.assert_allclose(sums([place(tensor)]), exact_sums(tensor), rtol=BOUND)


@by_path
@pytest.mark.parametrize("exponent", [-75, -60, -54, -53, -52, -50, 55, 56, 60, 63, 100])
def test_squares_that_leave_the_range_of_float32(small: Place, exponent: int) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2.0**exponent
    np.testing.assert_allclose(sums([small(tensor)]), exact_sums(tensor), rtol=BOUND)
    assert float(_backends.collect([small(tensor)]).norm(2.0)) == pytest.approx(math.sqrt(exact_sums(tensor)[0]), rel=BOUND)


@by_path
@pytest.mark.parametrize(("value", "others"), [(0.0, 0.0), (math.inf, 1.0), (math.nan, 1.0), (2.0**-140, 0.0), (3e38, 3e38)])
def test_zeros_infinities_and_the_smallest_and_largest(small: Place, value: float, others: float) -> None:
    tensor = torch.full((600,), others)
    tensor[7] = value
    expected = exact_sums(tensor) if math.isfinite(value) else (value, value)
    np.testing.assert_allclose(sums([small(tensor)]), expected, rtol=BOUND)
    assert float(_backends.collect([small(tensor)]).norm(2.0)) == pytest.approx(math.sqrt(expected[0]), rel=BOUND, nan_ok=True)


def test_the_bound_of_sums_in_pairs_is_proven_for_these_sizes() -> None:
    """The error that the module derives, for the sizes that it is launched with: see its header."""
    lanes = Tuning().tile // 4
    terms = compensated.BLOCK.value // lanes + 4  # two edges, of two 16-bit elements for each lane
    folds = math.log2(lanes)
    sums_ = (3 * terms + 2 + 3 * folds) * 2.0**-48
    assert compensated.FAINT.value == 2.0**-108
    underflow = 2.0**-150 / compensated.FAINT.value
    assert sums_ < BOUND, "of Σ|x|"
    assert (sums_ + underflow) / 2 < BOUND, "of √Σx²"
