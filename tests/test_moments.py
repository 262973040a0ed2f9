"""Moments: what they hold, how they merge and travel."""

import itertools
import math
import pickle
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normclip
from normclip import Moments
from normclip._core import FIGURES, MOMENTS, NORMS
from support.oracle import assert_near, exact_norm, magnitudes
from support.tensors import REAL_DTYPES, Recipe, recipes


def figures(moments: Moments) -> list[float]:
    return [getattr(moments, figure) for figure in FIGURES]


def same(a: list[float], b: list[float]) -> bool:
    return np.array_equal(np.array(a, np.float64), np.array(b, np.float64), equal_nan=True)


@given(st.lists(recipes(), max_size=4))
def test_figures_against_the_oracle(given_recipes: list[Recipe]) -> None:
    tensors = [recipe.make() for recipe in given_recipes]
    moments = Moments.of(tensors)
    sizes = np.concatenate([magnitudes(tensor) for tensor in tensors]) if tensors else np.empty(0)
    assert moments.count == sizes.size
    assert moments.zeros == np.count_nonzero(sizes == 0)
    assert moments.nans == np.count_nonzero(np.isnan(sizes))
    assert moments.infs == np.count_nonzero(np.isinf(sizes))
    for order, figure in ((1.0, moments.l1), (2.0, moments.l2), (math.inf, moments.linf)):
        assert_near(figure, exact_norm(tensors, order))


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_sign_statistics(dtype: str) -> None:
    array = Recipe(dtype, 200_000, library="torch", zeros=0.25).make()
    wide = array.double().numpy().astype(np.longdouble)
    moments = Moments.of(array)
    l1, l2 = np.abs(wide).sum(), np.sqrt((wide * wide).sum())
    assert moments.sign_cosine == pytest.approx(float(l1 / (np.sqrt(np.longdouble(np.count_nonzero(wide))) * l2)), rel=1e-12)
    assert moments.density == pytest.approx(float(l1 * l1 / (wide.size * l2 * l2)), rel=1e-12)
    assert moments.rms == pytest.approx(float(l2 / np.sqrt(np.longdouble(wide.size))), rel=1e-12)
    assert moments.mean_abs == pytest.approx(float(l1 / wide.size), rel=1e-12)


@pytest.mark.parametrize(
    ("draw", "cosine"),
    [
        (lambda rng: rng.standard_normal(1_000_000), math.sqrt(2 / math.pi)),
        (lambda rng: rng.laplace(size=1_000_000), 1 / math.sqrt(2)),
        (lambda rng: rng.uniform(-1, 1, 1_000_000), math.sqrt(3) / 2),
        (lambda rng: np.eye(1, 1000)[0], 1.0),
    ],
    ids=["Gaussian", "Laplace", "uniform", "one-hot"],
)
def test_sign_cosine_of_distributions(draw, cosine: float) -> None:
    assert Moments.of(draw(np.random.default_rng(0))).sign_cosine == pytest.approx(cosine, abs=2e-3)


def test_sign_cosine_with_zeros() -> None:
    """With a quarter of zeros the true cosine stays, and the square root of the density falls."""
    values = np.random.default_rng(0).standard_normal(1_000_000)
    values[::4] = 0.0
    moments = Moments.of(values)
    assert moments.sign_cosine == pytest.approx(0.798, abs=2e-3)
    assert math.sqrt(moments.density) == pytest.approx(0.691, abs=2e-3)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, math.nan], [1.0, -math.inf], []])
def test_sign_statistics_without_a_direction(values: list[float]) -> None:
    moments = Moments.of(np.array(values))
    assert math.isnan(moments.sign_cosine)
    assert math.isnan(moments.density)


@given(st.lists(recipes(), min_size=1, max_size=6), st.data())
def test_any_split_at_tensor_borders_gives_the_same_bits(given_recipes: list[Recipe], data: st.DataObject) -> None:
    tensors = [recipe.make() for recipe in given_recipes]
    whole = Moments.of(tensors)
    parts = [Moments.of(tensor) for tensor in tensors]
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    assert same(figures(parts[0]), figures(whole))


