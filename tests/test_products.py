"""Inner products against exact sums."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import normclip
from normclip._backends.choose import serving
from normclip._backends.devices import _joined_products
from normclip._backends.protocol import Served
from support.oracle import TOLERANCE
from support.tensors import LAYOUTS, Recipe

REALS = ("float16", "bfloat16", "float32", "float64")


def exact(x: torch.Tensor, y: torch.Tensor) -> tuple[Fraction, Fraction]:
    """Σxy and Σ|xy|."""
    terms = [Fraction(a) * Fraction(b) for a, b in zip(x.double().flatten().tolist(), y.double().flatten().tolist(), strict=True)]
    return sum(terms, Fraction(0)), sum(map(abs, terms), Fraction(0))


def assert_dot(measured: float, x: torch.Tensor, y: torch.Tensor) -> None:
    product, bound = exact(x, y)
    assert abs(Fraction(measured) - product) <= Fraction(TOLERANCE) * bound + Fraction(1e-300)


sizes = st.integers(0, 300) | st.sampled_from([1023, 1024, 1025, 3000])
# torch has no negative strides.
layouts = st.sampled_from(sorted(set(LAYOUTS) - {"reversed"}))


@given(sizes, st.sampled_from(REALS), st.sampled_from(REALS), layouts, layouts, st.integers(0, 5))
def test_any_pair(size: int, of_x: str, of_y: str, layout_x: str, layout_y: str, seed: int) -> None:
    x = Recipe(of_x, size, layout_x, "torch", seed=seed).make()
    y = Recipe(of_y, size, layout_y, "torch", seed=seed + 1).make()
    if x.shape != y.shape:
        y = Recipe(of_y, size, layout_x, "torch", seed=seed + 1).make()
    assert_dot(normclip.dot(x, y), x, y)


# Exponents of 10, uniform over nearly all that float64 has.
anywhere = st.builds(lambda exponent, sign: sign * 10.0**exponent, st.floats(-308, 308), st.sampled_from([-1.0, 1.0]))


@given(st.lists(st.tuples(anywhere, anywhere, st.booleans()), min_size=1, max_size=6), st.integers(1, 3), st.booleans())
def test_vectors_however_far_apart(terms: list[tuple[float, float, bool]], parts: int, single: bool) -> None:
    """Small elements that meet large ones, so that neither vector can be brought into range without losing the other's."""
    x = torch.tensor([x for x, _, _ in terms], dtype=torch.float64)
    # Of about 1 together or with any product.
    y = torch.tensor([y if free else math.copysign(min(1 / abs(x), 1.7e308), y) for x, y, free in terms], dtype=torch.float64)
    x = x.clamp(-3e38, 3e38).float() if single else x
    product, bound = exact(x, y)
    assume(bound <= Fraction(sys.float_info.max))
    measured = normclip.dot_stats(x.chunk(parts), y.chunk(parts))
    assert_dot(measured.dot, x, y)
    if 1e-280 < measured.norm_x < 1e280 and 1e-280 < measured.norm_y < 1e280:
        norms = Fraction(measured.norm_x) * Fraction(measured.norm_y)
        assert abs(Fraction(measured.cosine) - product / norms) <= Fraction(TOLERANCE) * bound / norms + Fraction(TOLERANCE)


@pytest.mark.parametrize("dtype", REALS)
def test_over_many_blocks(dtype: str) -> None:
    xs = [Recipe(dtype, size, library="torch", seed=size).make() for size in (1, 31, 70_000, 200_001)]
    ys = [Recipe(dtype, size, library="torch", seed=-size % 1000).make() for size in (1, 31, 70_000, 200_001)]
    measured = normclip.dot_stats(xs, ys)
    assert_dot(measured.dot, torch.cat(xs), torch.cat(ys))
    wide = [[tensor.double() for tensor in tensors] for tensors in (xs, ys)]
    assert (measured.norm_x, measured.norm_y) == (normclip.total_norm(wide[0]).item(), normclip.total_norm(wide[1]).item())
    assert measured.cosine == pytest.approx(measured.dot / (measured.norm_x * measured.norm_y), rel=1e-14)


