"""The gradients are those they are named after, and clipping them does what the benchmark takes for granted."""

import math

import pytest
import torch

from normclip.bench.exact import exact_norm, relative_error
from normclip.bench.gradients import Gradients
from normclip.bench.workloads import FULL, QUICK, Shape, gpt2_shapes, llama_layer_shapes, lstm_shapes, policy, real, resnet50_shapes


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        (gpt2_shapes(), 148, 124_439_808),
        (lstm_shapes(), 11, 1_309_172),
        (resnet50_shapes(), 161, 25_557_032),
        (llama_layer_shapes(), 9, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096),
    ],
)
def test_shapes_are_the_models_own(shapes: list[Shape], tensors: int, elements: int) -> None:
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes) == elements


def test_quick_makes_every_call_that_the_full_run_makes() -> None:
    full, quick = ({operation for workload in run for operation in workload.operations} for run in (FULL, QUICK))
    assert quick == full


def test_real_gradients_are_the_same_every_time_and_leave_the_global_seed_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second = (real(torch.float32, width=32, layers=1) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(map(torch.equal, first.tensors, second.tensors))
    assert 0.0 < first.exact_norm(2.0) < math.inf


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_norm_agrees_with_rational_arithmetic(order: float, dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) for shape in ((7, 3), (), (100,))]
    values = [abs(value) for tensor in tensors for value in tensor.flatten().tolist()]
    if math.isinf(order):
        assert exact_norm(tensors, order) == max(values)
    else:
        expected = math.fsum(value**order for value in values) ** (1.0 / order)
        assert exact_norm(tensors, order) == pytest.approx(expected, rel=1e-15)


def test_exact_norm_across_chunks() -> None:
    assert exact_norm([torch.full((200_001,), 0.1)], 1.0) == pytest.approx(200_001 * float(torch.tensor(0.1)), rel=1e-15)


def test_relative_error() -> None:
    assert relative_error(0.99, 1.0) == pytest.approx(0.01)


def test_each_halving_limit_is_half_the_norm_that_is_there() -> None:
    gradients = Gradients([torch.tensor([3.0, 4.0])])
    for limit in [*gradients.halving_limits(3), *gradients.halving_limits(4)]:
        norm = torch.nn.utils.clip_grad_norm_(gradients.parameters, limit)
        assert limit == pytest.approx(norm.item() / 2, rel=1e-3)


def test_halving_starts_over_before_the_norm_is_too_small_to_know() -> None:
    gradients = Gradients([torch.tensor([3.0, 4.0])])
    assert gradients.halvings == 12
    gradients.halving_limits(gradients.halvings)
    gradients.tensors[0].zero_()
    assert gradients.halving_limits(1) == [2.5]
    assert gradients.tensors[0].tolist() == [3.0, 4.0]


def test_a_policy_networks_gradients_stay_when_it_trains_on() -> None:
    gradients = policy()
    assert len(gradients.tensors) == 12
    assert gradients.elements == 9155
    gradients.work()
    assert all(map(torch.equal, gradients.tensors, gradients.pristine))