def assert_any_split_agrees(flat: Any, cuts: list[float]) -> None:
    borders = [0, *sorted(int(cut * len(flat)) for cut in cuts), len(flat)]
    whole = Moments.of(flat)
    merged = sum((Moments.of(flat[a:b]) for a, b in itertools.pairwise(borders)), Moments())
    assert figures(merged)[:4] == figures(whole)[:4]
    assert same([merged.linf], [whole.linf])
    # Lanes are filled otherwise, so the last bits may differ.
    np.testing.assert_allclose(figures(merged)[4:], figures(whole)[4:], rtol=1e-15)


@given(recipes(), st.lists(st.floats(0, 1), max_size=5))
def test_any_split_within_a_tensor(recipe: Recipe, cuts: list[float]) -> None:
    assert_any_split_agrees(recipe.make().reshape(-1), cuts)


@given(
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.integers(1, 300_000),
    st.floats(0.5, 1.0),
    st.lists(st.floats(0, 1), max_size=5),
)
def test_any_split_of_a_constant(dtype: type, size: int, value: float, cuts: list[float]) -> None:
    """Whose roundings all go one way."""
    assert_any_split_agrees(np.full(size, value, dtype), cuts)


@given(st.lists(recipes(), max_size=3))
def test_arrays_and_pickles_carry_everything(given_recipes: list[Recipe]) -> None:
    moments = Moments.of([recipe.make() for recipe in given_recipes])
    array = moments.to_array()
    assert array.shape == (len(MOMENTS),)
    assert array.dtype == np.float64
    for copy in (Moments.from_array(array), Moments.from_array(array.tolist()), pickle.loads(pickle.dumps(moments))):
        assert same(copy.to_array().tolist(), array.tolist())


def test_numbers_have_names() -> None:
    array = np.array([3.0, 0.0, -4.0, 1e-300, 1e300, math.nan, math.inf, -math.inf])
    found = [dict(zip(MOMENTS, Moments.of(part).to_array(), strict=True)) for part in (array, *array[:, None])]
    sums = ("sum_abs", "small", "medium", "large", "largest")
    assert [found[0][name] for name in ("count", "zeros", "nans", "infs")] == [8, 1, 1, 2]
    assert [found[1][name] for name in sums] == [3.0, 0.0, 9.0, 0.0, 3.0]
    assert [found[4][name] > 0.0 for name in sums] == [True, True, False, False, True]
    assert [found[5][name] > 0.0 for name in sums] == [True, False, False, True, True]
    assert all(each[f"{name}_rest"] == 0.0 for each in found[1:] for name in sums[:-1])


def test_norms_have_figures() -> None:
    array = np.array([3.0, 0.0, -4.0])
    assert {order: getattr(Moments.of(array), figure) for order, figure in NORMS.items()} == {1.0: 7.0, 2.0: 5.0, math.inf: 4.0}


def test_equality_and_hash() -> None:
    a, b = Moments.of(np.ones(3)), Moments.of(np.array([1.0, -1.0, 1.0]))
    assert a == b
    assert hash(a) == hash(b)
    assert a != a + b
    assert Moments() + a == a


