"""Collectives over the ranks of a process group: each rank sends one row of 16 float64, and each gathers and merges the rows of all.

All ranks merge the same rows in rank order, so all compute the same bits. The columns of a row:

- FAILED: 0, or 1 + the number of a rank that raised an error.
- DOUBLE: 1 if the sender has float64 tensors, else 0.
- DIGEST: a digest of the sender's list of tensors, where the ranks must list the same ones; else 0.
- 13 numbers: :meth:`normclip.Moments.to_array`, or for norms of orders other than 1, 2 and inf the norm and 1 if there are elements.

Only the functions that send import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from normclip._backends.totals import joined
from normclip._core import MOMENTS, Moments, strictly

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

Array: TypeAlias = "npt.NDArray[np.float64]"
Merge: TypeAlias = Callable[[Array], Array]

FAILED, DOUBLE, DIGEST, HEAD = range(4)
WIDTH = HEAD + len(MOMENTS)
"""Numbers in a row: 128 bytes."""

DIFFERENT = -1.0
"""The digest of a merged row whose ranks sent different digests."""


def merged_moments(rows: Array) -> Array:
    """Merge rows of moments, in their order."""
    return sum((Moments.from_array(row) for row in rows.tolist() if row[0] > 0.0), Moments()).to_array()


def merged_norms(order: float) -> Merge:
    """A function that merges rows of norms."""

    def merge(rows: Array) -> Array:
        found = np.zeros(len(MOMENTS))
        norms = rows[rows[:, 1] > 0.0, 0]
        if len(norms) > 0:
            with np.errstate(all="ignore"):
                found[:2] = strictly(joined, np, norms, order), 1.0
        return found

    return merge


def merged(rows: Array, merge: Merge) -> Array:
    """Merge the rows of all ranks into one."""
    failed, digests = rows[:, FAILED], rows[:, DIGEST]
    head = [failed[np.flatnonzero(failed)[0]] if failed.any() else 0.0, rows[:, DOUBLE].max()]
    return np.array([*head, digests[0] if (digests == digests[0]).all() else DIFFERENT, *merge(rows[:, HEAD:])])


def gathered(rows: Array, group: ProcessGroup) -> Array:
    """Gather the rows of all ranks of a group, in rank order, along a new first dimension. A collective.

    Raises:
        RuntimeError: A rank has died, or has not joined within the group's timeout.
    """
    import torch
    import torch.distributed as dist

    size = dist.get_world_size(group)
    if size == 1:
        return rows[None]
    mine = torch.from_numpy(np.ascontiguousarray(rows).reshape(-1)).to(_device_of(group))
    all_ranks = mine.new_empty(size * mine.numel())
    # If this raises, both tensors may be freed: gloo has unregistered their buffers by then, after its I/O thread has released them, and
    # the failed work object keeps the tensors alive until its own thread has finished.
    dist.all_gather_into_tensor(all_ranks, mine, group=group)
    found: Array = all_ranks.cpu().numpy()
    return found.reshape(size, *rows.shape)


def _device_of(group: ProcessGroup) -> torch.device:
    """The device on which the group's collectives expect tensors: the CPU if the group has a CPU backend."""
    import torch
    import torch.distributed as dist

    kinds = [backend.split(":")[0] for backend in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def along(row: Array, groups: Sequence[ProcessGroup], merge: Merge) -> Array:
    """Merge this rank's row with those of the other ranks along each group in turn. A collective."""
    for group in groups:
        row = merged(gathered(row, group), merge)
    return row


def merged_each(table: Array, groups: Sequence[ProcessGroup]) -> Array:
    """Merge each row of a table of moments with the same row of the other ranks, along each group in turn. A collective."""
    for group in groups:
        tables = gathered(table, group)
        table = np.array([merged_moments(tables[:, index]) for index in range(len(table))]).reshape(-1, len(MOMENTS))
    return table


def check_member(group: Any) -> None:
    """Check that this process belongs to a process group.

    Raises:
        ValueError: It does not.
    """
    import torch.distributed as dist

    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of one of the process groups: pass only groups that it belongs to")
