"""What each rank does. A scenario checks its rank, and returns what has to be the same on all ranks, to the bit."""

import copy
import datetime
import math
import time
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module

import normclip
import normclip._backends.dtensors
from normclip import distributed
from support import stepping
from support.ranks import be_a_rank
from support.sharded import (
    ORDERS,
    Net,
    check_like_whole,
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
from support.steps import groups_without_gradients, monitored, monitored_error, thresholds

# ---- Ways to shard ----


def fsdp(rank: int, size: int) -> Any:
    whole, sharded = model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")))
    assert sharded.head.bias.grad.to_local().numel() == {2: (2, 1), 4: (1, 1, 1, 0)}[size][rank]
    return check_like_whole(whole, sharded)


def hsdp(rank: int, size: int) -> Any:
    """Sharded over one dimension, replicated over the other."""
    return check_like_whole(*model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "replicate", "shard"))))


def fsdp_bfloat16(rank: int, size: int) -> Any:
    _, sharded = model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")), torch.bfloat16)
    before = grads_of(sharded)
    twins = [nn.Parameter(grad) for grad in before]
    for twin in twins:
        twin.grad = twin.detach().clone()
    norm = normclip.clip_grad_norm_(sharded.parameters(), 0.5)
    assert norm.dtype == torch.float32
    assert norm == normclip.clip_grad_norm_(twins, 0.5)
    assert all(map(torch.equal, grads_of(sharded), (twin.grad for twin in twins)))
    return [norm.item()]


def cpu_offload(rank: int, size: int) -> Any:
    offload = CPUOffloadPolicy(pin_memory=False)
    return check_like_whole(*model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp"), offload_policy=offload)))


def tensor_parallel(rank: int, size: int) -> Any:
    return check_like_whole(*model_of(lambda model: make_tensor_parallel(model, mesh_of(size, "tp"))))


def sequence_parallel(rank: int, size: int) -> Any:
    """The gradients of the norm's weights are Partial."""

    def shard(model: nn.Module) -> None:
        mesh = mesh_of(size, "tp")
        split = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
        parallelize_module(model, mesh, {"norm": split})
        parallelize_module(
            model, mesh, {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel()}
        )

    whole, sharded = model_of(shard)
    assert any(isinstance(placement, Partial) for placement in sharded.norm.weight.grad.placements)
    error = raised_by(lambda: normclip.clip_grad_value_(sharded.parameters(), 1.0))
    assert isinstance(error, TypeError)
    assert "Partial" in str(error)
    assert "Partial" in str(raised_by(lambda: normclip.clip_grads_(sharded, 1.0, nonfinite="zero")))
    return check_like_whole(whole, sharded)


def fsdp_and_tensor_parallel(rank: int, size: int) -> Any:
    if size < 4:
        return None
    whole, sharded = model_of(lambda model: make_tensor_parallel_and_shard(model, mesh_of(size, "dp", "tp")))
    assert {p.grad.device_mesh.ndim for p in sharded.parameters()} == {1, 2}
    return check_like_whole(whole, sharded)


def mesh_by_dimensions(rank: int, size: int) -> Any:
    """Gathered by dimensions, as large meshes are and parts of the world: the same bits as at once, but for general orders."""
    if size < 4:
        return None
    mesh = mesh_of(size, "a", "b")
    torch.manual_seed(0)
    wholes = [torch.randn(5, 3), torch.randn(4, 7, dtype=torch.float64)]
    placements = [(Replicate(), Shard(0)), (Shard(1), Shard(0))]
    tensors = [distribute_tensor(whole, mesh, placed) for whole, placed in zip(wholes, placements, strict=True)]
    found = [float(normclip.total_norm(tensors, order)) for order in ORDERS]
    normclip._backends.dtensors._AT_ONCE, before = 0, normclip._backends.dtensors._AT_ONCE
    try:
        by_dimensions = [float(normclip.total_norm(tensors, order)) for order in ORDERS]
        figures = normclip.stats(tensors, per_tensor=True)
    finally:
        normclip._backends.dtensors._AT_ONCE = before
    assert by_dimensions[:3] == found[:3]
    expected = normclip.stats(wholes, per_tensor=True)
    assert figures.count == expected.count == 43
    np.testing.assert_allclose(figures.per_tensor.l2, expected.per_tensor.l2, rtol=1e-15)
    np.testing.assert_allclose(figures.per_tensor.l1, expected.per_tensor.l1, rtol=1e-15)
    for order, *norms in zip(ORDERS, found, by_dimensions, strict=True):
        for norm in norms:
            close(norm, normclip.total_norm(wholes, order), 1e-15 if order != 0.5 else 1e-14)
    return [found, by_dimensions]


def ddp(rank: int, size: int) -> Any:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net().double())
    torch.manual_seed(rank)  # other data on each rank
    model(torch.randn(4, 8, 12, dtype=torch.float64)).square().sum().backward()
    with counted_collectives() as calls:
        norm = normclip.clip_grad_norm_(model.parameters(), 0.5)
    assert calls == []
    return [norm.item(), *(grad.numpy().tobytes() for grad in grads_of(model))]