@pytest.mark.parametrize("array", [[0.0] * 12, [0.0] * 14])
def test_arrays_of_another_length(array: list[float]) -> None:
    with pytest.raises(ValueError, match=f"13 numbers, not {len(array)}"):
        Moments.from_array(array)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({0: -1.0}, "counts"),
        ({0: 2.5}, "counts"),
        ({0: math.nan}, "counts"),
        ({0: 1e300}, r"from 0 to 2\^53"),
        ({0: 2.0**53 + 2}, r"from 0 to 2\^53"),
        ({1: 4.0}, "more zeros than elements"),
        ({2: 3.0, 3: 1.0}, "more NaN and infinities than elements"),
        ({4: -7.0}, "not negative"),
        ({5: -8.0}, "not negative"),
        ({8: -1e-300}, "not negative"),
        ({6: 1.0, 7: math.nan}, "second number"),
        ({12: -4.0}, "largest absolute value is not negative"),
        ({4: math.nan}, "no NaN was counted"),
        ({12: math.nan}, "no NaN was counted"),
        ({12: math.inf}, "no infinity was counted"),
        ({12: 0.0}, "where, and only where, all elements are"),
        ({1: 3.0}, "where, and only where, all elements are"),
        ({0: 0.0, 1: 0.0, 12: 0.0}, "sums are 0"),
    ],
)
def test_arrays_that_no_elements_have(places: dict[int, float], message: str) -> None:
    array = Moments.of(np.array([3.0, 0.0, -4.0])).to_array()
    for place, number in places.items():
        array[place] = number
    with pytest.raises(ValueError, match=message):
        Moments.from_array(array)


def test_replaced_elements_count_twice() -> None:
    """NaN that were measured as 0 are zeros too, alone and together with others that were not replaced."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.nan, 0.0])
    replaced = normclip.clip_grads_([parameter], 1.0, nonfinite="zero").stats.moments
    for moments in (replaced, replaced + Moments.of(np.array([math.nan])), replaced + Moments.of(np.ones(1))):
        assert same(Moments.from_array(moments.to_array()).to_array().tolist(), moments.to_array().tolist())


def test_zeros_of_either_sign_have_one_hash() -> None:
    a = Moments.of(np.array([3.0]))
    array = a.to_array()
    array[array == 0.0] = -0.0
    b = Moments.from_array(array)
    assert a == b
    assert hash(a) == hash(b)
    assert not np.signbit(b.to_array()).any()


def check_huge(moments: Moments, values: list[float]) -> None:
    n, exact = len(values), [Fraction(abs(value)) for value in values]
    mean = sum(exact) / n
    assert moments.mean_abs == pytest.approx(float(mean), rel=1e-14)
    assert moments.l1 == (float(sum(exact)) if sum(exact) < Fraction(sys.float_info.max) else math.inf)
    ratio = mean * mean / (sum(x * x for x in exact) / n)
    assert moments.density == pytest.approx(float(ratio), rel=1e-14)
    assert moments.sign_cosine == pytest.approx(math.sqrt(float(ratio * n / sum(x != 0 for x in exact))), rel=1e-14)


@pytest.mark.parametrize(
    "values",
    [
        [8e307] * 4,
        [8e307, 8e307, 8e307, 0.0],
        [8e307, -8e307, 1e300, 1.0, 1e-300, 5e-324],
        [2.0**960],
        [2.0**959, 2.0**960],
        [1.7e308],
        [1e307] * 100 + [1.0] * 100,
    ],
)
def test_sums_beyond_float64(values: list[float]) -> None:
    """Figures are right wherever the L2 norm is finite, though Σ|x| may not be."""
    check_huge(Moments.of(np.array(values)), values)
    for size in (1, 2, 3):
        parts = [Moments.of(np.array(values[at : at + size])) for at in range(0, len(values), size)]
        check_huge(sum(parts, Moments()), values)
        check_huge(Moments.from_array(sum(reversed(parts), Moments()).to_array()), values)
    table = normclip.stats([np.array(values)], per_tensor=True).per_tensor
    assert table is not None
    assert table.mean_abs[0] == Moments.of(np.array(values)).mean_abs


def test_moments_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Moments().count = 3  # type: ignore[misc]


def test_sixteen_thousand_parts() -> None:
    """As many as the ranks of a large job: no error grows."""
    values = np.random.default_rng(0).standard_normal((16_384, 64)).astype(np.float32)
    merged = sum((Moments.of(part) for part in values), Moments())
    exact = math.sqrt(math.fsum((values.astype(np.float64) ** 2).ravel()))
    assert merged.l2 == pytest.approx(exact, rel=1e-15)
    assert merged.count == values.size
