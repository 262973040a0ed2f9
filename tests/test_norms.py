"""Norms against the oracle: every element type, layout, magnitude and order."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import normclip
from support.oracle import TOLERANCE, assert_near, assert_norm, exact_norm
from support.tensors import DTYPES, EXPONENTS, LAYOUTS, NO_DOUBLES, NUMPY_DTYPES, Recipe, recipes

ORDERS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 7.0, 50.0, 1000.0, math.inf, -0.5, -1.0, -2.5, -math.inf)

orders = st.sampled_from(ORDERS) | st.floats(0.5, 60.0) | st.floats(-30.0, -0.5)


@given(st.lists(recipes(), max_size=4), orders)
@settings(max_examples=400)
# Blocks of which each has a sum of squares that fits, and which together have not.
@example([Recipe("float64", size=1, exponents=(511, 511)), Recipe("float64", size=1, exponents=(511, 511), seed=1)] * 2, 2.0)
@example([Recipe("float64", size=1, specials=((math.inf, 0.0),))], -1.0)
def test_any_tensors_in_any_order(given: list[Recipe], order: float) -> None:
    tensors = [recipe.make() for recipe in given]
    assert_norm(normclip.total_norm(tensors, order), tensors, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_promised_precision(dtype: str, order: float) -> None:
    """Before the result is rounded to float32, and over more than one block."""
    tensors = [Recipe(dtype, size, library="torch", zeros=0.1 * (order >= 0), seed=size).make() for size in (1, 31, 1000, 65_536, 140_001)]
    assert_norm(normclip.total_norm([*tensors, NO_DOUBLES], order), [*tensors, NO_DOUBLES], order)


@pytest.mark.parametrize("order", [0.0, 1.0, 2.0, 2.5, -1.0, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_layouts(dtype: str, layout: str, order: float) -> None:
    array = Recipe(dtype, 2 * 65_536 + 4, layout).make()
    assert_norm(normclip.total_norm(array, order), [array], order)


@given(st.data())
@settings(max_examples=50)
def test_all_magnitudes_at_once(data: st.DataObject) -> None:
    """Tensors near both ends of what float64 can hold, in one norm."""
    tensors = [
        Recipe("float64", size=data.draw(st.integers(1, 40)), exponents=(exponent, exponent), seed=exponent % 7).make()
        for exponent in data.draw(
            st.lists(st.sampled_from([-1074, -1022, -700, -450, -340, 0, 340, 450, 511, 700, 1000]), min_size=1, max_size=5)
        )
    ]
    order = data.draw(orders)
    assert_norm(normclip.total_norm(tensors, order), tensors, order)


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0, 4.0, 7.0, 50.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_sums_of_blocks_do_not_leave_the_range_that_each_is_in(order: float, side: int) -> None:
    """1000 blocks whose sums of powers all fit in float64, while their total does not; and as many that are as small."""
    edge = np.exp2(side * 1021.0 / order)
    tensors = list(np.full((1000, 1), edge))
    assert_norm(normclip.total_norm(tensors, order), tensors, order)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize(("value", "count"), [(1e20, 1000), (1e38, 100_000), (1e-40, 70_000), (1e-45, 10)])
def test_float32_neither_overflows_nor_underflows(value: float, count: int, order: float) -> None:
    array = np.full(count, value, np.float32)
    expected = float(array[0]) * (1.0 if order == math.inf else count ** (1.0 / order))
    assert normclip.total_norm(array, order) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e300, 1e-300, 1e-310])
def test_float64_norm_scales_with_its_elements(scale: float) -> None:
    assert normclip.total_norm(np.array([3.0, -4.0]) * scale) == pytest.approx(5.0 * scale, rel=1e-13, abs=math.ulp(0.0))


def test_huge_elements_beside_tiny_ones() -> None:
    assert normclip.total_norm([np.array([1e-200, 4e200]), np.full(100_000, 1e-200), np.array([3e200])]) == pytest.approx(
        5e200, rel=TOLERANCE
    )


def test_norm_beyond_float32_is_infinite_as_a_float32_tensor_only() -> None:
    array = np.full(1_000_000, 1e38, np.float32)
    assert normclip.total_norm(array) == pytest.approx(1e41, rel=1e-7)
    of_torch = normclip.total_norm(torch.from_numpy(array))
    assert (of_torch.item(), of_torch.dtype) == (math.inf, torch.float32)


def test_half_precision_norms_exceed_half_precision() -> None:
    assert normclip.total_norm(np.full(100, 60_000, np.float16)) == pytest.approx(600_000 - 320, rel=1e-3)
    assert normclip.total_norm(torch.full((100,), 60_000.0, dtype=torch.float16), 1).item() == pytest.approx(6e6, rel=1e-3)


def test_long_float32_sums_keep_their_precision() -> None:
    array = np.full(4_000_000, 0.1, np.float32)
    exact = float(np.float32(0.1)) * 4_000_000
    assert_near(normclip.total_norm(array, 1), exact)


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 2.0, 3.0, math.inf, -1.0, -math.inf])
@pytest.mark.parametrize("specials", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, math.nan), (math.nan, -math.inf, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_beats_infinity_beats_numbers(dtype: str, specials: tuple[float, ...], order: float) -> None:
    # One in each of three blocks, in the middle of a vector register or at the very end.
    places = tuple(zip(specials, (0.3, 0.5, 1.0), strict=False))
    tensors = [Recipe(dtype, 150_000, library="torch", specials=places).make(), NO_DOUBLES]
    exact = exact_norm(tensors, order)
    if math.nan in specials:
        assert math.isnan(exact)
    elif order > 0.0:
        assert exact == math.inf
    assert_norm(normclip.total_norm(tensors, order), tensors, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "values",
    [[math.inf], [-math.inf, math.inf], [0.0], [0.0, -0.0], [0.0, math.inf], [5e-324, 0.0], [math.nan, 0.0], [1.7976931348623157e308]],
)
def test_edge_values(values: list[float], order: float) -> None:
    array = np.array(values)
    assert_norm(normclip.total_norm(array, order), [array], order)
    pieces = list(array[:, np.newaxis])
    assert_norm(normclip.total_norm(pieces, order), pieces, order)


@pytest.mark.parametrize("order", ORDERS)
def test_no_elements(order: float) -> None:
    assert normclip.total_norm([], order) == 0.0
    assert normclip.total_norm(np.empty(0), order) == 0.0
    assert normclip.total_norm([np.empty((3, 0, 2), np.float16), np.empty(0, np.complex128)], order) == 0.0
    assert_norm(normclip.total_norm([torch.empty(0), torch.empty(2, 0)], order), [torch.empty(0)], order)
    # They add nothing to others either.
    assert normclip.total_norm([np.empty(0), np.array([-2.0])], order) == (1.0 if order == 0.0 else pytest.approx(2.0, rel=TOLERANCE))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_zero_dimensional(dtype: str, order: float) -> None:
    assert_norm(normclip.total_norm(np.array(-3, dtype), order), [np.array(-3, dtype)], order)
    tensor = torch.tensor(-3, dtype=getattr(torch, dtype))
    assert_norm(normclip.total_norm(tensor, order), [tensor], order)


@pytest.mark.parametrize(
    "collection", [list, tuple, iter, lambda tensors: (tensor for tensor in tensors), lambda tensors: dict(enumerate(tensors)).values()]
)
def test_collections(collection: Callable[[list[Any]], Any]) -> None:
    assert normclip.total_norm(collection([torch.tensor([3.0]), torch.tensor([[4.0]])])).item() == 5.0


def test_one_tensor_alone() -> None:
    assert normclip.total_norm(np.array([[3.0, 4.0]])) == 5.0
    assert normclip.total_norm(torch.tensor([[3.0, 4.0]])).item() == 5.0
    # Not a collection of its rows: a row of equal memory elsewhere would count once.
    assert normclip.total_norm(np.ones((4, 4))) == 4.0


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (1, 7.0),
        (True, 7.0),
        ("inf", 4.0),
        ("-inf", 3.0),
        (0, 2.0),
        (np.float32(2.0), 5.0),
        (torch.tensor(1.0), 7.0),
        (-1, 12.0 / 7.0),
        (-math.inf, 3.0),
    ],
)
def test_kinds_of_orders(order: Any, expected: float) -> None:
    assert normclip.total_norm(np.array([3.0, -4.0]), order) == pytest.approx(expected, rel=TOLERANCE)
    assert normclip.get_total_norm([torch.tensor([3.0, -4.0])], order).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("order", [1e300, 5000.0, 1e-2, -1e-2, -5000.0, -1e300])
def test_extreme_orders_of_one_element(order: float) -> None:
    """Whatever the order, the norm of one number is its absolute value."""
    assert_near(normclip.total_norm(np.array([-3.0]), order), 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_norms_are_tensors_without_dimensions(dtype: str) -> None:
    tensor = torch.ones(4, dtype=getattr(torch, dtype), requires_grad=True)
    for norm in (normclip.total_norm(tensor), normclip.get_total_norm([tensor])):
        assert (norm.item(), norm.shape, norm.requires_grad) == (2.0, (), False)
        assert norm.dtype is (torch.float64 if dtype in ("float64", "complex128") else torch.float32)


def test_mixed_libraries_and_types() -> None:
    half, double = torch.tensor([3.0], dtype=torch.float16), np.array([4.0])
    assert_norm(normclip.total_norm([half, double]), [half, double])
    assert_norm(normclip.total_norm([double, half]), [half, double])
    assert normclip.total_norm([half, double]).dtype is torch.float64
    assert normclip.total_norm([np.float16([3.0]), np.complex64([4j])]) == 5.0


def test_default_settings_of_torch_do_not_leak_in() -> None:
    with torch.device("meta"):
        norm = normclip.total_norm(torch.ones(4, device="cpu"))
    assert (norm.device.type, norm.item()) == ("cpu", 2.0)


@pytest.mark.parametrize("order", ORDERS)
def test_same_memory_counts_once(order: float) -> None:
    array = Recipe("float64", 70_000).make()
    once = normclip.total_norm(array, order)
    assert normclip.total_norm([array, np.ones(1), array, array.reshape(7, -1).T, array[::-1]], order) == normclip.total_norm(
        [array, np.ones(1)], order
    )
    assert normclip.total_norm([array, array], order) == once
    # Equal values elsewhere are other memory, and so is a part.
    parts = [array, array.copy(), array[:5]]
    assert_norm(normclip.total_norm(parts, order), parts, order)


def sparse(values: list[float], indices: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([indices]), torch.tensor(values, dtype=dtype), (10,), check_invariants=True)


@pytest.mark.parametrize("order", [0.0, 1.0, 2.0, 2.5, math.inf])
def test_sparse_tensors_count_by_their_coalesced_values(order: float) -> None:
    repeated = sparse([3.0, 4.0, 8.0, -8.0, 1.0], [0, 1, 1, 2, 2])
    for tensor in (repeated, repeated.coalesce()):
        assert_norm(normclip.total_norm([tensor, torch.ones(3)], order), [tensor, torch.ones(3)], order)
    empty = sparse([], [])
    assert normclip.total_norm(empty, order).item() == 0.0


@pytest.mark.parametrize("coalesced", [True, False])
def test_same_sparse_tensor_counts_once(coalesced: bool) -> None:
    tensor = sparse([3.0, 4.0, 8.0], [0, 1, 1])
    tensor = tensor.coalesce() if coalesced else tensor
    assert normclip.total_norm([tensor, tensor]).item() == normclip.total_norm(tensor).item()


def test_hybrid_sparse_tensors() -> None:
    gradient = torch.sparse_coo_tensor([[0, 2, 2]], torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 3.0]]), (4, 2), check_invariants=True)
    assert_norm(normclip.total_norm(gradient), [gradient])


@pytest.mark.parametrize("exponent", [-120, 0, 100, EXPONENTS["complex64"][1]])
@pytest.mark.parametrize("order", ORDERS)
def test_moduli_of_complex_numbers(order: float, exponent: int) -> None:
    values = np.exp2(float(exponent)) * np.exp(1j * np.linspace(0.0, 6.0, 999))
    for array in (values.astype(np.complex64), values):
        assert_norm(normclip.total_norm(array, order), [array], order)
    # Conjugation and negation, which torch leaves for later, change no norm.
    tensor = torch.from_numpy(values)
    for view in (tensor.conj(), torch._neg_view(tensor), tensor.conj().imag):
        assert_norm(normclip.total_norm(view, order), [view.resolve_conj().resolve_neg()], order)


def test_measuring_changes_nothing() -> None:
    tensor = torch.randn(100_000)
    before = tensor.clone()
    for order in ORDERS:
        normclip.total_norm(tensor, order)
    assert torch.equal(tensor, before)
    assert tensor._version == 0


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normclip.total_norm([torch.tensor([math.nan, 1e-40, 3e38])] * 2, -1)
        normclip.total_norm(np.array([0.0, math.inf, 5e-324]), -2.5)
