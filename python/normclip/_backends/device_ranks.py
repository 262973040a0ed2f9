"""Rows of ranks that stay on a CUDA device: gathered there by the backend of a group, and merged by one small kernel. Nothing waits for it.

They are the rows of :mod:`normclip._backends.ranks`, and merge to the same bits. So each rank chooses by itself whether its host or its
device merges them. Where the device does, the host does not know yet whether another rank has failed: the norm is then −inf, by which
nothing is changed, and the kernel writes the number of that rank where later calls look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normclip._backends.launch import launch, on_device
from normclip._backends.protocol import Norm
from normclip._backends.ranks import DIGEST, DOUBLE, WIDTH, Line, exchanged, failure_flag
from normclip._backends.triton import measure
from normclip._backends.triton import ranks as kernels

_WHAT = {1.0: measure.ABSOLUTES.value, 2.0: measure.SQUARES.value, math.inf: measure.LARGEST.value}


class Merged(NamedTuple):
    """What the kernel makes of the rows of ranks: their row, and its norm."""

    row: Tensor
    norm: Norm


def norm(rows: Sequence[Tensor | None], meshes: Sequence[Sequence[Line]], order: float, device: torch.device, *, double: bool) -> Merged:
    """Merge this rank's rows with those of the other ranks of each mesh. A collective.

    Args:
        rows: This rank's row of plain tensors, and one for each mesh; None where it has no elements.
        meshes: For each mesh, what to gather along.
        order: The order of the norm: 1, 2 or inf.
        device: Where all of this is.
        double: Whether there are tensors of double precision.
    """
    plain, *shards = rows
    with on_device(device):
        parts = [] if plain is None else [plain]
        found, head = None, None
        for lines, shard in zip(meshes, shards, strict=True):
            row = _blank(device, double=double) if shard is None else shard
            if head is not None:
                row[:DIGEST] = head  # errors of this mesh's ranks, for those of the next
            for line in lines:
                found = merge(_gathered(row, line), order, double=double)
                row = found.row
            parts.append(row)
            head = row[:DIGEST]
        return found if len(parts) == 1 and found is not None else merge(torch.stack(parts), order, double=double)


def _blank(device: torch.device, *, double: bool) -> Tensor:
    """The row of no elements."""
    row = torch.zeros(WIDTH, dtype=torch.float64, device=device)
    row[DOUBLE] = float(double)
    return row


def merge(rows: Tensor, order: float, *, double: bool) -> Merged:
    """Merge rows in their order, in one launch."""
    device = rows.device
    row, exact = rows.new_empty(WIDTH), rows.new_empty(())
    rounded = exact.new_empty((), dtype=torch.float64 if double else torch.float32)
    arguments = (rows, len(rows), row, exact, rounded, failure_flag(device))
    launch(kernels.merge, (1, 1, 1), arguments, (_WHAT[order],), (device, rounded.dtype), num_warps=1, enable_fp_fusion=False)
    return Merged(row, Norm(exact, rounded))


def _gathered(row: Tensor, line: Line) -> Tensor:
    return row[None] if dist.get_world_size(line.group) == 1 else exchanged(row, line.group).view(-1, WIDTH)
