"""What each rank does with a CUDA device of its own. What a scenario returns has to be the same on all ranks, to the bit."""

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

import normclip
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


def check_clipping(offload: OffloadPolicy, rank: int, size: int) -> Any:
    whole, sharded = models(offload)
    norm = normclip.clip_grad_norm_(sharded.parameters(), LIMIT)
    exact = normclip.get_total_norm([parameter.grad for parameter in whole.parameters()])
    close(norm, exact)
    for parameter, part in zip(whole.parameters(), sharded.parameters(), strict=True):
        # `full_tensor` would need a backend for the CPU.
        rows = parameter.grad.chunk(size)
        mine = rows[rank] if rank < len(rows) else parameter.grad[:0]
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


def torch_on_offloaded(rank: int, size: int) -> Any:
    """What torch's own function does: what this is better at."""
    _, sharded = models(CPUOffloadPolicy())
    if BACKEND == "nccl" and size > 1:
        error = raised_by(lambda: torch.nn.utils.clip_grad_norm_(sharded.parameters(), LIMIT))
        assert "No backend type associated with device type cpu" in str(error)
    return []


if __name__ == "__main__":
    be_a_rank([on_devices, offloaded, torch_on_offloaded], None, BACKEND)
