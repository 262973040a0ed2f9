r"""Norms and clipping of what many processes hold, with :mod:`torch.distributed` as the engine.

What to call:

- DDP: nothing new. After ``backward`` all ranks have the same gradients, and :func:`normclip.clip_grad_norm_` gives the same bits on all.
- FSDP2 (``fully_shard``), tensor and sequence parallel, HSDP, and any of them together: nothing new either. Gradients are DTensors, also of
  several meshes in one list, and :func:`normclip.clip_grad_norm_`, :func:`normclip.clip_grads_`, :func:`normclip.grad_stats`,
  :func:`normclip.total_norm` and the others take them, all but :func:`normclip.dot` and :meth:`normclip.Moments.of`.
- Pipeline stages and experts, where each rank has other parameters: pass the groups along which they differ,
  ``clip_grad_norm_(parameters, 1.0, process_groups=[pp_mesh.get_group()])``.
- Tensors of any kind: :func:`total_norm` along a group.

**What counts.** A DTensor counts once as a whole, whatever its placements and however uneven its shards. A plain tensor counts as each rank
has it, and a process group adds up the ranks along it: pass none along which ranks have the same tensors. Partial gradients, which the
weights of norms have in sequence parallel training, are summed for the norm and scaled as they are; their elements cannot be clamped.

**All ranks do the same.** Every call that needs the norm is a collective: all ranks make it, with tensors in the same order, as with
operations on DTensors. Each merges the same rows in the same order, so that all get the same bits and take the same decision about what is
not finite. If a rank cannot take its tensors it raises its own error, and the others a ``RuntimeError`` that names it, before any has
written. Where a rank has died, or does not come within the group's timeout, the others get torch's error, and whoever gets one has left its
gradients as they were. A rank without gradients takes part by its parameters if these are DTensors, or by ``process_groups``.

**The result** is a plain 0-dim tensor with the whole norm, where torch returns a DTensor.

Cost of a call, for :math:`R` ranks, whatever the number of tensors:

===========================  =========================================================================================================
passes over the shards       one read; one read and one write more of what is scaled
collectives                  one all-gather for each mesh, and one for each process group. For a mesh of :math:`D` dimensions that does
                             not span the world, or has more than 1024 ranks: :math:`D`
bytes that a rank sends      128 in each: 13 numbers of Moments, and 3 that say what they are
bytes that it receives       :math:`128 R`: 1 KiB of 8 ranks, 128 KiB of 1024, 2 MiB of 16384; by dimensions of 128 × 128 32 KiB
merging                      1 to 2 µs a rank: 1 ms for 1024, 40 ms for 16384; by dimensions 0.2 ms
groups of tensors            one all-gather more, of 104 bytes a group
``per_tensor=True``          one all-gather more, of 104 bytes a tensor
Partial gradients            one reduction each, which torch makes
waiting                      for the device, once, as Moments are merged on the CPU
===========================  =========================================================================================================

:func:`simulate` measures the error and the time of merging.

Gloo's groups take the row from CPU memory, NCCL's from the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from normclip._arguments import Tensors, check_order
from normclip._backends import collect
from normclip._backends.ranks import WIDTH, merged_moments
from normclip._core import Moments
from normclip._results import as_tensor

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["Simulation", "simulate", "total_norm"]


def total_norm(tensors: Tensors, ord: float = 2.0, *, group: ProcessGroup | Sequence[ProcessGroup] | None = None) -> torch.Tensor:
    r"""Norm of the tensors of all ranks of a group as one vector: :func:`normclip.total_norm` across processes.

    .. math:: \|x\|_p = \Big(\sum_{r} \sum_i |x_{r,i}|^p\Big)^{1/p}

    A collective: all ranks of the group call it, also those without tensors.

    Args:
        tensors: As for :func:`normclip.total_norm`, and different ones on each rank; of DTensors the whole counts on each rank.
        ord: The order p, the same on all ranks.
        group: The process group; several, along which to add up one after the other; or None for all processes.

    Returns:
        The norm as a 0-dim tensor, with the same bits on all ranks: on the device of this rank's first tensor, float64 if any rank's tensor
        is of double precision, else float32.

    Raises:
        RuntimeError: Another rank has failed; the message names it. Or torch's error about one that is gone or late.
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
    taken = collect(tensors, process_groups=list(group) if isinstance(group, Sequence) else [group])
    return as_tensor(taken.norm(ord), taken)


@dataclass(frozen=True)
class Simulation:
    """What :func:`simulate` has measured.

    Attributes:
        ranks: The number of shards.
        elements: The number of their elements together.
        error: The relative error of the merged norm, in float64.
        error_by_dimensions: The same, if merged by rows and columns of a square mesh.
        float32_error: The same for the norm of the ranks' float32 norms, as torch computes it.
        seconds: The time in which one rank merges all rows.
        seconds_by_dimensions: The time in which it merges a row and a column.
        received: The bytes that it receives.
        received_by_dimensions: The bytes that it receives of a row and a column.
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
    """Merge the moments of the shards of side × side ranks, as each of them would, and compare with the exact norm.

    Shards are of float32 values whose scales range over twelve powers of ten, uneven, and some are empty.

    Args:
        side: The ranks along each of two dimensions of the mesh.
        elements: The largest number of elements of a shard.
        seed: Of the random numbers.

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