def pipeline(rank: int, size: int) -> Any:
    """Other layers on each rank, and of 4 ranks each stage sharded over 2."""
    whole, _ = model_of()
    layers = [whole.norm, whole.up, whole.down, whole.head]
    if size == 2:
        stage, group = rank, dist.group.WORLD
    else:
        mesh = mesh_of(size, "pp", "dp")
        stage, group = mesh.get_local_rank("pp"), mesh["pp"].get_group()
    mine = nn.Sequential(*copy.deepcopy(layers[2 * stage : 2 * stage + 2]))
    grads = [parameter.grad for layer in layers[2 * stage : 2 * stage + 2] for parameter in layer.parameters()]
    if size == 4:
        fully_shard(mine, mesh=mesh["dp"])
    for parameter, grad in zip(mine.parameters(), grads, strict=True):
        parameter.grad = distribute_tensor(grad, mesh["dp"], [Shard(0)]) if size == 4 else grad.clone()
    same = []
    for order in ORDERS:
        norm = normclip.get_total_norm([p.grad for p in mine.parameters()], order, process_groups=[group])
        close(norm, normclip.get_total_norm([p.grad for p in whole.parameters()], order), 1e-15 if order != 0.5 else 1e-14)
        same.append(norm.item())
    figures = normclip.grad_stats(mine, process_groups=[group], per_tensor=True)
    close(figures.l2, normclip.grad_stats(whole).l2, 1e-15)
    assert figures.count == normclip.grad_stats(whole).count
    assert figures.per_tensor.count.tolist() == [grad.numel() for grad in grads]
    assert isinstance(raised_by(lambda: normclip.grad_stats(mine, groups=str, process_groups=[group])), ValueError)

    norm = normclip.clip_grad_norm_(mine.parameters(), 0.5, process_groups=[group])
    assert norm.item() == same[1]
    close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5))
    for parameter, grad in zip(mine.parameters(), grads, strict=True):
        torch.testing.assert_close(full(parameter.grad), grad, rtol=1e-12, atol=0.0)
    same.append(normclip.clip_grads_(mine, 0.25, process_groups=[group]).coefficient)
    close(same[-1], 0.5, 1e-5)
    return same


# ---- The interface ----


def one_collective(rank: int, size: int) -> Any:
    mesh = mesh_of(size, "dp")
    parameters = [nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])) for _ in range(300)]
    for parameter in parameters:
        parameter.grad = DTensor.from_local(torch.full((3,), 1.0 + rank), mesh, [Shard(0)])
    with counted_collectives() as calls:
        normclip.clip_grad_norm_(parameters, 1.0)
        normclip.get_total_norm((p.grad for p in parameters), 3.0)
        normclip.grad_stats(parameters)
        normclip.clip_grad_value_(parameters, 1.0)
        normclip.scale_([p.grad for p in parameters], 0.5)
    assert calls == [128] * 3
    with counted_collectives() as calls:
        normclip.grad_stats(parameters, per_tensor=True, groups=lambda name: name[-1])
    assert calls == [128, 10 * 104, 300 * 104]
    return None


def plain_tensors(rank: int, size: int) -> Any:
    """Along groups, also NumPy's, of other types on each rank, and none at all."""
    array = np.full(2, 1.0 + rank, np.float32 if rank else np.float64)
    expected = math.sqrt(2.0 * sum((1.0 + other) ** 2 for other in range(size)))
    norm = distributed.total_norm(array)
    assert norm.dtype == torch.float64
    close(norm, expected, 1e-15)
    smallest = distributed.total_norm([array] if rank else [], -math.inf, group=[dist.group.WORLD])
    assert smallest.item() == 2.0
    assert distributed.total_norm([]).item() == 0.0
    lone = dist.new_group([0])
    if rank == 0:
        assert distributed.total_norm([array], group=lone) == normclip.total_norm([torch.from_numpy(array)])
    else:
        assert isinstance(raised_by(lambda: distributed.total_norm([array], group=lone)), ValueError)

    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = None if rank == 0 else torch.ones(2)
    clipped = normclip.clip_grad_norm_([parameter], 1.0, process_groups=[dist.group.WORLD])
    close(clipped, math.sqrt(2.0 * (size - 1)), 1e-7)
    return [norm.item(), clipped.item()]