def test_layouts_that_differ_are_met_in_step() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 6, 8, 10))
    for a, b in [
        (x, np.asfortranarray(y)),
        (x[::-1], y),
        (x[:, ::-1, ::2], y[..., ::2]),
        (x.transpose(2, 0, 1), y.transpose(2, 0, 1)),
        (x, y[::-1, :, ::-1]),
    ]:
        assert normclip.dot(a, b) == pytest.approx(np.sum(a * b), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex(dtype: str) -> None:
    x, y = (Recipe(dtype, 1000, library="torch", seed=seed).make() for seed in (0, 1))
    expected = torch.vdot(x.to(torch.complex128), y.to(torch.complex128)).real.item()
    assert normclip.dot(x, y) == pytest.approx(expected, rel=1e-12)
    # The conjugate is a flag of the tensor and not in memory.
    assert normclip.dot(x.conj(), y) == pytest.approx(
        torch.vdot(x.to(torch.complex128).conj(), y.to(torch.complex128)).real.item(), rel=1e-12
    )


def test_a_lazy_negative() -> None:
    x = torch.ones(3)
    assert normclip.dot(torch._neg_view(x), x) == -3.0


MAGNITUDES = pytest.mark.parametrize(
    ("x", "y", "product", "cosine"),
    [
        ([1e200, 0.0], [1e-200, 0.0], 1.0, 1.0),
        ([1e200, 1e200], [1e200, -1e200], 0.0, 0.0),
        ([1e200, 0.0], [1e200, 0.0], math.inf, 1.0),
        ([1e-200, 1e-200], [1e-200, 0.0], 0.0, math.sqrt(0.5)),
        ([3e153] * 5, [3e153] * 5, 4.5e307, 1.0),
        ([0.0, 0.0], [1.0, 1.0], 0.0, math.nan),
        ([1e136, 0.0, 1.0], [0.0, 1e136, 1.0], 1.0, 1e-272),
        ([5.7e-175, -1.3e19], [3.6e283, -1.7e18], 5.7e-175 * 3.6e283, 5.7 * 3.6 / 1.3 / 3.6 * 1e-194),
        ([1e300, 1.0], [1e-300, 1e300], 1e300, 1e-300 + 1e-300),
        ([1e-300, 1e-300], [1e300, 0.0], 1.0, math.sqrt(0.5)),
        ([1e-200, 0.0], [1e-200, 1e-90], 0.0, 1e-110),
        # Less than the product of the norms, which is beyond float64.
        ([1e160, 1e160, 1e160], [9e147, 0.0, 0.0], 9e307, math.sqrt(1 / 3)),
        # Not a number only where IEEE says so: products that overflow are not infinite together with an infinity.
        ([math.inf, 1e300], [1.0, -1e300], math.inf, math.nan),
    ],
)


@MAGNITUDES
def test_magnitudes(x: list[float], y: list[float], product: float, cosine: float) -> None:
    measured = normclip.dot_stats(np.array(x), np.array(y))
    assert measured.dot == pytest.approx(product, rel=1e-12)
    assert measured.cosine == pytest.approx(cosine, rel=1e-12, nan_ok=True)


@MAGNITUDES
def test_cosines_by_torch(x: list[float], y: list[float], product: float, cosine: float) -> None:
    """Where products overflow or underflow, which torch adds up as they are, and where parts on several devices are joined."""
    a, b = (torch.tensor(given, dtype=torch.float64) for given in (x, y))
    with serving(Served(rust=(), triton=())):
        measured = normclip.dot_stats(a, b)
        parts = [torch.stack(tuple(normclip.dot_stats(a[i], b[i]))) for i in range(len(x))]
    assert measured.cosine.item() == pytest.approx(cosine, rel=1e-12, nan_ok=True)
    joined = _joined_products(parts)
    assert joined[3].item() == pytest.approx(cosine, rel=1e-12, nan_ok=True)
    assert joined[1].item() == pytest.approx(measured.norm_x.item(), rel=1e-12, nan_ok=True)


def test_many_blocks_that_overflow_only_together() -> None:
    x = [np.array([1.3e154])] * 1 + [np.array([1.2e154]), np.array([1.1e154])]
    measured = normclip.dot_stats(x, x)
    assert measured.dot == math.inf
    assert measured.cosine == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize(("x", "expected"), [([1.0, math.nan], math.nan), ([1.0, math.inf], math.inf), ([0.0, math.inf], math.inf)])
def test_nonfinite(x: list[float], expected: float) -> None:
    assert normclip.dot(np.array(x, np.float32), np.ones(2, np.float32)) == pytest.approx(expected, nan_ok=True)


def test_empty_lists_and_tensors() -> None:
    assert normclip.dot([], []) == 0.0
    assert normclip.dot([np.empty((0, 3))], [np.empty((0, 3))]) == 0.0


def test_the_same_pair_twice_counts_once() -> None:
    x, y, z = np.ones(3), np.full(3, 2.0), np.full(3, 5.0)
    assert normclip.dot([x, x], [y, y]) == 6.0
    assert normclip.dot([x, x], [y, z]) == 21.0


def test_same_bits_for_any_number_of_threads(set_threads) -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 1_000_003)).astype(np.float32)
    measured = set()
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        measured.add(normclip.dot_stats(x, y))
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("xs", "ys", "error", "message"),
    [
        ([np.ones(2)], [np.ones(2), np.ones(3)], ValueError, "xs has 1 tensors and ys has 2"),
        (
            [np.ones(2), np.ones((2, 3))],
            [np.ones(2), np.ones((3, 2))],
            ValueError,
            r"xs\[1\] .*shape \[2, 3\].* and ys\[1\] .*shape \[3, 2\]",
        ),
        ([np.ones(2)], [np.ones(2, np.complex128)], TypeError, "cast the real one"),
        ([np.ones(2)], [np.ones(2, np.int64)], TypeError, r"ys\[0\] .*int64"),
        ([torch.ones(2).to_sparse()], [torch.ones(2)], TypeError, r"xs\[0\] .*to_dense"),
        (3, [np.ones(2)], TypeError, "xs is a int"),
        ([torch.ones(2, device="meta")], [torch.ones(2)], ValueError, r"xs\[0\] .* are on meta and cpu"),
        ([torch.ones(2, device="meta"), np.ones(3)], [torch.ones(2), np.ones(3, np.int64)], TypeError, r"ys\[1\] .*int64"),
    ],
)
def test_errors_name_the_pair(xs, ys, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normclip.dot(xs, ys)
