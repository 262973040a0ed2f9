"""Optimizer steps on a GPU: that nothing waits, that graphs replay them, and that they are torch's and the CPU's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from normclip.optim import ClippedAdamW, ClippedSGD
from support.cuda import no_waiting

from .test_cuda import parameters_of, pytestmark  # noqa: F401

MAKERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda parameters: ClippedSGD(parameters, 0.1, 0.5, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters: ClippedAdamW(parameters, 0.1, rule=0.5, amsgrad=True),
}
by_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
LIMITED: dict[str, Callable[..., Any]] = {
    "limited SGD": lambda parameters: ClippedSGD(parameters, 0.1, 0.5, momentum=0.9, descent_limit=0.01),
    "limited AdamW": lambda parameters: ClippedAdamW(parameters, 0.1, rule=0.5, descent_limit=1.0, update_rms_limit=0.1),
}
free_and_limited = pytest.mark.parametrize("make", [*MAKERS.values(), *LIMITED.values()], ids=[*MAKERS, *LIMITED])
SHAPES: list[tuple[int, ...]] = [(5000,), (33,), (64, 64), (1,)]


def models_of(device: str = "cuda") -> list[torch.nn.Parameter]:
    """Of two element types, with the same gradients on every device."""
    models = [*parameters_of(SHAPES, device="cpu"), *parameters_of(SHAPES, torch.bfloat16, device="cpu")]
    moved = [torch.nn.Parameter(model.detach().to(device)) for model in models]
    for model, other in zip(moved, models, strict=True):
        model.grad = other.grad.to(device)
    return moved


def set_gradients(models: list[torch.nn.Parameter], seed: int) -> None:
    for index, model in enumerate(models):
        generator = torch.Generator().manual_seed(100 * seed + index)
        model.grad.copy_(torch.randn(model.shape, generator=generator))


@by_maker
def test_a_step_takes_a_launch_for_each_type_and_never_waits(make: Callable[..., Any]) -> None:
    models = models_of()
    optimizer = make(models)
    scale, found_inf = (torch.tensor(number, device="cuda") for number in (8.0, 0.0))
    for _ in range(2):
        optimizer.step()
    with no_waiting(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        optimizer.step()
    torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in names if name in ("measure", "norm", "change", "step")] == ["measure", "norm", "step", "step"] * 2


@pytest.mark.parametrize("make", LIMITED.values(), ids=list(LIMITED))
def test_a_step_within_limits_never_waits(make: Callable[..., Any]) -> None:
    optimizer = make(models_of())
    optimizer.step()
    with no_waiting():
        optimizer.step()
    assert float(optimizer.last_descent) > optimizer.descent_limit
    assert optimizer.last_update_rms.shape == (2 * len(SHAPES),)


@free_and_limited
def test_steps_are_those_of_the_cpu(make: Callable[..., Any]) -> None:
    device, host = models_of(), models_of("cpu")
    optimizers = make(device), make(host)
    for seed in range(5):
        for models, optimizer in zip((device, host), optimizers, strict=True):
            set_gradients(models, seed)
            optimizer.step()
    for x, y in zip(device, host, strict=True):
        torch.testing.assert_close(x.detach().cpu(), y.detach(), rtol=1e-5 if x.dtype == torch.float32 else 2**-6, atol=1e-5)


@free_and_limited
def test_a_graph_counts_its_steps(make: Callable[..., Any]) -> None:
    models, eager = models_of(), models_of()
    captured, optimizer = make(models), make(eager)
    for _ in range(2):
        captured.step()
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for seed in range(4):
        for each in (models, eager):
            set_gradients(each, seed)
        graph.replay()
        optimizer.step()
        for x, y in zip(models, eager, strict=True):
            assert torch.equal(x, y)
            for name, state in captured.state[x].items():
                assert torch.equal(state, optimizer.state[y][name].to(state.device)), name
    assert captured.last_norm.item() == optimizer.last_norm.item()


def test_gradient_scaler() -> None:
    models = models_of()
    optimizer, scaler = ClippedAdamW(models, 0.1, rule=0.5), torch.amp.GradScaler("cuda", init_scale=64.0)
    scaler.scale(torch.ones((), device="cuda"))
    for _ in range(2):
        scaler.step(optimizer)
        scaler.update()
    before = [model.detach().clone() for model in models]
    models[2].grad[0, 0] = torch.inf
    with no_waiting():
        scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(model, old) for model, old in zip(models, before, strict=True))
    assert {optimizer.state[model]["step"].item() for model in models} == {2.0}
    assert (scaler.get_scale(), float(optimizer.last_coefficient)) == (32.0, 0.0)


def test_states_that_were_saved_elsewhere_go_on_here() -> None:
    ours, theirs = ClippedAdamW(models_of(), 0.1, rule=float("inf")), torch.optim.AdamW(models_of(), 0.1, fused=True)
    for optimizer in (theirs, ours):
        optimizer.step()
    ours.load_state_dict(theirs.state_dict())
    for optimizer in (theirs, ours):
        optimizer.step()
    for x, y in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(x, y)