def beside_plain_tensors(rank: int, size: int) -> Any:
    """A replica counts once, in one list with shards and with plain tensors; a tensor that is listed twice counts once."""
    mesh = mesh_of(size, "dp")
    wholes = [torch.arange(1.0, 6.0), torch.full((3,), 2.0), torch.full((4,), 3.0)]
    shards = [distribute_tensor(wholes[0], mesh, [Shard(0)]), distribute_tensor(wholes[1], mesh, [Replicate()]), wholes[2]]
    norm = normclip.total_norm([*shards, shards[0]])
    assert norm == normclip.total_norm(wholes)
    figures = normclip.stats([*shards, shards[0]], per_tensor=True, groups={"a": ["0", "3"], "b": ["*"]})
    assert figures.per_tensor.count.tolist() == [5.0, 3.0, 4.0, 5.0]
    assert (figures.count, figures.groups["a"].count, figures.groups["b"].count) == (12, 5, 7)
    assert normclip.total_norm(shards[0].redistribute(placements=[Replicate()])) == normclip.total_norm(wholes[0])
    normclip.scale_(shards, 2.0)
    normclip.clamp_(shards, 5.0)
    assert full(shards[0]).tolist() == [2.0, 4.0, 5.0, 5.0, 5.0]
    assert full(shards[1]).tolist() == [4.0] * 3
    assert shards[2].tolist() == [5.0] * 4
    parts, largest = (DTensor.from_local(torch.full((2,), 1.0 + rank), mesh, [Partial(operation)]) for operation in ("sum", "max"))
    close(normclip.total_norm(parts), math.sqrt(2.0) * size * (size + 1) / 2, 1e-7)
    assert "only sums and averages are supported" in str(raised_by(lambda: normclip.total_norm([parts, largest])))
    parameter = nn.Parameter(shards[0].clone())
    parameter.grad = shards[0]
    normclip.clip_grads_with_norm_([parameter], 1.0, torch.nn.utils.get_total_norm([shards[0]]))
    close(normclip.total_norm(full(shards[0])), 1.0, 1e-6)
    return [norm.item()]


# ---- What one rank alone has ----


def nonfinite_on_one_rank(rank: int, size: int) -> Any:
    same: list[Any] = []
    for value in (math.nan, math.inf):
        _, sharded = model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")))
        if rank == size - 1:
            sharded.up.weight.grad.to_local()[0, 0] = value
        before = grads_of(sharded)
        norm = normclip.get_total_norm([p.grad for p in sharded.parameters()])
        assert str(norm.item()) == str(value)
        error = raised_by(lambda: normclip.clip_grad_norm_(sharded.parameters(), 0.5, error_if_nonfinite=True))  # noqa: B023
        assert isinstance(error, RuntimeError)
        assert ("parameters[2].grad (1 NaN" if math.isnan(value) else "(0 NaN, 1 inf)") in str(error) or rank < size - 1
        assert "on other ranks" in str(error) or rank == size - 1
        assert isinstance(raised_by(lambda: normclip.clip_grads_(sharded, 0.5, nonfinite="raise")), RuntimeError)  # noqa: B023
        skipped = normclip.clip_grads_(sharded, 0.5, nonfinite="skip")
        assert (skipped.skipped, skipped.found_inf) == (True, True)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(grads_of(sharded), before, strict=True))
        zeroed = normclip.clip_grads_(sharded, 0.5, nonfinite="zero", per_tensor=True)
        assert zeroed.found_inf
        assert zeroed.stats.top(1, "nans" if math.isnan(value) else "infs") == [("up.weight", 1.0)]
        close(normclip.get_total_norm(grads_of(sharded)), 0.5, 1e-9)
        same += [zeroed.coefficient, zeroed.norm]
        if rank == size - 1:
            sharded.up.weight.grad.to_local()[0, 0] = value
        normclip.clip_grad_norm_(sharded.parameters(), 0.5)
        after = grads_of(sharded)
        assert all(grad.isnan().all() for grad in after) if math.isnan(value) else not any(grad.any() for grad in after[:2])
    return same


