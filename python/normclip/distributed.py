"""Norms and clipping of tensors that are spread over processes, by :mod:`torch.distributed`.

What to call:

- DDP: the usual functions. After ``backward`` all ranks have the same gradients, and :func:`normclip.clip_grad_norm_` gives the same bits
  on all.
- FSDP2 (``fully_shard``), tensor and sequence parallelism, HSDP, and any combination: the usual functions too. Gradients are DTensors,
  which :func:`normclip.clip_grad_norm_`, :func:`normclip.clip_grads_`, :func:`normclip.grad_stats`, :func:`normclip.total_norm` and the
  other functions accept, also of several meshes in one list. Only :func:`normclip.dot` and :meth:`normclip.Moments.of` do not.
- Pipeline stages and experts, where each rank has parameters of its own: pass the process groups along which the parameters differ,
  ``clip_grad_norm_(parameters, 1.0, process_groups=[pp_mesh.get_group()])``.
- Tensors that are not gradients: :func:`total_norm` along a group.

**What is counted.** A DTensor is counted once as a whole, whatever its placements and however uneven its shards. Along a process group, the
plain tensors of all ranks are added up, so do not pass a group whose ranks have copies of the same tensors. Gradients with a Partial
placement, as the weights of norm layers have in sequence parallel training, are reduced for the norm and scaled as they are; their elements
cannot be clamped.

**Collectives.** Every call that needs the norm is a collective: all ranks must make it, with tensors in the same order, as with
operations on DTensors. All ranks merge the same rows in the same order, so all get the same bits and treat non-finite elements alike.
If a rank's tensors are refused, it raises that error and the other ranks a ``RuntimeError`` that names the rank, before any rank has
written. If a rank has died, or does not join within the group's timeout, the other ranks raise torch's error. A rank that raises has not
changed its gradients. A rank without gradients takes part through its parameters if these are DTensors, or through ``process_groups``.

**On CUDA devices** what a rank sends, its row of numbers, stays on the device if the process group sends from there, as with NCCL. Then
norms of order 1, 2 and ``inf``, and clipping by a number, do not wait for the device, unless ``error_if_nonfinite`` or ``process_groups``
are given. Nor do steps of :class:`normclip.optim.ClippedSGD` and :class:`normclip.optim.ClippedAdamW`, unless there are limits on the
update, states are new, as in the first step, or the rule follows training. The host then does not know whether tensors of another rank were
refused. In that case the norm is −inf, which changes no gradient and no parameter. The first later call that finds this out raises the
``RuntimeError``, and so does every call after it, as long as there is this default process group. All other calls wait, and raise at once:
clipping by rules, statistics, :func:`normclip.clip_grads_`. The norm is float64 if this rank has gradients of double precision.

**The result** is a plain 0-dim tensor with the norm of the whole, where torch returns a DTensor.

Cost of a call, for R ranks, whatever the number of tensors:

===========================  =========================================================================================================
passes over the shards       one read; one more read and one write of tensors that are scaled
collectives                  one all-gather for each mesh, and one for each process group. For a mesh of D dimensions that does
                             not span the world, or has more than 1024 ranks: D
bytes that a rank sends      128 in each collective: 13 numbers of Moments, an error flag, a dtype flag and a digest
bytes that it receives       128 R: 1 KiB from 8 ranks, 128 KiB from 1024, 2 MiB from 16384; by dimensions of 128 × 128 32 KiB
merging                      1 to 2 µs a rank: 1 ms for 1024, 40 ms for 16384; by dimensions 0.2 ms
groups of tensors            one more all-gather, of 104 bytes a group
``per_tensor=True``          one more all-gather, of 104 bytes a tensor
Partial gradients            one reduction each, by torch
waiting                      once for the device, where the host merges; else not
===========================  =========================================================================================================

:func:`simulate` measures the error and the time of merging.

Rows are sent from CPU memory by Gloo, and from the device by NCCL. With ``cpu:gloo,cuda:nccl`` the device of the mesh decides, also for
gradients that are offloaded to the CPU; along ``process_groups`` rows of plain tensors go by Gloo.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from normclip._arguments import check_order
from normclip._backends import collect
from normclip._backends.ranks import WIDTH, merged_moments
from normclip._core import Moments
from normclip._results import as_tensor
from normclip.typing import Order, Tensors

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["Simulation", "simulate", "total_norm"]


def total_norm(tensors: Tensors, ord: Order = 2.0, *, group: ProcessGroup | Sequence[ProcessGroup] | None = None) -> torch.Tensor:
    """Norm of the tensors of all ranks of a group as one vector: :func:`normclip.total_norm` across processes.

        ``‖x‖ₚ = (Σ |xᵢ|ᵖ)^(1/p)``, over the elements of all ranks

    A collective: all ranks of the group must call it, also those without tensors.

    Args:
        tensors: As for :func:`normclip.total_norm`. Each rank passes its own; a DTensor is counted as a whole on each rank.
        ord: The order p, the same on all ranks.
        group: The process group; a sequence of groups, along which norms are merged one after the other; or None for all processes.

    Returns:
        The norm as a 0-dim tensor, with the same bits on all ranks, on the device of this rank's first tensor, float64 if any rank's tensor
        is of double precision, else float32.

    Raises:
        RuntimeError: Another rank has raised an error; the message names the rank. Or a rank has died or timed out, which is torch's error.
        TypeError, ValueError: As for :func:`normclip.total_norm`, or this process is not in the group.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> store = dist.FileStore(tempfile.mkstemp()[1], 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
        >>> dist.destroy_process_group()
    """
    import torch.distributed as dist

    ord = check_order("ord", ord)
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
    batch = collect(tensors, process_groups=list(group) if isinstance(group, Sequence) else [group])
    return as_tensor(batch.norm(ord), batch)


@dataclass(frozen=True)
class Simulation:
    """The result of :func:`simulate`.

    Attributes:
        ranks: The number of shards.
        elements: The number of elements of all shards.
        error: The relative error of the merged norm, in float64.
        error_by_dimensions: The relative error if norms are merged by rows and then by columns of a square mesh.
        float32_error: The relative error of the norm of the ranks' float32 norms, as torch computes it.
        seconds: The time in which one rank merges the moments of all ranks.
        seconds_by_dimensions: The time in which one rank merges those of its mesh row and of one mesh column.
        received: The bytes that one rank receives.
        received_by_dimensions: The bytes that one rank receives from its mesh row and column.
    """

    ranks: int
    elements: int
    error: float
    error_by_dimensions: float
    float32_error: float
    seconds: float
    seconds_by_dimensions: float
    received: int
    received_by_dimensions: int


def simulate(side: int = 128, elements: int = 64, seed: int = 0) -> Simulation:
    """Merge the moments of the shards of side × side ranks, as each rank would, and compare with the exact norm.

    Shards have float32 values whose scales range over twelve powers of ten, and different sizes; some are empty.

    Args:
        side: The number of ranks along each of the two mesh dimensions.
        elements: The largest number of elements of a shard.
        seed: The seed of the random numbers.

    Returns:
        Errors, times and bytes.

    Example:
        >>> found = simulate(side=4)
        >>> found.ranks, found.received, found.error < 1e-15
        (16, 2048, True)
    """
    rng = np.random.default_rng(seed)
    ranks = side * side
    sizes, scales = rng.integers(0, elements + 1, ranks), 10.0 ** rng.uniform(-6.0, 6.0, ranks)
    shards = [(scale * rng.standard_normal(size)).astype(np.float32) for size, scale in zip(sizes, scales, strict=True)]
    rows = np.array([Moments.of(shard).to_array() for shard in shards])
    # The square of a float32 is exact in float64, and fsum rounds once.
    exact = math.sqrt(math.fsum(np.square(np.concatenate(shards), dtype=np.float64).tolist()))

    start = time.perf_counter()
    merged = merged_moments(rows)
    seconds = time.perf_counter() - start

    mesh = rows.reshape(side, side, -1)
    start = time.perf_counter()
    first = merged_moments(mesh[0])
    column = np.array([first, *map(merged_moments, mesh[1:])])
    within = time.perf_counter() - start
    start = time.perf_counter()
    by_dimensions = merged_moments(column)
    across = time.perf_counter() - start

    norms = np.array([np.float32(Moments.from_array(row).l2) for row in rows.tolist()])

    def error_of(norm: float) -> float:
        return abs(norm - exact) / exact

    return Simulation(
        ranks=ranks,
        elements=int(sizes.sum()),
        error=error_of(Moments.from_array(merged).l2),
        error_by_dimensions=error_of(Moments.from_array(by_dimensions).l2),
        float32_error=error_of(float(np.linalg.norm(norms))),
        seconds=seconds,
        seconds_by_dimensions=within / side + across,  # a rank merges its own row alone
        received=ranks * WIDTH * 8,
        received_by_dimensions=2 * side * WIDTH * 8,
    )
