"""The noise of gradients: unbiased by enumeration, exact against fractions, and what the average makes of it."""

import doctest
import itertools
import json
import math
import pickle
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normclip
from normclip import Moments, theory
from normclip.theory import Noise, NoiseAverage, noise, noise_scale

Vector = tuple[Fraction, ...]


def test_doctests() -> None:
    failed, attempted = doctest.testmod(noise)
    assert failed == 0
    assert attempted > 0


def mean(vectors: Sequence[Vector]) -> Vector:
    return tuple(sum(column, Fraction(0)) / len(vectors) for column in zip(*vectors, strict=True))


def square(vector: Vector) -> Fraction:
    return sum((x * x for x in vector), Fraction(0))


def root(value: Fraction) -> float:
    return math.sqrt(value)


SAMPLES = st.lists(st.tuples(*[st.integers(-20, 20).map(Fraction)] * 2), min_size=2, max_size=3)


@given(SAMPLES, st.sampled_from([(1, 1), (1, 2), (1, 1, 1), (1,)]), st.integers(0, 1))
def test_both_are_unbiased(population: list[Vector], sizes: tuple[int, ...], more: int) -> None:
    """Over all batches that can be drawn from a population, the means of the estimates are what they estimate."""
    more = max(more, len(sizes) == 1)  # one part is not the whole batch
    total = sum(sizes) + more
    found = []
    for batch in itertools.product(population, repeat=total):
        ends = list(itertools.accumulate(sizes, initial=0))
        parts = [root(square(mean(batch[start:end]))) for start, end in itertools.pairwise(ends)]
        found.append(noise_scale(parts, root(square(mean(batch))), list(sizes), total if more else None))
    center = mean(population)
    spread = sum((square(tuple(x - c for x, c in zip(sample, center, strict=True))) for sample in population), Fraction(0))
    largest = float(max(map(square, population))) + 1.0
    assert np.mean([each.squared_norm for each in found]) == pytest.approx(float(square(center)), abs=1e-12 * largest)
    assert np.mean([each.variance for each in found]) == pytest.approx(float(spread / len(population)), abs=1e-12 * largest)


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(-99, 99), min_size=3, max_size=3)), min_size=2, max_size=6))
def test_of_a_whole_batch_it_is_the_variance_of_its_parts(drawn: list[tuple[int, list[int]]]) -> None:
    sizes, parts = [size for size, _ in drawn], [tuple(map(Fraction, part)) for _, part in drawn]
    whole = mean([part for size, part in zip(sizes, parts, strict=True) for _ in range(size)])
    away = (size * square(tuple(x - y for x, y in zip(part, whole, strict=True))) for size, part in zip(sizes, parts, strict=True))
    variance = sum(away, Fraction(0)) / (len(parts) - 1)
    found = noise_scale([root(square(part)) for part in parts], root(square(whole)), sizes)
    scale = float(max(map(square, parts))) * sum(sizes) + 1.0
    assert found.variance == pytest.approx(float(variance), abs=1e-14 * scale)
    assert found.squared_norm == pytest.approx(float(square(whole) - variance / sum(sizes)), abs=1e-14 * scale)


@given(st.floats(0.0, 1e3), st.floats(0.0, 1e3), st.floats(0.1, 1e3), st.floats(1.001, 1e3))
def test_the_papers_formula(small: float, large: float, b: float, ratio: float) -> None:
    """Two batch sizes, as in the appendix; in fractions of the floats."""
    total = b * ratio
    n_b, n_total, size, whole = map(Fraction, (small, large, b, total))
    squared = (whole * n_total**2 - size * n_b**2) / (whole - size)
    variance = (n_b**2 - n_total**2) / (1 / size - 1 / whole)
    found = noise_scale([small], large, b, total)
    assert found == (float(squared), float(variance))


def test_sizes_of_every_magnitude() -> None:
    assert noise_scale([2e200, 2e200], 1e200) == (-math.inf, math.inf)
    found = noise_scale([2e-160, 2e-160], 2e-160, 1e300)
    assert found.variance == 0.0
    assert found.squared_norm == pytest.approx(4e-320)
    assert noise_scale([3.0, 5.0], 4.0, [1, 1]) == noise_scale([3.0, 5.0], 4.0) == noise_scale((3, 5), 4)


def test_moments_norms_and_tensors_are_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(4)]
    whole = torch.stack(parts).mean(0)
    by_moments = noise_scale([Moments.of(part) for part in parts], normclip.stats(whole).moments, samples=8)
    assert by_moments == noise_scale([normclip.total_norm(part) for part in parts], Moments.of(whole).l2, samples=8)
    assert by_moments.variance == pytest.approx(8 * torch.stack(parts).var(0).sum().item(), rel=1e-12)


