"""Scenarios of optimizers that clip in their step, on shards that pass for tensors of a CUDA device, where nothing waits for the norm."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from normclip._backends import dtensors, ranks
from normclip._backends.choose import serving
from normclip._backends.protocol import USUAL
from normclip._backends.shards import Shards
from normclip.optim import ClippedAdamW, ClippedSGD
from normclip.rules import Soft
from normclip.thresholds import AutoClip
from support.sharded import counted_collectives, full, make_tensor_parallel, make_tensor_parallel_and_shard, mesh_of, model_of, raised_by

MAKERS: list[Callable[[Any], Any]] = [
    lambda parameters: ClippedSGD(parameters, 0.05, Soft(0.5), momentum=0.9, dampening=0.3, weight_decay=0.01),
    lambda parameters: ClippedAdamW(parameters, 0.05, rule=0.5, amsgrad=True),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails where the host merges rows, waits for one that was merged on the device, or asks a tensor for its numbers."""

    def wait(*_: object, **__: object) -> None:
        raise AssertionError("this waits")

    def number(tensor: torch.Tensor) -> float:
        return ask(tensor) if any(tensor is flag for flag in ranks._flags.values()) else wait()  # a flag is in memory of the host

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_agreed", "settle"):
            patch.setattr(Shards, name, wait)
        for name in ("item", "tolist", "numpy", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, wait)
        ask = torch.Tensor.__float__
        patch.setattr(torch.Tensor, "__float__", number)
        yield


@contextmanager
def merged_by_hosts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "_norm_on_device", lambda *_: None)
        yield


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 12, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    (scale * model(x).square().sum()).backward()


def kept(optimizer: Any) -> list[torch.Tensor]:
    """This rank's parameters and states."""
    tensors = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    tensors += [state for states in optimizer.state.values() for state in states.values() if state is not None]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def copied(optimizer: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in kept(optimizer)]


def check_steps(make: Callable[[Any], Any], shard: Callable[[nn.Module], Any]) -> list[Any]:
    """Steps by the norm of the device against those by the norm of the host, to the bit, and against those of the whole model.

    The second waits for nothing, as the first has made the states.
    """
    (whole, ours), (_, theirs) = (model_of(shard, torch.float32) for _ in range(2))
    models = [whole, ours, theirs]
    reference, device, host = (make(model.parameters()) for model in models)
    same: list[Any] = []
    for step in range(2):
        for model in models:
            backward(model, step)
        with no_waiting() if step else nullcontext():
            device.step()
        with merged_by_hosts():
            host.step()
        with serving(USUAL):
            reference.step()
        assert torch.is_tensor(device.last_norm)
        assert math.isclose(device.last_norm, host.last_norm, rel_tol=1e-15)
        assert all(map(torch.equal, kept(device), kept(host)))
        for found, expected in zip(ours.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(found.detach()), expected.detach(), rtol=1e-4, atol=1e-5)
        same.append((device.last_norm.item(), device.last_coefficient.item()))
    return same


def steps_of_shards(rank: int, size: int) -> Any:
    """With a head of 3 rows, which leave one of 4 ranks without any."""
    fsdp = lambda model: fully_shard(model, mesh=mesh_of(size, "dp"))  # noqa: E731
    hsdp = lambda model: fully_shard(model, mesh=mesh_of(size, "replicate", "shard"))  # noqa: E731
    tp = lambda model: make_tensor_parallel(model, mesh_of(size, "tp"))  # noqa: E731 (beside replicas)
    both = lambda model: make_tensor_parallel_and_shard(model, mesh_of(size, "dp", "tp"))  # noqa: E731
    same = [check_steps(make, fsdp) for make in MAKERS]
    same += [check_steps(MAKERS[1], shard) for shard in ((hsdp, tp) if size == 2 else (hsdp, tp, both))]
    if size == 4:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dtensors, "_AT_ONCE", 0)  # gathered by dimensions
            same.append(check_steps(MAKERS[0], hsdp))
    return same


class Few:
    """Four small parameters: two of shards, a replica whose gradient is a sum over the ranks, and a plain one; and an optimizer that has
    taken a step.
    """

    def __init__(self, make: Callable[[Any], Any], rank: int, size: int) -> None:
        self.mesh, self.bad = mesh_of(size, "dp"), size - 1
        self.is_bad = rank == self.bad
        torch.manual_seed(0)
        values = [distribute_tensor(torch.randn(size + more), self.mesh, [Shard(0)]) for more in (1, 0)]
        values += [DTensor.from_local(torch.randn(2), self.mesh, [Replicate()]), torch.randn(2)]
        self.parameters = [nn.Parameter(value) for value in values]
        self.optimizer = make(self.parameters)
        self.set_gradients()
        self.optimizer.step()

    def set_gradients(self, scale: float = 1.0) -> None:
        """Of so many elements: 2·size + 5."""
        for parameter in self.parameters[:2]:
            parameter.grad = distribute_tensor(torch.full(parameter.shape, scale), self.mesh, [Shard(0)])
        self.parameters[2].grad = DTensor.from_local(torch.full((2,), scale / self.mesh.size()), self.mesh, [Partial()])
        self.parameters[3].grad = torch.full((2,), scale)


