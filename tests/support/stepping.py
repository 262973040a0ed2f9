"""Scenarios of optimizers that clip in their step, on sharded models against whole ones."""

import copy
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from normclip.optim import ClippedAdamW, ClippedSGD
from normclip.rules import Soft
from normclip.thresholds import AutoClip
from support.sharded import Net, counted_collectives, full, make_tensor_parallel, make_tensor_parallel_and_shard, mesh_of, raised_by

MAKERS: list[Callable[[Any], Any]] = [
    lambda parameters: ClippedSGD(parameters, 0.05, 0.5, momentum=0.9, weight_decay=0.01),
    lambda parameters: ClippedAdamW(parameters, 0.05, rule=AutoClip(percentile=50), amsgrad=True),
]

LIMITED: list[Callable[[Any], Any]] = [
    lambda parameters: ClippedSGD(parameters, 0.05, 0.5, 0.9, nesterov=True, weight_decay=0.01, descent_limit=0.3, update_rms_limit=0.05),
    lambda parameters: ClippedAdamW(parameters, 0.05, rule=Soft(0.5), amsgrad=True, descent_limit=20.0, update_rms_limit=0.7),
    lambda parameters: ClippedAdamW(parameters, 0.05, rule=0.5, descent_limit=1.0),
]


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(x).square().sum().backward()


def check_alike(whole: nn.Module, sharded: nn.Module) -> None:
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(full(ours.detach()), theirs.detach(), rtol=1e-9, atol=1e-11)


def trained(make: Callable[[Any], Any], shard: Callable[[nn.Module], Any]) -> list[Any]:
    """A sharded model goes as the whole one does."""
    torch.manual_seed(0)
    whole = Net().double()
    sharded = copy.deepcopy(whole)
    shard(sharded)
    ours, theirs = make(sharded.parameters()), make(whole.parameters())
    same: list[Any] = []
    limited: list[tuple[bool, bool]] = []
    for step in range(4):
        for model, optimizer in ((whole, theirs), (sharded, ours)):
            backward(model, step)
            optimizer.step()
        assert abs(ours.last_norm - theirs.last_norm) <= 1e-9 * theirs.last_norm
        check_alike(whole, sharded)
        same.append((ours.last_norm, ours.last_coefficient, ours.last_descent, ours.last_update_rms))
        if theirs.last_descent is not None:
            assert math.isclose(ours.last_descent, theirs.last_descent, rel_tol=1e-9)
            torch.testing.assert_close(ours.last_update_rms, theirs.last_update_rms, rtol=1e-9, atol=1e-12)
            is_limited = theirs.descent_limit < theirs.last_descent, (theirs.update_rms_limit or math.inf) < max(theirs.last_update_rms)
            limited.append(is_limited)
    wanted = [limit is not None for limit in (theirs.descent_limit, theirs.update_rms_limit)]
    assert [any(each) for each in zip(*limited, strict=True)] == wanted or not any(wanted), "each limit has something to do"
    return same


def steps_of_shards(rank: int, size: int) -> Any:
    """With a head of 3 rows, which leave one of 4 ranks without any."""
    ways: list[Callable[[nn.Module], Any]] = [
        lambda model: fully_shard(model, mesh=mesh_of(size, "dp")),
        lambda model: fully_shard(model, mesh=mesh_of(size, "replicate", "shard")),
        lambda model: fully_shard(model, mesh=mesh_of(size, "dp"), offload_policy=CPUOffloadPolicy(pin_memory=False)),
        lambda model: make_tensor_parallel(model, mesh_of(size, "tp")),
    ]
    if size == 4:
        ways.append(lambda model: make_tensor_parallel_and_shard(model, mesh_of(size, "dp", "tp")))
    return [trained(make, shard) for make in MAKERS + LIMITED for shard in ways]


def steps_take_one_collective(rank: int, size: int) -> Any:
    model = Net().double()
    fully_shard(model, mesh=mesh_of(size, "dp"))
    for make in MAKERS:
        optimizer = make(model.parameters())
        backward(model, 0)
        with counted_collectives() as calls:
            optimizer.step()
        assert calls == [128]
    optimizer.descent_limit = 1.0
    with counted_collectives() as calls:
        optimizer.step()
    assert calls == [128, 32 * (1 + len(list(model.parameters())))], "a limit takes one more"
    return None


def limits_of_replicas(rank: int, size: int) -> Any:
    """Replicas count once, also where the gradient is a sum over the ranks. Beside shards, of which one is empty, and a plain tensor."""
    mesh = mesh_of(size, "dp")
    generator = torch.Generator().manual_seed(0)
    values, gradients = (
        [torch.randn(shape, generator=generator).double() for shape in ((5,), (4, 3), (size - 1, 2), (3,))] for _ in range(2)
    )

    def placed(value: torch.Tensor, place: int) -> torch.Tensor:
        if place < 2:
            return DTensor.from_local(value.clone(), mesh, [Replicate()])
        return distribute_tensor(value, mesh, [Shard(0)]) if place == 2 else value.clone()

    same: list[Any] = []
    for make in LIMITED:
        whole = [nn.Parameter(value.clone()) for value in values]
        parts = [nn.Parameter(placed(value, place)) for place, value in enumerate(values)]
        theirs, ours = make(whole), make(parts)
        for factor in (1.0, 3.0):
            for place, (one, part, gradient) in enumerate(zip(whole, parts, gradients, strict=True)):
                one.grad = factor * gradient
                part.grad = placed(factor * gradient, place)
            parts[1].grad = DTensor.from_local(factor * gradients[1] * (rank + 1) * 2 / (size * (size + 1)), mesh, [Partial()])
            theirs.step()
            ours.step()
            assert math.isclose(ours.last_descent, theirs.last_descent, rel_tol=1e-12)
            torch.testing.assert_close(ours.last_update_rms, theirs.last_update_rms, rtol=1e-12, atol=0.0)
            for part, one in zip(parts, whole, strict=True):
                torch.testing.assert_close(full(part.detach()), one.detach(), rtol=1e-12, atol=1e-14)
        same.append((ours.last_descent, ours.last_update_rms))
    return same


