"""Merging the shards of many ranks, without them."""

import math

import numpy as np
import pytest

import normclip
from normclip._backends.ranks import WIDTH, merged_norms
from normclip._core import MOMENTS
from normclip.distributed import simulate


def test_sixteen_thousand_ranks() -> None:
    found = simulate()
    assert found.ranks == 16384
    assert found.error < 3e-16 < found.float32_error
    assert found.error_by_dimensions < 3e-16
    assert found.seconds < 2.0  # 0.04 where nothing else runs
    assert (found.received, found.received_by_dimensions) == (2 << 20, 32 << 10)
    assert WIDTH * 8 == 128


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 3.0, 100.0, -1.0, -3.0, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_norms_of_parts(order: float, scale: float) -> None:
    parts = [scale * np.array([1.0, -2.0]), np.empty(0), scale * np.array([3.0]), scale * np.array([0.5, 0.25, 4.0])]
    rows = np.zeros((4, len(MOMENTS)))
    rows[:, :2] = [(normclip.total_norm(part, order), len(part) > 0) for part in parts]
    norm, elements = merged_norms(order)(rows)[:2]
    assert norm == pytest.approx(normclip.total_norm(parts, order), rel=1e-14)
    assert elements == 1.0


@pytest.mark.parametrize("order", [0.0, 3.0, -1.0, math.inf, -math.inf])
def test_norms_that_are_special(order: float) -> None:
    def norm(*norms: float) -> float:
        rows = np.zeros((len(norms), len(MOMENTS)))
        rows[:, 0], rows[:, 1] = norms, 1.0
        return float(merged_norms(order)(rows)[0])

    assert math.isnan(norm(1.0, math.nan, 2.0))
    assert norm(math.inf, math.inf) == math.inf
    assert norm(0.0, 0.0) == norm() == 0.0
    assert norm(0.0, 3.0) == (3.0 if order >= 0.0 else 0.0)
    assert norm(math.inf, 3.0) == (math.inf if order >= 0.0 else 3.0)
