"""All statistics of many tensors from one read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from normclip import _backends
from normclip._arguments import check_order
from normclip._backends import Batch, collect, collect_grads, sharing_errors
from normclip._core import FIGURES, Moments
from normclip._names import assign, module_of, named
from normclip.typing import Groups, NamedParameters, Order, Tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Groups", "Moments", "PerTensor", "Stats", "grad_stats", "stats"]


def _moments_of(tensors: Tensors) -> Moments:
    """The moments of a tensor or of an iterable of tensors as one vector, in one read.

    Args:
        tensors: As for :func:`normclip.total_norm`.

    Raises:
        TypeError, ValueError: As for :func:`normclip.total_norm`.
    """
    return _backends.moments(tensors)


# The class is Rust's, which knows no tensors but those in CPU memory.
Moments.of = staticmethod(_moments_of)  # type: ignore[method-assign]


@dataclass(frozen=True, eq=False)
class PerTensor:
    """The figures of :class:`Stats` for each tensor, or each module: arrays with one element for each, in the order of the tensors."""

    names: tuple[str, ...]
    count: npt.NDArray[np.float64]
    zeros: npt.NDArray[np.float64]
    nans: npt.NDArray[np.float64]
    infs: npt.NDArray[np.float64]
    l1: npt.NDArray[np.float64]
    l2: npt.NDArray[np.float64]
    linf: npt.NDArray[np.float64]
    rms: npt.NDArray[np.float64]
    mean_abs: npt.NDArray[np.float64]
    sign_cosine: npt.NDArray[np.float64]
    density: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of a list of tensors as one vector x of N elements. ``print`` it for a table.

    Attributes:
        count: N.
        zeros: Elements equal to 0.
        nans: Elements that are NaN.
        infs: Elements that are infinite.
        l1: ``Σ |xᵢ|``.
        l2: √Σ xᵢ².
        linf: ``max |xᵢ|``.
        rms: ‖x‖₂ / √N.
        mean_abs: ‖x‖₁ / N.
        sign_cosine: the cosine of sign x and x, ‖x‖₁ / (√(N − zeros) · ‖x‖₂); NaN for a zero or non-finite x.
        density: ‖x‖₁² / (N · ‖x‖₂²) (Bernstein et al. 2018); NaN for a zero or non-finite x.
        moments: The moments that these figures are derived from. They can be merged with those of other tensors.
        norms: The norms of further orders that were requested.
        groups: The moments of each group that was requested, and of the group "rest" if it has members. A group without tensors has the
            moments of no elements.
        per_tensor: The figures of each tensor, or of each module to some depth, if they were requested.
    """

    count: int
    zeros: int
    nans: int
    infs: int
    l1: float
    l2: float
    linf: float
    rms: float
    mean_abs: float
    sign_cosine: float
    density: float
    moments: Moments
    norms: Mapping[float, float] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Moments] = dataclasses.field(default_factory=dict)
    per_tensor: PerTensor | None = None

    def top(self, k: int, by: str = "l2") -> list[tuple[str, float]]:
        """The k tensors for which a figure is largest, as pairs of name and figure. NaN comes first.

        Raises:
            ValueError: ``by`` is not the name of a figure, or the statistics were computed without ``per_tensor=True``.
        """
        if self.per_tensor is None:
            raise ValueError("there are no figures of single tensors: take the statistics with per_tensor=True")
        if by not in FIGURES:
            raise ValueError(f"by is {by!r}: choose one of {', '.join(FIGURES)}")
        figures = getattr(self.per_tensor, by)
        return [(self.per_tensor.names[i], float(figures[i])) for i in largest_first(figures)[:k]]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values, ready for JSON or a logger."""
        plain: dict[str, Any] = {figure: getattr(self, figure) for figure in FIGURES}
        if self.norms:
            plain["norms"] = dict(self.norms)
        if self.groups:
            plain["groups"] = {group: _figures(moments) for group, moments in self.groups.items()}
        if self.per_tensor is not None:
            columns = [getattr(self.per_tensor, figure).tolist() for figure in FIGURES]
            rows = zip(self.per_tensor.names, *columns, strict=True)
            plain["per_tensor"] = {name: dict(zip(FIGURES, figures, strict=True)) for name, *figures in rows}
        return plain

    def __str__(self) -> str:
        rows = [("all", *_figures(self.moments).values())]
        rows += [(f"group {group}", *_figures(moments).values()) for group, moments in self.groups.items()]
        if self.per_tensor is not None:
            rows += zip(self.per_tensor.names, *(getattr(self.per_tensor, figure) for figure in FIGURES), strict=True)
        cells = [("", *FIGURES), *((name, *map(_cell, figures)) for name, *figures in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
        lines += [f"norm of order {order:g}: {norm:.6g}" for order, norm in self.norms.items()]
        return "\n".join(lines)


def largest_first(figures: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The positions of figures from the largest to the smallest, NaN first."""
    # Not by infinity in its place, as a figure may be infinite.
    return np.lexsort((-figures, ~np.isnan(figures)))