def limits_that_fail_on_one_rank(rank: int, size: int) -> Any:
    """After the norm: all raise, and nobody has written. So do they where the ranks list different tensors."""
    mesh, bad = mesh_of(size, "dp"), size - 1

    class Failing(Soft):
        def formula(self, xp: Any, norm: Any) -> Any:
            raise ArithmeticError("a fault of the rule")

    for make in LIMITED:
        parameters = [nn.Parameter(DTensor.from_local(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)])) for _ in range(2)]
        optimizer = make(parameters)
        for parameter in parameters:
            parameter.grad = DTensor.from_local(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)])
        optimizer.step()
        before = [parameter.to_local().detach().clone() for parameter in parameters]
        optimizer.rule, rule = Failing(1.0) if rank == bad else optimizer.rule, optimizer.rule
        error = raised_by(optimizer.step)
        assert isinstance(error, ArithmeticError if rank == bad else RuntimeError), repr(error)
        assert rank == bad or f"rank {bad}" in str(error)
        optimizer.rule, optimizer.update_rms_limit = rule, -1.0 if rank == bad else 1.0
        error = raised_by(optimizer.step)
        assert isinstance(error, ValueError if rank == bad else RuntimeError), repr(error)
        optimizer.update_rms_limit = 1.0
        if rank == bad:
            optimizer.param_groups[0]["params"].pop()
        error = raised_by(optimizer.step)
        assert isinstance(error, ValueError), repr(error)
        assert "list different tensors" in str(error)
        assert all(torch.equal(parameter.to_local(), old) for parameter, old in zip(parameters, before, strict=True))
    return None


def steps_that_fail_on_one_rank(rank: int, size: int) -> Any:
    """It raises its own error, and the others one that names it. Nobody has written."""
    mesh, bad = mesh_of(size, "dp"), size - 1

    def setting(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = -1.0

    def type_of_a_state(optimizer: Any) -> None:
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        for name in state.keys() - {"step"}:
            state[name] = state[name].float()

    for make in MAKERS:
        for spoil in (setting, type_of_a_state):
            parameter = nn.Parameter(DTensor.from_local(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)]))
            optimizer = make([parameter])
            for _ in range(2):
                parameter.grad = DTensor.from_local(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)])
                optimizer.step()
            before = parameter.to_local().detach().clone()
            if rank == bad:
                spoil(optimizer)
            error = raised_by(optimizer.step)
            assert isinstance(error, (ValueError, TypeError)) if rank == bad else isinstance(error, RuntimeError), repr(error)
            assert rank == bad or f"rank {bad}" in str(error)
            assert torch.equal(parameter.to_local(), before)
    return None


def steps_without_gradients_on_one_rank(rank: int, size: int) -> Any:
    mesh = mesh_of(size, "dp")
    same = []
    for make in MAKERS:
        parameters = [nn.Parameter(DTensor.from_local(torch.zeros(3, dtype=torch.float64), mesh, [Shard(0)])) for _ in range(2)]
        optimizer = make(parameters)
        optimizer.step()  # nobody has one
        assert (optimizer.last_norm, optimizer.last_coefficient) == (0.0, 1.0)
        for parameter in parameters if rank else ():
            parameter.grad = DTensor.from_local(torch.full((3,), 2.0, dtype=torch.float64), mesh, [Shard(0)])
        optimizer.step()
        assert math.isclose(optimizer.last_norm, math.sqrt(24.0 * (size - 1)), rel_tol=1e-12)
        assert parameters[0].to_local().abs().max().item() == 0.0 if rank == 0 else parameters[0].to_local().abs().min().item() > 0.0
        same.append(optimizer.last_norm)
    return same


def checkpoints_of_shards(rank: int, size: int) -> Any:
    """Through torch.distributed.checkpoint, into a fresh optimizer."""
    found: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(found)
    for number, make in enumerate(MAKERS):
        torch.manual_seed(0)
        models = [Net().double() for _ in range(2)]
        for model in models:
            fully_shard(model, mesh=mesh_of(size, "dp"))
        through, resumed = (make(model.parameters()) for model in models)
        for step in range(3):
            backward(models[0], step)
            through.step()
        path = Path(found[0]) / str(number)
        state = {"model": models[0].state_dict(), "optimizer": get_optimizer_state_dict(models[0], through)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)  # torch 2.8 itself uses it
            checkpoint.save(state, checkpoint_id=path)
        state = {"model": models[1].state_dict(), "optimizer": get_optimizer_state_dict(models[1], resumed)}
        checkpoint.load(state, checkpoint_id=path)
        models[1].load_state_dict(state["model"])
        set_optimizer_state_dict(models[1], resumed, state["optimizer"])
        resumed.rule = copy.deepcopy(through.rule)
        for step in range(3, 5):
            for model, optimizer in zip(models, (through, resumed), strict=True):
                backward(model, step)
                optimizer.step()
        for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local())
    return None


SCENARIOS = [
    steps_of_shards,
    steps_take_one_collective,
    limits_of_replicas,
    limits_that_fail_on_one_rank,
    steps_that_fail_on_one_rank,
    steps_without_gradients_on_one_rank,
    checkpoints_of_shards,
]
