"""What is measured of device tensors, against the Rust backend."""

import math

import numpy as np
import pytest
import torch

import normclip
from normclip import _backends, _core
from normclip._backends import choose
from normclip._core import TensorList

from .conftest import CHUNK
from .tensors import ORDERS, Place, by_dtype, every_kind, exact_norm, layouts, make

# The interpreter computes in NumPy, which warns of overflow, where a device has none.
# That of Triton 3.6 makes numbers of arrays, of which NumPy warns before 2.4 refuses it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

with_pairs = pytest.mark.parametrize("place", ["triton", "pairs", "torch"], indirect=True)


# ---- Norms ----


@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_every_kind_of_tensor(place: Place, order: float) -> None:
    tensors = every_kind()
    assert exact_norm([place(tensor) for tensor in tensors], order) == pytest.approx(TensorList(tensors).norm(order), rel=1e-12)


@by_dtype
def test_norms_are_0_dim_tensors_where_the_tensors_are(place: Place, dtype: torch.dtype) -> None:
    tensor = place(make(dtype, 10))
    norm = normclip.total_norm(tensor)
    assert (norm.shape, norm.device) == ((), tensor.device)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.item() == pytest.approx(TensorList([make(dtype, 10)]).norm(2.0), rel=1e-12 if dtype == torch.float64 else 1e-7)


@with_pairs
@pytest.mark.parametrize("order", [2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, -1.0])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_values(place: Place, special: float, order: float) -> None:
    tensor = make(torch.float32, 2 * CHUNK)
    tensor[CHUNK + 3] = special
    expected = TensorList([tensor]).norm(order)
    assert exact_norm([place(tensor)], order) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_and_zeros(place: Place, order: float) -> None:
    assert normclip.total_norm([place(torch.empty(0))], order).item() == 0.0
    assert normclip.total_norm([place(torch.zeros(5))], order).item() == TensorList([torch.zeros(5)]).norm(order)


@with_pairs
@pytest.mark.parametrize(
    ("dtype", "value", "order"),
    [
        (torch.float32, 1e20, 2.0),
        (torch.float32, 1e-30, 2.0),
        (torch.float32, 1e38, 1.0),
        (torch.bfloat16, 1e-38, 2.0),
        (torch.float32, 1e20, 3.0),
        (torch.float16, 60000.0, 2.0),
        (torch.bfloat16, 1e38, 2.0),
        (torch.float64, 1e200, 2.0),
        (torch.float64, 1e-200, 2.0),
        (torch.float64, 1e200, 3.0),
        (torch.float64, 1e-200, -2.0),
    ],
)
def test_no_power_overflows(place: Place, dtype: torch.dtype, value: float, order: float) -> None:
    tensor = torch.full((CHUNK + 5,), value, dtype=dtype)
    assert exact_norm([place(tensor)], order) == pytest.approx(TensorList([tensor]).norm(order), rel=1e-12)


def test_double_chunks_at_all_scales_together(place: Place) -> None:
    tensors = [torch.full((CHUNK + 1,), value, dtype=torch.float64) for value in (1e-170, 1.0, 1e160)]
    for chosen in (tensors, tensors[:2], tensors[1:], tensors[:1], [*tensors, torch.ones(3)]):
        assert exact_norm([place(tensor) for tensor in chosen], 2.0) == pytest.approx(TensorList(chosen).norm(2.0), rel=1e-12)


def test_a_thousand_tiny_tensors(place: Place) -> None:
    tensors = [make(torch.float32, 1 + seed % 5, seed) for seed in range(1000)]
    assert exact_norm([place(tensor) for tensor in tensors], 2.0) == pytest.approx(TensorList(tensors).norm(2.0), rel=1e-12)


def test_the_same_bits_again(place: Place) -> None:
    tensors = [place(tensor) for tensor in every_kind()]
    assert exact_norm(tensors, 2.0) == exact_norm(tensors, 2.0)


# ---- Statistics ----