def test_it_is_the_noise_of_training() -> None:
    """Micro-batches of a linear model, whose gradients by sample are known."""
    generator = torch.Generator().manual_seed(0)
    inputs, model = torch.randn(4000, 5, generator=generator, dtype=torch.float64), torch.nn.Linear(5, 1, dtype=torch.float64)
    targets = inputs.sum(1, keepdim=True) + torch.randn(4000, 1, generator=generator, dtype=torch.float64)

    def gradient(rows: slice) -> Moments:
        model.zero_grad()
        (model(inputs[rows]) - targets[rows]).square().mean().backward()
        return normclip.grad_stats(model).moments

    average = NoiseAverage(beta=0.999)
    for start in range(0, 4000, 16):
        parts = [gradient(slice(start + offset, start + offset + 4)) for offset in (0, 4, 8, 12)]
        average.update(noise_scale(parts, gradient(slice(start, start + 16)), samples=4))
    residuals = (model(inputs) - targets).detach()
    by_sample = torch.cat([2 * residuals * inputs, 2 * residuals], 1)
    assert average.noise.variance == pytest.approx(by_sample.var(0).sum().item(), rel=0.1)
    assert average.noise.squared_norm == pytest.approx(by_sample.mean(0).square().sum().item(), rel=0.1)
    tau = average.noise.deviation(16)
    errors = [(by_sample[start : start + 16].mean(0) - by_sample.mean(0)).norm().item() for start in range(0, 4000, 16)]
    assert tau == pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=0.1)
    assert theory.clipped_sgd(L0=1.0, L1=1.0, noise=tau, steps=100).lr > 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite(bad: float) -> None:
    for found in (noise_scale([bad, 1.0], 1.0), noise_scale([1.0, 1.0], bad)):
        assert all(map(math.isnan, (*found, found.scale)))
    average = NoiseAverage()
    assert all(map(math.isnan, average.noise))
    average.update(Noise(1.0, 2.0))
    for noisy in (Noise(bad, 1.0), Noise(1.0, bad)):
        assert average.update(noisy) == Noise(1.0, 2.0)
    assert math.isnan(Noise(1.0, math.nan).deviation(1))


@pytest.mark.parametrize(
    ("found", "scale", "deviation"),
    [(Noise(2.0, 8.0), 4.0, 2.0), (Noise(-1.0, 8.0), math.inf, 2.0), (Noise(1.0, -8.0), 0.0, 0.0), (Noise(0.0, 0.0), 0.0, 0.0)],
)
def test_estimates_that_are_negative(found: Noise, scale: float, deviation: float) -> None:
    assert (found.scale, found.deviation(2)) == (scale, deviation)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_the_average_is_the_weighted_mean(estimates: list[tuple[float, float]], beta: float) -> None:
    average, restarted = NoiseAverage(beta), NoiseAverage(beta)
    for estimate in estimates:
        found = average.update(Noise(*estimate))
        restarted.load_state_dict(json.loads(json.dumps(restarted.state_dict())))
        assert restarted.update(Noise(*estimate)) == found
    assert pickle.loads(pickle.dumps(average)).noise == found
    weights = [Fraction(beta) ** (len(estimates) - 1 - position) for position in range(len(estimates))]
    for column, value in enumerate(found):
        exact = sum(weight * Fraction(each[column]) for weight, each in zip(weights, estimates, strict=True)) / sum(weights)
        assert value == pytest.approx(float(exact), rel=1e-9, abs=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_scale([], 1.0), "norms is empty: pass the norm of one part"),
        (lambda: noise_scale([1.0], 1.0), "norms has one part, which is the whole batch: pass the norms of two parts, or total"),
        (lambda: noise_scale([1.0, -1.0], 1.0), r"norms\[1\] is -1.0"),
        (lambda: noise_scale([1.0, 1.0], -1.0), "mean is -1.0"),
        (lambda: noise_scale([1.0, "one"], 1.0), r"norms\[1\] is 'one': pass a norm, or moments"),
        (lambda: noise_scale([1.0, 1.0], 1.0, [1]), "samples has 1 numbers for 2 norms"),
        (lambda: noise_scale([1.0, 1.0], 1.0, [1, 0]), r"samples\[1\] is 0.0"),
        (lambda: noise_scale([1.0, 1.0], 1.0, math.nan), "samples is nan"),
        (lambda: noise_scale([1.0, 1.0], 1.0, 4, total=7), "total is 7, and the parts have 8.0 samples"),
        (lambda: Noise(1.0, 1.0).deviation(0), "samples is 0.0"),
        (lambda: NoiseAverage(1.0), "beta is 1.0"),
        (lambda: NoiseAverage().load_state_dict({"steps": -1, "squared_norm": 0.0, "variance": 0.0}), "steps in the state is -1"),
        (
            lambda: NoiseAverage().load_state_dict({"steps": 1, "squared_norm": math.nan, "variance": 0.0}),
            "squared_norm in the state holds nan",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_number() -> None:
    with pytest.raises(TypeError, match=r"norms\[0\] is a list: pass a norm, or moments"):
        noise_scale([[1.0], 1.0], 1.0)  # type: ignore[list-item]
