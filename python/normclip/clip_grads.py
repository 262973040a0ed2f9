"""Clipping that also returns statistics of the gradients, from the same read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from normclip._arguments import check_order
from normclip._backends import sharing_errors
from normclip._core import FIGURES, NORMS
from normclip._names import assign, named
from normclip._results import mark_written
from normclip.rules import Hard, Rule, as_rule
from normclip.statistics import Stats, check_depth, check_groups, collect_named, measure
from normclip.typing import Groups, NamedParameters, Order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from normclip._core import Moments

__all__ = ["Clipped", "Nonfinite", "clip_grads_"]

Nonfinite: TypeAlias = Literal["propagate", "raise", "skip", "zero"]


@dataclass(frozen=True, eq=False)
class Clipped:
    """The result of :func:`clip_grads_`.

    Attributes:
        norm: The norm of all gradients before clipping.
        coefficient: What all gradients were multiplied by; 1 with ``limits``, for which see ``coefficients``.
        coefficients: What the gradients of each group were multiplied by; 1 for groups without a limit or without gradients.
        stats: The statistics of the gradients before clipping. If non-finite elements were replaced by 0, the statistics are taken with
            these zeros, but ``nans`` and ``infs`` count the elements that were replaced.
        found_inf: Whether there were NaN or infinite elements.
        skipped: Whether the gradients were left unchanged because of such elements. The caller should skip the optimizer step then.
    """

    norm: float
    coefficient: float
    coefficients: Mapping[str, float]
    stats: Stats
    found_inf: bool
    skipped: bool


def clip_grads_(
    parameters: NamedParameters,
    rule: Rule | float | None = None,
    *,
    limits: Mapping[str, Rule | float] | None = None,
    groups: Groups | None = None,
    norm_type: Order = 2.0,
    nonfinite: Nonfinite = "propagate",
    per_tensor: bool = False,
    process_groups: Sequence[ProcessGroup] | None = None,
    depth: int | None = None,
) -> Clipped:
    """Clip gradients, together or by groups, and return their statistics from the same read.

        g ← g · min(1, γ / ‖g‖ₚ)

    where g is all gradients together, or those of each group with a limit γ. There is no epsilon as in torch's formula. With another rule
    of :mod:`normclip.rules`, g is multiplied by the rule's coefficient.

    Args:
        parameters: A module, parameters, or pairs of name and parameter, as for :func:`normclip.grad_stats`.
        rule: The limit γ ≥ 0 of all gradients together, or one of :mod:`normclip.rules`.
        limits: Instead of ``rule``: a limit or rule for some groups, each of which is clipped by its own norm. Other groups are left
            unchanged. The rule of a group without gradients is not asked, so a threshold that follows training records no norm for it.
        groups: As for :func:`normclip.grad_stats`.
        norm_type: The order p: 1, 2 or ``inf``.
        nonfinite: What to do about NaN and infinite elements. ``"propagate"``: as torch, a norm of NaN makes all gradients NaN and an
            infinite one makes them 0. ``"raise"``: change nothing and raise. ``"skip"``: change nothing and say so in the result.
            ``"zero"``: replace them by 0 before the norm is taken, which writes to the affected tensors only.
        per_tensor: Also give the figures of each tensor.
        process_groups: As for :func:`normclip.grad_stats`. All ranks of the groups use the same coefficient, and treat non-finite elements
            on any of them alike.
        depth: As for :func:`normclip.grad_stats`.

    Returns:
        The norm, the coefficients, the statistics, and whether there were non-finite elements.

    Raises:
        RuntimeError: There are non-finite elements and ``nonfinite`` is ``"raise"``; the message names every tensor that has some. Nothing
            has changed. Or as for :func:`normclip.clip_grad_norm_`.
        TypeError: As for :func:`normclip.clip_grad_norm_` and for ``groups`` of :func:`normclip.stats`, or a gradient is complex and
            ``nonfinite`` is ``"zero"``.
        ValueError: A limit is negative or NaN or belongs to no group, none or both of ``rule`` and ``limits`` are given, ``depth`` is not
            positive or is given without ``per_tensor``, or a gradient cannot be written. Nothing has changed.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([3.0, 4.0])).sum().backward()
        >>> clipped = clip_grads_(model, limits={"weights": 1.0}, groups={"weights": ["weight"]})
        >>> clipped.coefficients
        {'weights': 0.2, 'rest': 1.0}
        >>> clipped.stats.count, model.weight.grad
        (3, tensor([[0.6000, 0.8000]]))
    """
    if (rule is None) == (limits is None):
        raise ValueError("pass either rule, for all gradients together, or limits, for groups of them")
    norm_type = check_order("norm_type", norm_type)
    if norm_type not in NORMS:
        raise ValueError(f"norm_type is {norm_type}: choose 1, 2 or inf")
    if nonfinite not in ("propagate", "raise", "skip", "zero"):
        raise ValueError(f"nonfinite is {nonfinite!r}: choose 'propagate', 'raise', 'skip' or 'zero'")
    rules = {group: as_rule(f"limits[{group!r}]", limit) for group, limit in (limits or {}).items()}
    rule = None if rule is None else as_rule("rule", rule)

    check_groups(groups, process_groups)
    check_depth(depth, per_tensor=per_tensor)
    pairs = named(parameters)
    batch, names = collect_named(pairs, writable=True, process_groups=process_groups)
    with sharing_errors(batch):
        if nonfinite == "zero":
            batch.check_elementwise()
        members = assign(groups, [name for name, _ in pairs])
        unknown = [group for group in rules if group not in (members or ())]
        if unknown:
            raise ValueError(f"limits names the groups {unknown}, and there are {list(members or ()) or 'none: pass groups'}")
    stats, table, member_of = measure(
        batch,
        names,
        per_tensor=per_tensor,
        orders=(),
        groups=members,
        depth=depth,
        finite_only=nonfinite == "zero",
        table=True,
    )

    nans, infs = (table[:, FIGURES.index(figure)] for figure in ("nans", "infs"))
    affected = np.flatnonzero(nans + infs)
    found_inf = stats.nans + stats.infs > 0  # on any rank
    if found_inf and nonfinite == "raise":
        described = ", ".join(f"{names[i]} ({nans[i]:.0f} NaN, {infs[i]:.0f} inf)" for i in affected)
        described = described or f"on other ranks ({stats.nans} NaN, {stats.infs} inf)"
        raise RuntimeError(f"gradients are not finite, and nothing was clipped: {described}. Choose nonfinite='skip' or 'zero' to go on")
    skipped = found_inf and nonfinite == "skip"

    with ExitStack() as applied:  # a rule that follows training records its norm when the stack closes, after all has been written

        def coefficient_of(moments: Moments, rule: Rule | None) -> float:
            if rule is None or skipped or moments.count == 0:
                return 1.0
            norm: float = getattr(moments, NORMS[norm_type])
            return applied.enter_context(rule.applying(norm))

        coefficient = coefficient_of(stats.moments, rule)
        coefficients = {group: coefficient_of(moments, rules.get(group)) for group, moments in stats.groups.items()}
        if not all(isinstance(each, Hard) for each in (rule, *rules.values()) if each is not None):
            batch.check_unchanged()  # the code of a user's rule has run since the gradients were checked
        if found_inf and nonfinite == "zero":
            mark_written(batch.zero_nonfinite_(affected.tolist()))
        if coefficient != 1.0:
            mark_written(batch.scale_(coefficient))
        elif any(coefficient != 1.0 for coefficient in coefficients.values()):
            mark_written(batch.scale_each_([None if coefficients[group] == 1.0 else coefficients[group] for group in member_of]))
    return Clipped(
        norm=getattr(stats, NORMS[norm_type]),
        coefficient=coefficient,
        coefficients=coefficients,
        stats=stats,
        found_inf=found_inf,
        skipped=skipped,
    )
