"""Inside functions that `torch.compile` compiles: `clip_grad_norm_` without a break in the graph, steps of optimizers with one."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import normclip
from normclip.optim import ClippedAdamW, ClippedSGD
from normclip.rules import Soft


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def made(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (2, 3, 1)]
    parameters[0].grad = torch.tensor([3.0, 0.0], dtype=dtype)
    parameters[2].grad = torch.tensor([-4.0], dtype=dtype)
    return parameters


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend)
    return result


@pytest.mark.parametrize("norm_type", [2.0, 1, 2.5, math.inf, "inf"])
@pytest.mark.parametrize("limit", [1.0, 100.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_as_without_compiling(dtype: torch.dtype, limit: float, norm_type: Any) -> None:
    given, expected = made(dtype), made(dtype)
    norm = compiled(lambda: normclip.clip_grad_norm_(given, limit, norm_type))()
    expected_norm = normclip.clip_grad_norm_(expected, limit, norm_type)
    assert (norm, norm.dtype, norm.shape) == (expected_norm, expected_norm.dtype, ())
    for left, right in zip(given, expected, strict=True):
        assert (left.grad is None) == (right.grad is None)
        assert left.grad is None or torch.equal(left.grad, right.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_clipping_amid_other_operations(backend: str) -> None:
    """What comes before is done before, what comes after sees the clipped gradients, and new limits are heeded."""
    parameters = made()

    def step(limit: float) -> tuple[torch.Tensor, torch.Tensor]:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(2.0)
        norm = normclip.clip_grad_norm_(parameters, limit)
        return norm, parameters[0].grad + 1.0

    run = compiled(step, backend)
    for limit, norm, first in ((1.0, 10.0, 0.6), (0.5, 2.0, 0.3), (4.0, 1.0, 0.6)):
        found, after = run(limit)
        assert found.item() == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(after, torch.tensor([first + 1.0, 1.0]))


def test_a_model_s_parameters() -> None:
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    norm = compiled(lambda: normclip.clip_grad_norm_(model.parameters(), 0.5))()
    assert norm.item() == pytest.approx(math.sqrt(8.0))
    assert normclip.get_total_norm([parameter.grad for parameter in model.parameters()]).item() == pytest.approx(0.5, rel=1e-5)


def test_no_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    assert compiled(lambda: normclip.clip_grad_norm_(parameters, 1.0))().item() == 0.0


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="this Dynamo does not trace dictionaries whose keys are objects"
)
def test_torch_s_name_for_it() -> None:
    given, expected = made(), made()
    with normclip.patch_torch():
        norm = compiled(lambda: torch.nn.utils.clip_grad_norm_(given, 1.0))()
    assert norm == normclip.clip_grad_norm_(expected, 1.0)
    assert torch.equal(given[0].grad, expected[0].grad)


def test_errors_come_out_of_the_graph() -> None:
    parameters = made()
    parameters[0].grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        compiled(lambda: normclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True))()
    with pytest.raises(ValueError, match="max_norm is -1"):
        compiled(lambda: normclip.clip_grad_norm_(parameters, -1.0))()


def test_rules_break_the_graph() -> None:
    """They are refused with `fullgraph`, and right without it."""
    parameters, expected = made(), made()
    clip = lambda given: normclip.clip_grad_norm_(given, rule=Soft(1.0))  # noqa: E731
    assert torch.compile(clip, backend="eager")(parameters) == clip(expected)
    assert torch.equal(parameters[0].grad, expected[0].grad)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(clip)(parameters)


@pytest.mark.parametrize("make", [lambda listed: ClippedAdamW(listed, rule=1.0), lambda listed: ClippedSGD(listed, 0.1, 1.0, 0.9)])
def test_steps_of_optimizers_break_the_graph_once(make: Any) -> None:
    """What they do is not compiled, whatever the settings become."""
    optimizers = [make(made()) for _ in range(2)]
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]
    torch._dynamo.utils.counters.clear()
    for number in range(10):
        for optimizer, step in zip(optimizers, steps, strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            step()
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] == 0
    for ours, expected in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
        assert torch.equal(ours, expected)