def _figures(moments: Moments) -> dict[str, Any]:
    return {figure: getattr(moments, figure) for figure in FIGURES}


def _cell(figure: float) -> str:
    # Whole numbers in full, as counts are, up to where the digits of a float end.
    whole = isinstance(figure, int) or (figure.is_integer() and abs(figure) < 2.0**53)
    return f"{figure:.0f}" if whole else f"{figure:.4g}"


def stats(
    tensors: Tensors,
    *,
    names: Sequence[str] | None = None,
    per_tensor: bool = False,
    norms: Iterable[Order] = (),
    groups: Groups | None = None,
) -> Stats:
    """Counts, norms, means and sign statistics of many tensors as one vector, from one read.

    The figures are Python numbers: for tensors on a device this waits for it, once.

    Args:
        tensors: As for :func:`normclip.total_norm`. Complex numbers count by their absolute value.
        names: A name for each tensor; by default their positions.
        per_tensor: Also compute the figures of each tensor.
        norms: Orders of further norms of all tensors together. Each takes one more read.
        groups: Also compute the moments of groups of tensors: a function from a tensor's name to its group, or a mapping from groups to
            lists of names, which may contain the wildcards ``*`` and ``?``. A tensor belongs to the first group that names it, or to the
            group "rest" if none does. The result has all groups of a mapping, in its order, and then "rest"; for a function, the groups
            that it returns.

    Returns:
        The figures, exact as :func:`normclip.total_norm` is.

    Raises:
        TypeError: As for :func:`normclip.total_norm`, or ``groups`` is neither kind, or has a string in place of a list of names.
        ValueError: There are not as many names as tensors, a name in a group matches no tensor, or an order is NaN.

    Example:
        >>> import numpy as np
        >>> figures = stats([np.array([3.0, 0.0]), np.array([-4.0])], names=["a", "b"], per_tensor=True)
        >>> figures.l2, figures.zeros, figures.top(1)
        (5.0, 1, [('b', 4.0)])
        >>> print(figures)
             count  zeros  nans  infs  l1  l2  linf    rms  mean_abs  sign_cosine  density
        all      3      1     0     0   7   5     4  2.887     2.333       0.9899   0.6533
        a        2      1     0     0   3   3     3  2.121       1.5            1      0.5
        b        1      0     0     0   4   4     4      4         4            1        1
    """
    orders = [check_order("norms", order) for order in norms]
    batch = collect(tensors)
    with sharing_errors(batch):
        if names is not None and len(names) != len(batch):
            raise ValueError(f"{len(names)} names for {len(batch)} tensors: pass one for each")
        if names is None and (per_tensor or groups is not None):
            names = list(map(str, range(len(batch))))
        members = assign(groups, names or ())
    return measure(batch, tuple(names or ()), per_tensor=per_tensor, orders=orders, groups=members)[0]


def grad_stats(
    parameters: NamedParameters,
    *,
    per_tensor: bool = False,
    norms: Iterable[Order] = (),
    groups: Groups | None = None,
    process_groups: Sequence[ProcessGroup] | None = None,
    depth: int | None = None,
) -> Stats:
    """The statistics of the gradients of a model, from one read.

    Args:
        parameters: A module, parameters, or pairs of name and parameter. Those without a gradient are passed over. Without names,
            parameters are named by their position.
        per_tensor: As for :func:`stats`.
        norms: As for :func:`stats`.
        groups: As for :func:`stats`. The names are those of all parameters, also of those without a gradient in this step, such as frozen
            layers or experts that were not used. So all steps have the same groups; a group without gradients has the moments of no
            elements.
        process_groups: As for :func:`normclip.clip_grad_norm_`. The figures are those of all ranks, but figures of single tensors are those
            of this rank. Cannot be combined with ``groups``.
        depth: With ``per_tensor``: in place of the figures of each parameter, give those of each module to this depth, as exact as if its
            parameters were one tensor. Modules that are attributes of the model have depth 1. An index is part of the name before it:
            with ``depth=2``, GPT-2 has a row for each block, ``transformer.h.0`` and so on. Parameters that the model itself has as
            attributes have rows of their own.

    Returns:
        The figures, as :func:`stats` gives them.

    Raises:
        TypeError: As for :func:`stats`.
        ValueError: As for :func:`stats`, or ``depth`` is not positive or is given without ``per_tensor``.
        RuntimeError: As for :func:`normclip.clip_grad_norm_`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([3.0, 4.0])).sum().backward()
        >>> grad_stats(model, groups={"matrices": ["*weight"]}).groups["matrices"].l2
        5.0
    """
    orders = [check_order("norms", order) for order in norms]
    check_groups(groups, process_groups)
    check_depth(depth, per_tensor=per_tensor)
    pairs = named(parameters)
    batch, names = collect_named(pairs, writable=False, process_groups=process_groups)
    with sharing_errors(batch):
        members = assign(groups, [name for name, _ in pairs])
    return measure(batch, names, per_tensor=per_tensor, orders=orders, groups=members, depth=depth)[0]