def error_on_one_rank(rank: int, size: int) -> Any:
    """It raises its own error, and the others one that names it. Nobody has written."""
    mesh, bad = mesh_of(size, "dp"), size - 1
    locals_ = [torch.ones(4), torch.zeros(1).expand(4) if rank == bad else torch.zeros(4)]
    parameters = [nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Shard(0)])) for _ in locals_]
    for parameter, local in zip(parameters, locals_, strict=True):
        parameter.grad = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    plain = nn.Parameter(torch.ones(4))
    plain.grad = locals_[1]

    for call in (
        lambda: normclip.clip_grad_norm_(parameters, 0.5),
        lambda: normclip.clip_grad_norm_(parameters, 0.5, 3.0),
        lambda: normclip.clip_grads_(parameters, 0.5, nonfinite="zero"),
        lambda: normclip.clip_grads_(parameters, limits={"all": 0.5}, groups={"all": ["*"]}),
        lambda: normclip.clip_grad_norm_([plain], 0.5, process_groups=[dist.group.WORLD]),
        lambda: distributed.total_norm([torch.ones(3, dtype=torch.int64 if rank == bad else torch.float32)]),
        lambda: normclip.grad_stats(parameters, groups={"all": ["*"] if rank == bad else ["0", "1"], "no": ["x"] if rank == bad else []}),
    ):
        error = raised_by(call)
        assert isinstance(error, (ValueError, TypeError)) if rank == bad else isinstance(error, RuntimeError), repr(error)
        assert rank == bad or f"rank {bad}" in str(error)
    assert all(local.unique().numel() == 1 for local in locals_)
    return None


def no_gradients_on_one_rank(rank: int, size: int) -> Any:
    mesh = mesh_of(size, "dp")
    parameters = [nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])) for _ in range(2)]
    plain = nn.Parameter(torch.zeros(2))
    plain.grad = torch.zeros(2)
    for parameter in parameters if rank else ():
        parameter.grad = DTensor.from_local(torch.full((3,), 2.0), mesh, [Shard(0)])
    norm = normclip.clip_grad_norm_([plain, *parameters], 1.0)
    close(norm, math.sqrt(24.0 * (size - 1)), 1e-7)
    # A figure for each tensor would be of other tensors on each rank.
    error = raised_by(lambda: normclip.grad_stats(parameters, per_tensor=True))
    assert isinstance(error, ValueError)
    assert "different tensors" in str(error)
    return [norm.item(), normclip.grad_stats(parameters).l2]


def late_rank(rank: int, size: int) -> Any:
    """Those who wait get an error in the group's time, with their gradients as they were."""
    dist.barrier()  # as the group is made within the same time
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), 1.0)
    start = time.monotonic()
    if rank == size - 1:
        time.sleep(4.0)
    else:
        error = raised_by(lambda: normclip.clip_grad_norm_([parameter], 0.5, process_groups=[group]))
        assert isinstance(error, RuntimeError)
        assert time.monotonic() - start < 20.0
    assert parameter.grad.tolist() == [1.0, 1.0]
    dist.barrier()
    return None


def killed_rank(rank: int, size: int) -> Any:
    """The last scenario."""
    dist.barrier()
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    mesh = mesh_of(size, "dp")
    parameter = nn.Parameter(torch.zeros(2))
    shard = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]))
    parameter.grad, shard.grad = torch.ones(2), DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    normclip.clip_grad_norm_([parameter, shard], 100.0, process_groups=[group])
    if rank == size - 1:
        return None  # and the process is gone
    start = time.monotonic()
    for parameters, groups in (([parameter], [group]), ([parameter, shard], None)):
        error = raised_by(lambda: normclip.clip_grad_norm_(parameters, 0.5, process_groups=groups))  # noqa: B023
        assert isinstance(error, RuntimeError)
    assert time.monotonic() - start < 30.0
    assert parameter.grad.tolist() == shard.grad.to_local().tolist() == [1.0, 1.0]
    return None


SCENARIOS = [
    fsdp,
    hsdp,
    fsdp_bfloat16,
    cpu_offload,
    tensor_parallel,
    sequence_parallel,
    fsdp_and_tensor_parallel,
    mesh_by_dimensions,
    ddp,
    pipeline,
    one_collective,
    plain_tensors,
    beside_plain_tensors,
    nonfinite_on_one_rank,
    error_on_one_rank,
    no_gradients_on_one_rank,
    thresholds,
    groups_without_gradients,
    monitored,
    monitored_error,
    *stepping.SCENARIOS,
    late_rank,
]

if __name__ == "__main__":
    warnings.simplefilter("error", category=UserWarning)
    be_a_rank(SCENARIOS, killed_rank)