def scaled_steps(rank: int, size: int) -> Any:
    """By a GradScaler: the device skips a step where a gradient of one rank is not finite, and no rank counts it."""
    same: list[Any] = []
    _, model = model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")), torch.float32)
    optimizer, scaler = ClippedAdamW(model.parameters(), 0.05, rule=0.5), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, factor in enumerate((1.0, math.inf if rank == size - 1 else 1.0, 1.0)):
        backward(model, step, factor * scaler.scale(torch.ones(())).item())
        before = copied(optimizer)
        with no_waiting() if step else nullcontext():
            scaler.step(optimizer)
        scaler.update()
        assert (optimizer.last_coefficient == 0.0) == (step == 1) == all(map(torch.equal, kept(optimizer), before))
        same.append((optimizer.last_norm.isfinite().item(), optimizer.last_coefficient.item()))

    few = Few(MAKERS[0], rank, size)
    optimizer, before = few.optimizer, copied(few.optimizer)
    optimizer.grad_scale = torch.tensor(8.0)
    for found_inf in (1.0, 0.0):
        few.set_gradients(8.0)
        optimizer.found_inf = torch.tensor(found_inf)
        with no_waiting():
            optimizer.step()
        assert math.isclose(optimizer.last_norm, math.sqrt(2.0 * size + 5.0), rel_tol=1e-15)
        assert (optimizer.last_coefficient == 0.0) == (found_inf == 1.0) == all(map(torch.equal, kept(optimizer), before))
        same.append(optimizer.last_coefficient.item())
    # With limits the host finds out, before it waits for others that have skipped the step.
    optimizer.descent_limit, optimizer.found_inf, before = 1.0, torch.tensor(1.0), copied(optimizer)
    with counted_collectives() as calls:
        optimizer.step()
    assert calls == [128]
    assert all(map(torch.equal, kept(optimizer), before))
    return same


def steps_take_one_collective(rank: int, size: int) -> Any:
    """Also where some ranks have no gradients; a limit on the update takes one more, of what all ranks have to list alike."""
    same: list[Any] = []
    for make in MAKERS:
        few = Few(make, rank, size)
        with counted_collectives() as calls, no_waiting():
            few.optimizer.step()
        assert calls == [128]
        for place, parameter in enumerate(few.parameters):
            parameter.grad = None if rank == 0 or place > 1 else parameter.grad  # and the host of rank 0 merges
        few.optimizer.step()
        same.append((float(few.optimizer.last_norm), float(few.optimizer.last_coefficient)))
        few.set_gradients()
        few.optimizer.descent_limit = 1.0
        with counted_collectives() as calls:
            few.optimizer.step()
        assert calls == [128, 32 * 4]
        if few.is_bad:
            few.optimizer.param_groups[0]["params"].pop()
        before = copied(few.optimizer)
        assert "list different tensors" in str(raised_by(few.optimizer.step))
        assert all(map(torch.equal, kept(few.optimizer), before))
    return same


def steps_that_fail_where_the_host_waits(rank: int, size: int) -> Any:
    """With new states, and with rules that follow training: all raise at once, nothing is kept, and they go on then."""
    mesh, bad = mesh_of(size, "dp"), size - 1
    for make in (*MAKERS, lambda parameters: ClippedSGD(parameters, 0.1, AutoClip())):
        parameter = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Shard(0)]))
        optimizer = make([parameter])
        parameter.grad = DTensor.from_local(torch.ones(4), mesh, [Shard(0)])
        optimizer.param_groups[0]["lr"] = -1.0 if rank == bad else 0.1
        error = raised_by(optimizer.step)
        assert isinstance(error, ValueError if rank == bad else RuntimeError), repr(error)
        assert rank == bad or f"rank {bad} has raised an error, and" in str(error)
        assert not optimizer.state
        assert parameter.to_local().eq(1.0).all()
        assert getattr(optimizer.rule, "state_dict", dict)() == getattr(make([parameter]).rule, "state_dict", dict)()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        assert parameter.to_local().lt(1.0).all()
    return None


def steps_that_fail_where_nothing_waits(rank: int, size: int) -> Any:
    """The rank raises, the others change nothing, and all raise from the first step on that knows of it."""

    def setting(few: Few) -> None:
        few.optimizer.param_groups[0]["lr"] = -1.0

    def type_of_a_gradient(few: Few) -> None:
        local = few.parameters[1].to_local()
        few.parameters[1].grad = None
        few.parameters[1].grad_dtype = None
        few.parameters[1].grad = DTensor.from_local(torch.ones(local.shape).double(), few.mesh, [Shard(0)], run_check=False)

    for make in MAKERS:
        for spoil in (setting, type_of_a_gradient):
            few = Few(make, rank, size)
            optimizer, before = few.optimizer, copied(few.optimizer)
            few.set_gradients()
            if spoil is setting:
                optimizer.grad_scale = torch.tensor(8.0)
            else:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
            if few.is_bad:
                spoil(few)
                error = raised_by(optimizer.step)
                assert isinstance(error, (ValueError, TypeError)), repr(error)
                optimizer.param_groups[0]["lr"] = 0.05
            else:
                with no_waiting():
                    optimizer.step()
                assert (optimizer.last_norm.item(), optimizer.last_coefficient.item()) == (-math.inf, 0.0)
            assert all(map(torch.equal, kept(optimizer), before))
            few.set_gradients()
            for attempt in range(2):
                if few.is_bad and attempt == 0:  # it hears of its error from the others
                    optimizer.step()
                    assert optimizer.last_norm.item() == -math.inf
                else:
                    assert f"rank {few.bad} has raised an error in an earlier call" in str(raised_by(optimizer.step))
            assert all(map(torch.equal, kept(optimizer), before))
            dist.barrier()
            ranks._flags.clear()
    return None


SCENARIOS = [
    steps_of_shards,
    scaled_steps,
    steps_take_one_collective,
    steps_that_fail_where_the_host_waits,
    steps_that_fail_where_nothing_waits,
]