def check_groups(groups: Groups | None, process_groups: Sequence[ProcessGroup] | None) -> None:
    """Check that groups of tensors and process groups are not combined, as the ranks of a process group have different tensors.

    Raises:
        ValueError: Both were passed.
    """
    if groups is not None and process_groups:
        raise ValueError("groups of tensors cannot be combined with process groups, whose ranks have different tensors: pass one of them")


def check_depth(depth: int | None, *, per_tensor: bool) -> None:
    """Check the depth of the modules whose figures are wanted.

    Raises:
        ValueError: It is not positive, or figures of parts are not wanted.
    """
    if depth is not None and (depth < 1 or not per_tensor):
        raise ValueError(f"depth is {depth}: pass 1 or more" if depth < 1 else "depth chooses the rows of per_tensor: pass per_tensor=True")


def collect_named(
    parameters: NamedParameters,
    *,
    writable: bool,
    process_groups: Sequence[ProcessGroup] | None = None,
) -> tuple[Batch, tuple[str, ...]]:
    """The batch of the gradients of a module, of parameters or of named parameters, with the names of those that have a gradient."""
    pairs = named(parameters)
    batch = collect_grads([parameter for _, parameter in pairs], writable=writable, process_groups=process_groups)
    return batch, tuple(pairs[position][0] for position in batch.positions)


def measure(
    batch: Batch,
    names: tuple[str, ...],
    *,
    per_tensor: bool,
    orders: Sequence[float],
    groups: Mapping[str, Sequence[int]] | None,
    depth: int | None = None,
    finite_only: bool = False,
    table: bool = False,
) -> tuple[Stats, npt.NDArray[np.float64], list[str]]:
    """Compute the statistics of a batch.

    Args:
        batch: The tensors.
        names: The name of each tensor of the batch.
        per_tensor: Whether the statistics include the figures of each tensor.
        orders: Orders of further norms.
        groups: The groups of :func:`assign`: positions in the list that was passed, some of which may have no tensor in the batch.
        depth: Give the figures of modules to this depth in place of those of each tensor.
        finite_only: Count NaN and infinite elements, but treat them as 0 in all other figures.
        table: Whether the table is needed.

    Returns:
        The statistics; a table of figures with a row for each tensor and a column for each of ``FIGURES``, or without rows; the group of
        each tensor.
    """
    table |= per_tensor
    group_at = {position: group for group, positions in (groups or {}).items() for position in positions}
    member_of = [] if groups is None else [group_at[position] for position in batch.positions]
    merged = dict.fromkeys(groups or (), Moments())
    tensors: list[Moments] = []
    each = getattr(batch, "each", None)
    if per_tensor and depth is not None and each is None:
        moments, tensors, raw = batch.statistics(list(range(len(batch))), finite_only=finite_only, table=table)
        if groups is not None:
            _merge(merged, member_of, tensors)
    elif groups is not None:
        numbers = {group: number for number, group in enumerate(groups)}
        moments, grouped, raw = batch.statistics([numbers[group] for group in member_of], finite_only=finite_only, table=table)
        merged.update(zip(groups, grouped, strict=False))  # without the groups after the last one that has tensors
    else:
        moments, _, raw = batch.statistics(finite_only=finite_only, table=table)
    rows = whole = np.frombuffer(raw).reshape(-1, len(FIGURES))
    if per_tensor and each is not None:
        # The table describes this rank's shards, `each` the whole tensors.
        tensors, firsts = each()
        whole = _rows(tensors[first] for first in firsts)
    if per_tensor and depth is not None:
        owners = [module_of(name, depth) for name in names]
        modules = dict.fromkeys(owners, Moments())
        _merge(modules, owners, tensors)
        names, whole = tuple(modules), _rows(modules.values())
    found = Stats(
        **_figures(moments),
        moments=moments,
        norms={order: float(batch.norm(order)) for order in orders},
        groups=merged,
        per_tensor=PerTensor(names, *whole.T) if per_tensor else None,
    )
    return found, rows, member_of


def _merge(merged: dict[str, Moments], member_of: Sequence[str], tensors: Sequence[Moments]) -> None:
    """Add the moments of each tensor to those of its group, in the order in which batches do, so that the bits are the same."""
    for group, moments in zip(member_of, tensors, strict=True):
        merged[group] += moments


def _rows(each: Iterable[Moments]) -> npt.NDArray[np.float64]:
    return np.array([list(_figures(moments).values()) for moments in each], np.float64).reshape(-1, len(FIGURES))
