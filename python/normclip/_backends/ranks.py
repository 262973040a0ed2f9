"""What the ranks of a group send each other: one row of 16 float64 each, gathered by all and merged by all in the order of the ranks.

So every rank computes the same bits from the same rows. A row is what the sender could not do (0, or 1 + the rank that failed), whether it
has float64 tensors, a digest of what its further rows describe, and 13 numbers: those of :meth:`normclip.Moments.to_array`, or for other
orders than 1, 2 and inf the norm and whether there are elements. Torch is imported by what sends, not by what merges.
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
"""The digest of ranks whose digests differ."""


def merged_moments(rows: Array) -> Array:
    """Rows of moments, merged in order."""
    return sum((Moments.from_array(row) for row in rows.tolist() if row[0] > 0.0), Moments()).to_array()


def merged_norms(order: float) -> Merge:
    """Merges the norms of parts into that of the whole."""

    def merge(rows: Array) -> Array:
        found = np.zeros(len(MOMENTS))
        norms = rows[rows[:, 1] > 0.0, 0]
        if len(norms) > 0:
            with np.errstate(all="ignore"):
                found[:2] = strictly(joined, np, norms, order), 1.0
        return found

    return merge


def merged(rows: Array, merge: Merge) -> Array:
    """The rows of all ranks as one."""
    failed, digests = rows[:, FAILED], rows[:, DIGEST]
    head = [failed[np.flatnonzero(failed)[0]] if failed.any() else 0.0, rows[:, DOUBLE].max()]
    return np.array([*head, digests[0] if (digests == digests[0]).all() else DIFFERENT, *merge(rows[:, HEAD:])])


def gathered(rows: Array, group: ProcessGroup) -> Array:
    """The rows of all ranks of a group, in their order: an array of one more dimension.

    Raises:
        RuntimeError: A rank is gone, or has not come within the group's timeout.
    """
    import torch
    import torch.distributed as dist

    size = dist.get_world_size(group)
    if size == 1:
        return rows[None]
    mine = torch.from_numpy(np.ascontiguousarray(rows).reshape(-1)).to(_device_of(group))
    all_ranks = mine.new_empty(size * mine.numel())
    # If this raises, both tensors may go: gloo has withdrawn its buffers by then, which waits for its I/O thread to let go of them, and the
    # work that failed holds the tensors until its own thread is done with it.
    dist.all_gather_into_tensor(all_ranks, mine, group=group)
    found: Array = all_ranks.cpu().numpy()
    return found.reshape(size, *rows.shape)


def _device_of(group: ProcessGroup) -> torch.device:
    """Where the group's collectives take tensors: the CPU, if they do there."""
    import torch
    import torch.distributed as dist

    kinds = [backend.split(":")[0] for backend in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def along(row: Array, groups: Sequence[ProcessGroup], merge: Merge) -> Array:
    """A row of this rank, merged with those of all ranks along each group in turn."""
    for group in groups:
        row = merged(gathered(row, group), merge)
    return row


def merged_each(table: Array, groups: Sequence[ProcessGroup]) -> Array:
    """A table of moments, each row merged with that of all ranks along each group in turn."""
    for group in groups:
        tables = gathered(table, group)
        table = np.array([merged_moments(tables[:, index]) for index in range(len(table))]).reshape(-1, len(MOMENTS))
    return table


def check_member(group: Any) -> None:
    """Refuse a group that this process is no rank of.

    Raises:
        ValueError: It is not.
    """
    import torch.distributed as dist

    if dist.get_rank(group) < 0:
        raise ValueError("this process is no member of a process group that it was given: pass the groups that it belongs to")
