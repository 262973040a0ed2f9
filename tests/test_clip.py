"""Clipping, scaling and clamping in place: the values that are written, and that nothing else is."""

import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normclip
from normclip import _core
from support.oracle import TOLERANCE, exact_norm
from support.tensors import DTYPES, NUMPY_DTYPES, REAL_DTYPES, WRITABLE_LAYOUTS, Recipe, as_array, raw, recipes

finite_recipes = recipes(layouts=tuple(WRITABLE_LAYOUTS), finite=True)

# Relative error of one rounding.
EPSILON = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53, "complex64": 2**-24, "complex128": 2**-53}


def same(measured: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits are the same, NaN being one value."""
    either = torch.where(expected.isnan(), torch.nan, expected), torch.where(measured.isnan(), torch.nan, measured)
    return raw(either[0]) == raw(either[1])


def test_three_four_five() -> None:
    array = np.array([3.0, 4.0], np.float32)
    assert normclip.clip_(array, 1.0) == 5.0
    assert array.tolist() == [np.float32(0.6), np.float32(0.8)]
    tensor = torch.tensor([3.0, 4.0])
    assert normclip.clip_([tensor], 1.0).item() == 5.0
    assert torch.equal(tensor, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 2.5, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_norm_is_the_limit(dtype: str, order: float) -> None:
    tensors = [Recipe(dtype, size, library="torch", exponents=(-3, 3), seed=size).make() for size in (3, 1000, 70_000)]
    limit = exact_norm(tensors, order) / 8.0
    normclip.clip_(tensors, limit, order)
    # The norm is within its tolerance, the coefficient is rounded, and so is each product; roundings of products average out.
    assert exact_norm(tensors, order) == pytest.approx(limit, rel=3 * EPSILON[dtype] + TOLERANCE)


@given(finite_recipes, st.floats(0.0, 4.0), st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_clipped_elements_are_scaled_by_one_coefficient(recipe: Recipe, share: float, order: float) -> None:
    tensor = recipe.make()
    norm = exact_norm([tensor], order)
    limit = min(norm, 1e300) * share
    expected = recipe.make()
    if limit < norm:  # and where it overflows, by 0
        normclip.scale_(expected, limit / norm)
    normclip.clip_(tensor, limit, order)
    # The measured norm may differ from the oracle's within its tolerance, and so may the coefficient.
    tolerance = 4 * EPSILON[recipe.dtype] + TOLERANCE
    smallest = torch.finfo(getattr(torch, recipe.dtype)).smallest_normal * 4 * EPSILON[recipe.dtype]
    np.testing.assert_allclose(as_double(tensor), as_double(expected), rtol=tolerance, atol=smallest)


def as_double(tensor: Any) -> np.ndarray:
    """The elements in double precision."""
    array = as_array(tensor)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


@pytest.mark.parametrize("factor", [0.3, -1.7, 1e-3, 2.0**-126, 1.0 + 1e-7, 1e30, 0.0])
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_scaling_has_the_bits_of_torch(dtype: str, factor: float) -> None:
    # All magnitudes of the type: products overflow, underflow and become subnormal.
    low, high = {"float16": (-24, 15), "bfloat16": (-133, 127), "float32": (-149, 127), "float64": (-1074, 1023)}[dtype]
    specials = ((math.inf, 0.1), (-math.inf, 0.2), (math.nan, 0.3), (0.0, 0.4), (-0.0, 0.5))
    tensor = Recipe(dtype, 100_003, library="torch", exponents=(low, high), specials=specials).make()
    expected = tensor.clone().mul_(factor)
    normclip.scale_(tensor, factor)
    assert same(tensor, expected)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_scaling_complex_numbers(dtype: str) -> None:
    tensor = Recipe(dtype, 1003, library="torch").make()
    expected = torch.view_as_real(tensor) * 0.3
    normclip.scale_(tensor, 0.3)
    assert same(torch.view_as_real(tensor), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_is_scaled_right(dtype: str) -> None:
    """All 65 536 bit patterns, against a product that is exact before its one rounding."""
    tensor = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    for factor in (1.0 / 3.0, 1e-4, 300.0):
        scaled = tensor.clone()
        normclip.scale_(scaled, factor)
        # An 11-bit number times one of 24 bits: exact in float64.
        exact = tensor.to(torch.float64) * float(np.float32(factor))
        assert same(scaled, exact.to(torch.float32).to(tensor.dtype))


def test_tiny_coefficients_do_not_erase_float32() -> None:
    """The coefficient, about 5e-43, has few bits in float32."""
    array = np.full(4, 1e38, np.float32)
    assert normclip.clip_(array, 1e-4) == pytest.approx(2e38, rel=1e-7)
    np.testing.assert_allclose(array, 5e-5, rtol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "value", "factor"),
    [
        ("float32", 3e38, 1e-60),
        ("float32", 3e38, 3e-46),
        ("float32", 1e-40, 1e40),
        ("bfloat16", 1e-38, 1e39),
        ("bfloat16", 3e38, 1e-41),
        ("float16", 6e-8, 1e40),
    ],
)
def test_factors_beyond_float32(dtype: str, value: float, factor: float) -> None:
    tensor = torch.tensor([value, -value, 0.0], dtype=getattr(torch, dtype))
    expected = (tensor.to(torch.float64) * factor).to(torch.float32).to(tensor.dtype)
    normclip.scale_(tensor, factor)
    assert same(tensor, expected)


@pytest.mark.parametrize("limit", [0.0, 0.123, 1.0, 100.0, 3e4, math.inf])
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_clamping_agrees_with_torch(dtype: str, limit: float) -> None:
    specials = ((math.inf, 0.1), (-math.inf, 0.2), (math.nan, 0.3), (limit, 0.5), (-limit, 0.6))
    tensor = Recipe(dtype, 100_003, library="torch", exponents=(-10, 12), zeros=0.1, specials=specials).make()
    expected = tensor.clamp(-limit, limit)
    normclip.clamp_(tensor, limit)
    assert torch.allclose(tensor, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_clamping_keeps_the_bits_of_what_is_within(dtype: str) -> None:
    tensor = torch.tensor([-0.0, 0.0, -1.0, 1.0, math.nan, -math.nan, 5e-45], dtype=getattr(torch, dtype))
    before = raw(tensor)
    normclip.clamp_(tensor, 1.0)
    assert raw(tensor) == before


def test_limits_beyond_the_element_type_clamp_nothing() -> None:
    for tensor in (torch.tensor([math.inf, -6e4], dtype=torch.float16), torch.tensor([math.inf, -3e38])):
        before = tensor.clone()
        normclip.clamp_(tensor, 1e300)
        assert torch.equal(tensor, before)


@given(finite_recipes, st.sampled_from(["scale", "clamp"]))
@settings(max_examples=150)
def test_only_the_elements_of_a_view_are_written(recipe: Recipe, operation: str) -> None:
    memory, view = recipe.place()
    expected_memory, expected_view = recipe.place()
    if operation == "clamp" and not recipe.dtype.startswith("complex"):
        normclip.clamp_(view, 1.0)
        expected = np.clip(as_double(expected_view), -1.0, 1.0)
    else:
        normclip.scale_(view, 0.5)
        expected = as_double(expected_view) * 0.5
        # What becomes subnormal is rounded.
        expected = as_double(torch.from_numpy(expected).to(getattr(torch, recipe.dtype)))
    np.testing.assert_array_equal(as_double(view), expected)
    # With the old elements put back, all of the memory is as it was.
    if isinstance(memory, bytearray):
        memory[1:-1] = expected_memory[1:-1]
    else:
        view[...] = expected_view
    assert raw(memory) == raw(expected_memory)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("limit", [5.0, 7.0, 1e300, math.inf])
def test_nothing_is_written_within_the_limit(limit: float, order: float) -> None:
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[-2.0]])]
    before = [raw(tensor) for tensor in tensors]
    normclip.clip_(tensors, limit, order)
    assert [raw(tensor) for tensor in tensors] == before
    assert [tensor._version for tensor in tensors] == [0, 0]


def versions(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def test_versions_count_writes() -> None:
    tensors = [torch.tensor([0.5]), torch.tensor([2.0, 3.0]), torch.empty(0)]
    normclip.scale_(tensors, 1.0)
    normclip.clamp_(tensors, 4.0)
    normclip.clamp_(tensors, math.inf)
    assert versions(tensors) == [0, 0, 0]
    normclip.clamp_(tensors, 2.5)
    assert versions(tensors) == [0, 1, 0]
    normclip.scale_(tensors, 0.5)
    assert versions(tensors) == [1, 2, 0]
    normclip.clip_(tensors, 0.1)
    assert versions(tensors) == [2, 3, 0]


@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_nan_is_within_every_limit(limit: float) -> None:
    tensors = [torch.tensor([math.nan, 0.5]), torch.full((70_000,), math.nan)]
    normclip.clamp_(tensors, limit)
    assert versions(tensors) == [0, 0]


@pytest.mark.parametrize(
    "change", [lambda x: normclip.scale_(x, 0.5), lambda x: normclip.clip_([x], 0.1), lambda x: normclip.clamp_(x, 0.1)]
)
def test_autograd_notices(change: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(3, requires_grad=True)
    y = x.exp()  # whose backward needs y itself
    change(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autograd_is_content_where_nothing_was_written() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    normclip.clip_(y, 100.0)
    normclip.clamp_(y, 100.0)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_every_alias_counts_the_write() -> None:
    """`.data` and NumPy arrays share the memory of a tensor and not its version."""
    for alias in (lambda tensor: tensor.data, lambda tensor: tensor.numpy()):
        tensor = torch.tensor([3.0, 4.0])
        normclip.clip_([alias(tensor), tensor], 1.0)
        assert torch.equal(tensor, torch.tensor([0.6, 0.8]))
        assert tensor._version == 1


def test_inference_tensors_are_clipped() -> None:
    with torch.inference_mode():
        tensor = torch.tensor([3.0, 4.0])
        assert normclip.clip_(tensor, 1.0).item() == 5.0
        assert torch.equal(tensor, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("order", [0.0, 1.0, 2.0, 2.5, math.inf])
def test_infinite_limit_only_reads(order: float) -> None:
    array = np.array([3.0, 4.0])
    array.flags.writeable = False
    expanded, overlapping = torch.ones(1).expand(3), torch.ones(8)
    tensors = [array, expanded, overlapping[:5], overlapping[3:], torch.tensor([1e30])]
    assert normclip.clip_(tensors, math.inf, order) == normclip.total_norm(tensors, order)
    assert normclip.clip_(array, math.inf, order) == normclip.total_norm(array, order)
    for special in (math.nan, math.inf):
        tensor = torch.tensor([special, 1.0])
        assert not math.isfinite(normclip.clip_(tensor, math.inf))
        assert tensor[1] == 1.0


def test_zero_limit_zeroes() -> None:
    tensor = torch.tensor([-1.0, 2.0])
    assert normclip.clip_(tensor, 0.0).item() == pytest.approx(math.sqrt(5.0))
    assert torch.equal(tensor, torch.zeros(2))
    assert normclip.clip_(tensor, 0.0).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("special", "expected"), [(math.nan, [math.nan, math.nan]), (math.inf, [math.nan, 0.0]), (-math.inf, [math.nan, 0.0])]
)
def test_norms_that_are_not_finite(dtype: str, special: float, expected: list[float]) -> None:
    """As in torch: NaN spreads, and infinity leaves zeros and NaN."""
    tensor = torch.tensor([special, -2.0], dtype=getattr(torch, dtype))
    normclip.clip_(tensor, 1.0)
    parts = torch.view_as_real(tensor)[:, 0] if tensor.is_complex() else tensor
    np.testing.assert_array_equal(parts.float().numpy(), np.float32(expected))


def test_duplicates_count_once_and_are_scaled_once() -> None:
    tensor, other = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert normclip.clip_([tensor, other, tensor, tensor[::1], tensor.view(1, 2), tensor.detach()], 1.0).item() == 5.0
    assert torch.equal(tensor, torch.tensor([0.6, 0.0]))
    assert other._version == 1
    assert tensor._version >= 1, "views share a counter, and each may move it"
    normclip.scale_([other, other], 0.5)
    assert other.item() == pytest.approx(0.4)


def test_tied_parameters_are_clipped_once() -> None:
    embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    head(embedding(torch.tensor([1, 3]))).square().sum().backward()
    expected = embedding.weight.grad / embedding.weight.grad.norm()
    # A list with both, which `.parameters()` of a common parent would not give.
    normclip.clip_grad_norm_([*embedding.parameters(), *head.parameters()], 1.0)
    torch.testing.assert_close(embedding.weight.grad, expected, rtol=1e-5, atol=0.0)


def coo(values: torch.Tensor, *, coalesced: bool) -> torch.Tensor:
    tensor = torch.sparse_coo_tensor([[0, 2, 2, 4]], values, (6, *values.shape[1:]), check_invariants=True)
    return tensor.coalesce() if coalesced else tensor


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize(
    "values", [torch.tensor([3.0, 4.0, 8.0, -2.0]), torch.arange(8.0).reshape(4, 2), torch.tensor([1.0, 2.0, -2.0, 4.0]).double()]
)
def test_sparse_gradients_are_clipped_as_dense_ones(values: torch.Tensor, coalesced: bool) -> None:
    tensor = coo(values, coalesced=coalesced)
    dense = tensor.to_dense()
    measured = normclip.clip_([tensor, torch.ones(1)], 0.5)
    expected = normclip.clip_([dense, torch.ones(1)], 0.5)
    assert measured.item() == expected.item()
    torch.testing.assert_close(tensor.to_dense(), dense)
    assert tensor.is_coalesced() == coalesced
    assert tensor._version == 1


def test_sparse_gradients_are_clamped() -> None:
    tensor = coo(torch.tensor([3.0, 4.0, 8.0, -2.0]), coalesced=True)
    normclip.clamp_(tensor, 2.5)
    assert torch.equal(tensor.to_dense(), torch.tensor([2.5, 0.0, 2.5, 0.0, -2.0, 0.0]))


def test_same_sparse_tensor_is_scaled_once() -> None:
    for coalesced in (True, False):
        tensor = coo(torch.tensor([3.0, 1.0, 3.0, 0.0]), coalesced=coalesced)
        normclip.scale_([tensor, tensor], 0.5)
        assert torch.equal(tensor.to_dense(), torch.tensor([1.5, 0.0, 2.0, 0.0, 0.0, 0.0]))


def test_lazy_conjugates_and_negatives_are_scaled() -> None:
    base = torch.tensor([1.0 + 2.0j, -3.0j])
    normclip.scale_([base.conj()], 0.5)
    assert torch.equal(base, torch.tensor([0.5 + 1.0j, -1.5j]))
    imaginary = base.conj().imag  # a view with negated elements
    normclip.clamp_(imaginary, 1.25)
    assert torch.equal(base, torch.tensor([0.5 + 1.0j, -1.25j]))


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_arrays_and_tensors_of_one_kind_get_the_same_bits(dtype: str) -> None:
    array = Recipe(dtype, 70_001, exponents=(-3, 3)).make()
    tensor = torch.from_numpy(array.copy())
    normclip.clip_(array, 1.0)
    normclip.clip_(tensor, 1.0)
    assert raw(array) == raw(tensor)


def test_interleaved_tensors_are_not_overlapping() -> None:
    matrix = torch.ones(4, 6)
    normclip.scale_([matrix[:, :2], matrix[:, 2:5:2], matrix[:, 3]], 0.5)
    assert torch.equal(matrix[0], torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 1.0]))


def test_scaling_and_clamping_return_nothing() -> None:
    assert normclip.scale_(np.ones(1), 0.5) is None
    assert normclip.clamp_(np.ones(1), 0.5) is None


@pytest.mark.parametrize("tensors", [[], (), np.empty(0), [torch.empty(0)]])
def test_nothing_to_change(tensors: Any) -> None:
    normclip.scale_(tensors, 0.5)
    normclip.clamp_(tensors, 0.5)
    assert normclip.clip_(tensors, 0.0) == 0.0


def test_a_limit_of_negative_zero_is_zero() -> None:
    tensor = torch.tensor([3.0, -4.0])
    normclip.clip_(tensor, -0.0)
    assert raw(tensor) == raw(torch.tensor([0.0, -0.0]))


def test_norms_are_ordinary_tensors() -> None:
    """They come by the C exchange API, where torch has it."""
    for dtype, expected in ((torch.float32, 5.0), (torch.float64, 5.0), (torch.float32, 2.0**-140)):
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        parameter.grad = torch.tensor([0.6, 0.8], dtype=torch.float64).mul(expected).to(dtype)
        norm = normclip.clip_grad_norm_([parameter], math.inf)
        assert (type(norm), norm.shape, norm.dtype, norm.device.type) == (torch.Tensor, (), dtype, "cpu")
        assert (norm.requires_grad, norm.is_leaf, norm._version) == (False, True, 0)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        copy = pickle.loads(pickle.dumps(norm))
        norm.add_(1.0)
        del parameter
        gc.collect()
        assert (norm - copy).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no C exchange API")
def test_norms_without_the_exchange_api_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [torch.tensor([3.0, 4.0e-40]), torch.tensor([1.0e200], dtype=torch.float64)]
    expected = [normclip.get_total_norm(grads[:1]), normclip.get_total_norm(grads)]
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    for norm, before in zip([normclip.get_total_norm(grads[:1]), normclip.get_total_norm(grads)], expected, strict=True):
        assert (norm.dtype, norm.item(), norm.device) == (before.dtype, before.item(), before.device)


def test_gradients_in_memory_are_clipped_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    for name in ("collect", "collect_grads", "mark_written"):
        monkeypatch.delattr(_core, name)
    assert normclip.clip_grad_norm_(parameters, 1.0).item() == 5.0
    assert [parameters[0].grad._version, parameters[2].grad._version] == [1, 1]
    assert normclip.clip_grad_norm_(parameters, 2.0).item() == pytest.approx(1.0)
    assert [parameters[0].grad._version, parameters[2].grad._version] == [1, 1]