@with_pairs
@pytest.mark.parametrize("finite_only", [False, True])
def test_statistics(place: Place, finite_only: bool) -> None:
    tensors = [*every_kind(), torch.zeros(9), torch.full((3,), 1e200, dtype=torch.float64), torch.full((3,), 1e-200, dtype=torch.float64)]
    for tensor, special in zip(tensors[2::5], (math.nan, math.inf, -math.inf), strict=False):
        tensor[:1] = special
    batch = _backends.collect([place(tensor) for tensor in tensors])
    groups = [index % 3 for index in range(len(tensors))]
    found, grouped, table = batch.statistics(groups, finite_only=finite_only)
    expected, expected_grouped, expected_table = TensorList(tensors).statistics(groups, finite_only=finite_only)
    np.testing.assert_allclose(np.frombuffer(table), np.frombuffer(expected_table), rtol=1e-12)
    for x, y in zip([found, *grouped], [expected, *expected_grouped], strict=True):
        assert (x.count, x.zeros, x.nans, x.infs) == (y.count, y.zeros, y.nans, y.infs)
        assert (x.l1, x.l2, x.linf) == pytest.approx((y.l1, y.l2, y.linf), rel=1e-12, nan_ok=True)


@with_pairs
@pytest.mark.parametrize("sizes", [(4,), (CHUNK + 5,), (3, 4 * CHUNK)])
def test_sums_of_absolute_values_beyond_the_largest_number(place: Place, sizes: tuple[int, ...]) -> None:
    tensors = [torch.full((size,), 5e307, dtype=torch.float64) for size in sizes]
    tensors[-1][4:] = 1.0  # chunks that need no other unit beside one that does
    found, expected = normclip.stats([place(tensor) for tensor in tensors]), TensorList(tensors).statistics()[0]
    for name in ("sign_cosine", "density", "mean_abs", "l2"):
        assert math.isfinite(getattr(expected, name))
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)


def test_moments_of_tensors_on_a_device(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = make(torch.float32, CHUNK + 1)
    found = choose.moments(place(tensor))
    assert found.l2 == pytest.approx(_core.TensorList(tensor).norm(2.0), rel=1e-12)
    assert found.to_array().shape == (len(_core.MOMENTS),)
    assert normclip.Moments.of(place(tensor)).l2 == pytest.approx(found.l2, rel=1e-12)


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_clipping_by_groups(place: Place, nonfinite: str) -> None:
    model = torch.nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.data = place(parameter.data)
        parameter.grad = place(torch.full_like(parameter.data, 2.0, device="cpu"))
    clipped = normclip.clip_grads_(model, limits={"weights": 1.0}, groups={"weights": ["weight"]}, nonfinite=nonfinite)
    assert clipped.coefficients == pytest.approx({"weights": 1 / math.sqrt(24), "rest": 1.0})
    assert model.weight.grad.norm().item() == pytest.approx(1.0)
    assert model.bias.grad.tolist() == [2.0, 2.0]
    model.weight.grad[0, 0] = math.nan
    clipped = normclip.clip_grads_(model, 100.0, nonfinite=nonfinite)
    assert (clipped.found_inf, clipped.skipped) == (True, nonfinite == "skip")
    assert math.isnan(model.weight.grad[0, 0]) == (nonfinite == "skip")


# ---- Inner products ----


@pytest.mark.parametrize("same_type", [True, False])
def test_inner_products(place: Place, same_type: bool) -> None:
    xs = [*every_kind(), layouts()["transposed"], layouts()["complex64"]]
    ys = [make(x.dtype if same_type else torch.float32, x.numel(), 9).view(x.shape) if not x.is_complex() else x.conj() for x in xs]
    found = normclip.dot_stats([place(x) for x in xs], [place(y) for y in ys])
    expected = _core.dot(xs, ys)
    assert [x.item() for x in found] == pytest.approx(list(expected), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize(("x", "y"), [(1e200, 1e-200), (1e200, 1e100), (1e-200, 1e-100), (1e-200, 1e-200)])
def test_inner_products_at_all_scales(place: Place, x: float, y: float, request: pytest.FixtureRequest) -> None:
    if "torch" in request.node.name:
        pytest.skip("plain torch has no scales")
    a, b = (torch.full((CHUNK + 5,), value, dtype=torch.float64) for value in (x, y))
    assert [figure.item() for figure in normclip.dot_stats(place(a), place(b))] == pytest.approx(list(_core.dot(a, b)), rel=1e-12)


def test_pairs_that_do_not_match(place: Place) -> None:
    with pytest.raises(ValueError, match="xs has 1 tensors and ys has 2"):
        normclip.dot([place(torch.ones(2))], [place(torch.ones(2))] * 2)
    with pytest.raises(ValueError, match=r"xs\[0\] .* different shapes"):
        normclip.dot(place(torch.ones(2)), place(torch.ones(3)))
