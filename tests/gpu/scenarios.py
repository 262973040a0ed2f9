"""What each rank does with a CUDA device of its own. What a scenario returns has to be the same on all ranks, to the bit."""

import copy
import math
import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import normclip
from normclip.optim import ClippedAdamW
from support.cuda import no_waiting
from support.ranks import be_a_rank
from support.sharded import Net, close, raised_by

BACKEND = os.environ.get("NORMCLIP_TEST_BACKEND", "nccl")
LIMIT = 0.5


def models(offload: OffloadPolicy) -> tuple[nn.Module, nn.Module]:
    """The whole model, and the same one under FSDP2, both with the gradients of the same batch."""
    torch.manual_seed(0)
    whole = Net().double().cuda()
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cuda", (dist.get_world_size(),)), offload_policy=offload)
    x = 10.0 * torch.randn(2, 8, 12, dtype=torch.float64, device="cuda")
    for model in (whole, sharded):
        model(x).square().sum().backward()
    return whole, sharded


def rows_of(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's shard of a tensor. `full_tensor` of the shards would need a backend for the CPU."""
    rows = whole.chunk(size)
    return rows[rank] if rank < len(rows) else whole[:0]


def check_clipping(offload: OffloadPolicy, rank: int, size: int) -> Any:
    whole, sharded = models(offload)
    # The first call compiles kernels and connects the ranks.
    normclip.clip_grad_norm_(sharded.parameters(), 1e9)
    with nullcontext() if isinstance(offload, CPUOffloadPolicy) else no_waiting():
        norm = normclip.clip_grad_norm_(sharded.parameters(), LIMIT)
    exact = normclip.get_total_norm([parameter.grad for parameter in whole.parameters()])
    close(norm, exact)
    for parameter, part in zip(whole.parameters(), sharded.parameters(), strict=True):
        mine = rows_of(parameter.grad, rank, size)
        local = part.grad.to_local()
        torch.testing.assert_close(local.cuda(), mine * (LIMIT / (exact.item() + 1e-6)), rtol=1e-12, atol=0.0)
    stats = normclip.stats([parameter.grad for parameter in sharded.parameters()])
    close(stats.l2, min(LIMIT, exact.item()), 1e-5)
    assert stats.count == sum(parameter.numel() for parameter in whole.parameters())
    return [norm.item(), stats.l2]


def on_devices(rank: int, size: int) -> Any:
    return check_clipping(OffloadPolicy(), rank, size)


def offloaded(rank: int, size: int) -> Any:
    _, sharded = models(CPUOffloadPolicy())
    assert {parameter.grad.to_local().device.type for parameter in sharded.parameters()} == {"cpu"}
    return check_clipping(CPUOffloadPolicy(), rank, size)


def steps(rank: int, size: int) -> Any:
    """Those of shards against those of the whole model. The first makes states, and the second compiles the kernel that may skip a step."""
    whole, sharded = models(OffloadPolicy())
    theirs, ours = (ClippedAdamW(model.parameters(), 0.05, rule=LIMIT) for model in (whole, sharded))
    for step in range(3):
        theirs.step()
        with no_waiting() if step == 2 else nullcontext():
            ours.step()
    close(ours.last_norm, theirs.last_norm)
    for parameter, part in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(part.detach().to_local(), rows_of(parameter.detach(), rank, size), rtol=1e-9, atol=1e-11)
    return ours.last_norm.item()


def hosts_and_devices_merge_together(rank: int, size: int) -> Any:
    """Rank 0 has no gradient, so that its host merges."""
    mesh = init_device_mesh("cuda", (size,))
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(1000, device="cuda"), mesh, [Shard(0)]))
    if rank > 0 or size == 1:
        parameter.grad = DTensor.from_local(torch.full((1000,), 1.0 + rank, device="cuda"), mesh, [Shard(0)])
    return [normclip.clip_grad_norm_([parameter], math.inf, order).item() for order in (2.0, 1.0, math.inf, 3.0)]


def error_on_one_rank(rank: int, size: int) -> Any:
    """It raises, the others change nothing, and raise when their devices have told of it."""
    if size == 1:
        return []
    mesh, bad = init_device_mesh("cuda", (size,)), rank == size - 1
    parameter = nn.Parameter(DTensor.from_local(torch.ones(4, device="cuda"), mesh, [Shard(0)]))
    local = torch.ones(1, device="cuda").expand(4) if bad else torch.ones(4, device="cuda")
    parameter.grad = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    error = raised_by(lambda: normclip.clip_grad_norm_([parameter], LIMIT, error_if_nonfinite=True))
    assert isinstance(error, ValueError if bad else RuntimeError)
    if bad:
        for _ in range(2):
            assert isinstance(raised_by(lambda: normclip.clip_grad_norm_([parameter], LIMIT)), ValueError)
    else:
        with no_waiting():
            norm = normclip.clip_grad_norm_([parameter], LIMIT)
        assert norm.item() == -math.inf
        assert "in an earlier call" in str(raised_by(lambda: normclip.clip_grad_norm_([parameter], LIMIT)))
    assert local.tolist() == [1.0] * 4
    return []


def torch_on_offloaded(rank: int, size: int) -> Any:
    """What torch's own function does: what this is better at."""
    _, sharded = models(CPUOffloadPolicy())
    if BACKEND == "nccl" and size > 1:
        error = raised_by(lambda: torch.nn.utils.clip_grad_norm_(sharded.parameters(), LIMIT))
        assert "No backend type associated with device type cpu" in str(error)
    return []


if __name__ == "__main__":
    be_a_rank([on_devices, offloaded, torch_on_offloaded, steps, hosts_and_devices_merge_together, error_on_one_rank], None, BACKEND)
