"""FSDP2 with parameters in CPU memory, on two processes: `python examples/fsdp2_cpu_offload.py [--quick]`.

`CPUOffloadPolicy` keeps shards, gradients and optimizer states in CPU memory, where ClippedAdamW clips by the norm of the whole model and
steps. Here all of it is on the CPU, over gloo. With GPUs, which this has not been run with yet, make a mesh of type "cuda" and the process
group "cpu:gloo,cuda:nccl", leave out `pin_memory`, and give each rank its own device, on which its batches are.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from normclip.optim import ClippedAdamW

LIMIT = 1.0
LR = 1e-3
RANKS = 2


def model_of(width: int) -> nn.Module:
    """A network that is sharded over all ranks, with the same weights in every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


def torch_adamw(model: nn.Module) -> Callable[[], object]:
    """Clip and step as torch does it."""
    optimizer = torch.optim.AdamW(model.parameters(), LR)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()

    return clip_and_step


def train(rank: int, width: int, steps: int, port: int) -> None:
    """What each rank does. The first prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)  # ranks share the machine
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    models = {name: model_of(width) for name in ("clip_grad_norm_, AdamW", "ClippedAdamW")}
    theirs, ours = models.values()
    calls = dict(zip(models, (torch_adamw(theirs), ClippedAdamW(ours.parameters(), LR, rule=LIMIT).step), strict=True))
    times: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, float] = {}
    generator = torch.Generator().manual_seed(rank)  # each rank has data of its own
    for _ in range(steps):
        batch = torch.randn(32, width, generator=generator)
        for name, model in models.items():
            model.zero_grad()
            loss = (model(batch) - batch).square().mean()
            loss.backward()
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
            losses[name] = loss.item()
    if rank == 0:
        sharded = next(iter(ours.parameters()))
        assert isinstance(sharded, DTensor)
        sys.stdout.write(f"{RANKS} ranks, {sum(parameter.numel() for parameter in ours.parameters()):,} parameters, {steps} steps\n")
        sys.stdout.write(f"{'':24}{'loss':>10}{'clip + step':>14}\n")
        for name in models:
            sys.stdout.write(f"{name:24}{losses[name]:10.5f}{statistics.median(times[name]) * 1e3:11.3f} ms\n")
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network and few steps")
    width, steps = (32, 5) if parser.parse_args().quick else (512, 100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (width, steps, port), nprocs=RANKS)


if __name__ == "__main__":
    main()
