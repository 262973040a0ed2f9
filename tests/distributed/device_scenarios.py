"""What each rank does with the kernels of CUDA devices, interpreted, for which tensors in CPU memory pass for those of a device.

A scenario checks its rank, and returns what has to be the same on all ranks, to the bit.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import normclip
from normclip import _backends
from normclip._backends import dtensors, ranks
from normclip._backends.choose import serving
from normclip._backends.cuda import Tuning
from normclip._backends.protocol import USUAL, Served
from normclip._backends.tables import Chunking
from normclip.optim import ClippedSGD
from normclip.rules import Soft
from normclip.thresholds import AutoClip
from support import device_stepping
from support.device_stepping import no_waiting
from support.ranks import be_a_rank
from support.sharded import (
    close,
    counted_collectives,
    full,
    grads_of,
    make_tensor_parallel,
    make_tensor_parallel_and_shard,
    mesh_of,
    model_of,
    raised_by,
)

ORDERS = (2.0, 1.0, math.inf)
LIMIT = 0.5


def check_clipping(whole: nn.Module, sharded: nn.Module) -> list[Any]:
    """Norms and clipping of a sharded model against the whole one, of which nothing waits."""
    before, grads = grads_of(sharded), [parameter.grad for parameter in sharded.parameters()]
    with no_waiting():
        norms = [normclip.get_total_norm(grads, order) for order in ORDERS]
        clipped = normclip.clip_grad_norm_(sharded.parameters(), LIMIT)
    assert clipped == norms[0]
    for norm, order in zip(norms, ORDERS, strict=True):
        assert (norm.dtype, norm.shape) == (torch.float64, ())
        close(norm, exact_norm(before, order), 1e-15)
    torch.nn.utils.clip_grad_norm_(whole.parameters(), LIMIT)
    for found, expected in zip(grads_of(sharded), grads_of(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    return [*(norm.item() for norm in norms), *(grad.numpy().tobytes() for grad in grads_of(sharded))]


def exact_norm(tensors: list[torch.Tensor], order: float = 2.0) -> float:
    """By Rust, which is much faster than an interpreter."""
    with serving(USUAL):
        return float(_backends.collect(tensors).norm(order))


# ---- Ways to shard ----


def fsdp(rank: int, size: int) -> Any:
    """Of 4 ranks, one has no row of the head."""
    found = check_clipping(*(models := model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")))))
    close(normclip.grad_stats(models[1]).l2, LIMIT, 1e-5)
    return found


def hsdp(rank: int, size: int) -> Any:
    return check_clipping(*model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "replicate", "shard"))))


def tensor_parallel_beside_replicas(rank: int, size: int) -> Any:
    """Plain gradients beside those of shards."""
    return check_clipping(*model_of(lambda model: make_tensor_parallel(model, mesh_of(size, "tp"))))


def two_meshes(rank: int, size: int) -> Any:
    if size < 4:
        return None
    return check_clipping(*model_of(lambda model: make_tensor_parallel_and_shard(model, mesh_of(size, "dp", "tp"))))


def mesh_by_dimensions(rank: int, size: int) -> Any:
    if size < 4:
        return None
    dtensors._AT_ONCE, before = 0, dtensors._AT_ONCE
    try:
        return hsdp(rank, size)
    finally:
        dtensors._AT_ONCE = before


def partial_sums(rank: int, size: int) -> Any:
    mesh = mesh_of(size, "tp")
    parts = DTensor.from_local(torch.full((2,), 1.0 + rank), mesh, [Partial()])
    with no_waiting():
        norm = normclip.total_norm(parts)
    close(norm, math.sqrt(2.0) * size * (size + 1) / 2, 1e-7)
    return norm.item()


def types(rank: int, size: int) -> Any:
    """Norms have the type of the gradients, complex numbers have moduli, and a scaled sum is of float64 alone."""
    mesh = mesh_of(size, "dp")
    found = []
    for dtype, factor, kind in (
        (torch.bfloat16, 1.0, torch.float32),
        (torch.float32, 1e30, torch.float32),
        (torch.complex64, 1.0, torch.float32),
        (torch.float64, 1e-200, torch.float64),
        (torch.float64, 1e300, torch.float64),
    ):
        tensors = [distribute_tensor(factor * torch.arange(1.0, 8.0).to(dtype), mesh, [kept]) for kept in (Shard(0), Replicate())]
        with no_waiting():
            norms = [normclip.total_norm(tensors, order) for order in ORDERS]
        for norm, order in zip(norms, ORDERS, strict=True):
            assert norm.dtype == kind
            close(norm, exact_norm([full(tensor) for tensor in tensors], order), 1e-15 if kind == torch.float64 else 1e-7)
        found.append([norm.item() for norm in norms])
    return found


# ---- The interface ----


def within_the_limit(rank: int, size: int) -> Any:
    """What is measured on the device alone, and then used there, changes nothing."""
    _, sharded = model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")))
    before = grads_of(sharded)
    with no_waiting():
        norms = [normclip.clip_grad_norm_(sharded.parameters(), limit) for limit in (math.inf, 1e9)]
    assert all(map(torch.equal, grads_of(sharded), before))
    normclip.clip_grads_with_norm_(sharded.parameters(), LIMIT, norms[0])  # which checks a number in CPU memory
    close(exact_norm(grads_of(sharded)), LIMIT, 1e-5)
    return [norm.item() for norm in norms]


def one_collective(rank: int, size: int) -> Any:
    mesh = mesh_of(size, "dp")
    parameters = [nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])) for _ in range(5)]
    for parameter in parameters:
        parameter.grad = DTensor.from_local(torch.full((3,), 1.0 + rank), mesh, [Shard(0)])
    with counted_collectives() as calls, no_waiting():
        normclip.clip_grad_norm_(parameters, 1.0)
        normclip.get_total_norm([parameter.grad for parameter in parameters], 1.0)
        normclip.total_norm([parameter.grad for parameter in parameters], math.inf)
        ClippedSGD(parameters, 0.1, 1.0).step()
    assert calls == [128] * 4
    with counted_collectives() as calls:
        normclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        normclip.clip_grad_norm_(parameters, rule=Soft(1.0))
        normclip.clip_grad_norm_(parameters, rule=AutoClip())
        normclip.get_total_norm([parameter.grad for parameter in parameters], 3.0)
        ClippedSGD(parameters, 0.1, AutoClip()).step()
        normclip.clip_grads_(parameters, 1.0)
    assert calls == [128] * 6
    return None


def hosts_and_devices_merge_together(rank: int, size: int) -> Any:
    """Rank 0 has no gradient and merges on its host; with the same bits."""
    mesh = mesh_of(size, "dp")
    torch.manual_seed(rank)
    parameters = [nn.Parameter(DTensor.from_local(torch.zeros(50), mesh, [Shard(0)])) for _ in range(2)]
    for parameter in parameters if rank else ():
        parameter.grad = DTensor.from_local(torch.randn(50) * 10.0 ** (3 * rank), mesh, [Shard(0)])
    batch = _backends.collect_grads(parameters, writable=True)
    norms = [float(batch.norm(order)) for order in ORDERS]
    batch.clip_(1.0, norms[0], 0.0)
    clipped = normclip.clip_grad_norm_(parameters, rule=Soft(0.5))
    close(clipped, 1.0, 1e-6)
    return [*norms, clipped.item()]


def nothing_to_clip(rank: int, size: int) -> Any:
    """No gradients anywhere, and only empty ones."""
    mesh = mesh_of(size, "dp")
    parameters = [nn.Parameter(DTensor.from_local(torch.zeros(0), mesh, [Shard(0)]))]
    assert normclip.clip_grad_norm_(parameters, 1.0).item() == 0.0
    parameters[0].grad = DTensor.from_local(torch.zeros(0), mesh, [Shard(0)])
    with no_waiting():
        norm = normclip.clip_grad_norm_(parameters, 1.0)
    assert norm.item() == 0.0
    clips = AutoClip()
    normclip.clip_grad_norm_(parameters, rule=clips)
    return clips.state_dict()


def nonfinite_on_one_rank(rank: int, size: int) -> Any:
    for value in (math.nan, math.inf):
        _, sharded = model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")))
        if rank == size - 1:
            sharded.up.weight.grad.to_local()[0, 0] = value
        error = raised_by(lambda: normclip.clip_grad_norm_(sharded.parameters(), LIMIT, error_if_nonfinite=True))  # noqa: B023
        assert isinstance(error, RuntimeError)
        assert ("parameters[2].grad" if rank == size - 1 else "on other ranks (1 NaN" if math.isnan(value) else "1 inf)") in str(error)
        with no_waiting():
            norm = normclip.clip_grad_norm_(sharded.parameters(), LIMIT)
        assert str(norm.item()) == str(value)
        after = grads_of(sharded)
        assert all(grad.isnan().all() for grad in after) if math.isnan(value) else not any(grad.any() for grad in after[:2])
    return None


# ---- Errors of one rank ----


class Failing:
    """Parameters with gradients on the last rank that cannot be written."""

    def __init__(self, rank: int, size: int) -> None:
        mesh, self.is_bad = mesh_of(size, "dp"), rank == size - 1
        self.locals = [torch.ones(4), torch.ones(1).expand(4) if self.is_bad else torch.ones(4)]
        self.parameters = [nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Shard(0)])) for _ in self.locals]
        for parameter, local in zip(self.parameters, self.locals, strict=True):
            parameter.grad = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    def unchanged(self) -> bool:
        return all(local.unique().tolist() == [1.0] for local in self.locals)

    def mend(self) -> None:
        self.locals[1] = torch.ones(4)
        self.parameters[1].grad = DTensor.from_local(self.locals[1], self.parameters[1].device_mesh, [Shard(0)])


def errors_where_the_host_waits(rank: int, size: int) -> Any:
    """All ranks raise at once, and go on then."""
    given = Failing(rank, size)
    parameters = given.parameters
    clips = AutoClip()
    calls: tuple[Callable[[], Any], ...] = (
        lambda: normclip.clip_grad_norm_(parameters, LIMIT, error_if_nonfinite=True),
        lambda: normclip.clip_grad_norm_(parameters, rule=Soft(LIMIT)),
        lambda: normclip.clip_grad_norm_(parameters, rule=clips),
        lambda: normclip.clip_grad_norm_(parameters, LIMIT, 3.0),
        lambda: normclip.clip_grads_(parameters, LIMIT),
        lambda: ClippedSGD(parameters, 0.1, LIMIT, momentum=0.9).step() if not given.is_bad else normclip.clip_grads_(parameters, LIMIT),
    )
    for call in calls:
        error = raised_by(call)
        assert isinstance(error, ValueError if given.is_bad else RuntimeError), repr(error)
        assert given.is_bad or f"rank {size - 1} has raised an error, and" in str(error)
        assert given.unchanged()
    assert clips.state_dict() == AutoClip().state_dict()
    given.mend()
    norm = normclip.clip_grad_norm_(parameters, LIMIT)
    close(norm, math.sqrt(8.0 * size), 1e-7)
    return norm.item()


def errors_where_nothing_waits(rank: int, size: int) -> Any:
    """The rank raises, the others change nothing, and all raise from the first call on that knows of it."""
    given = Failing(rank, size)
    parameters, group = given.parameters, dist.group.WORLD
    if given.is_bad:
        assert isinstance(raised_by(lambda: normclip.clip_grad_norm_(parameters, LIMIT)), ValueError)
    else:
        with no_waiting():
            batch = _backends.collect_grads(parameters, writable=True)
            norm = batch.norm(2.0)
            batch.clip_(0.0, norm, 1e-6)
        assert norm.rounded.item() == -math.inf
    assert given.unchanged()

    given.mend()
    if given.is_bad:  # it hears of its error from the others
        assert normclip.clip_grad_norm_(parameters, LIMIT).item() == -math.inf
    else:
        assert "in an earlier call" in str(raised_by(lambda: normclip.clip_grad_norm_(parameters, LIMIT)))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: normclip.clip_grad_norm_(parameters, LIMIT),
        lambda: normclip.clip_grad_norm_(parameters, LIMIT, process_groups=[group]),
        lambda: normclip.clip_grads_(parameters, LIMIT),
        lambda: normclip.grad_stats(parameters),
    )
    for call in calls:
        assert f"rank {size - 1} has raised an error in an earlier call" in str(raised_by(call))
    assert given.unchanged()
    ranks._flags.clear()
    return None


SCENARIOS = [
    fsdp,
    hsdp,
    tensor_parallel_beside_replicas,
    two_meshes,
    mesh_by_dimensions,
    partial_sums,
    types,
    within_the_limit,
    one_collective,
    hosts_and_devices_merge_together,
    nothing_to_clip,
    nonfinite_on_one_rank,
    errors_where_the_host_waits,
    errors_where_nothing_waits,
    *device_stepping.SCENARIOS,
]

if __name__ == "__main__":
    warnings.simplefilter("error", category=UserWarning)
    tuning = Tuning(chunking=Chunking(chunk=64), tile=512, unroll=2, lanes=8, short=2)
    with serving(Served(rust=(), triton=(1,), tuning=tuning)):
        be_a_rank(SCENARIOS, None)
