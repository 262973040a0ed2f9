"""The names of parameters, and the groups and modules that tensors belong to by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from normclip._core import listed
from normclip.typing import Groups, NamedParameters

REST = "rest"
"""The name of the group of tensors that belong to no other group."""


def named(parameters: NamedParameters) -> list[tuple[str, Any]]:
    """The parameters of a module, or parameters with or without names, as pairs of name and parameter. A missing name is the position."""
    given = list(parameters.named_parameters()) if hasattr(parameters, "named_parameters") else listed(parameters, grads=True)
    return [item if isinstance(item, tuple) else (str(position), item) for position, item in enumerate(given)]


def module_of(name: str, depth: int) -> str:
    """The name of the module at this depth that has the parameter of this name, or of the deepest; the parameter's for one of the model."""
    levels = re.findall(r"\d+(?=\.|$)|[^.]+(?:\.\d+(?=\.|$))?", name.rpartition(".")[0])  # an index is part of the level before it
    return ".".join(levels[:depth]) or name


def assign(groups: Groups | None, names: Sequence[str]) -> dict[str, list[int]] | None:
    """The positions of the names that belong to each group. A group of a mapping may be empty; "rest" is present only if it is not.

    Raises:
        TypeError: ``groups`` is neither a mapping from groups to lists nor a function.
        ValueError: A name in a group matches none of the names.
    """
    if groups is None:
        return None
    members: dict[str, list[int]] = {}
    if callable(groups):
        for position, name in enumerate(names):
            members.setdefault(groups(name), []).append(position)
        return members
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups is a {type(groups).__name__}: pass a mapping from groups to lists of names, or a function of a name")
    for group, patterns in groups.items():
        if isinstance(patterns, str):
            raise TypeError(f"groups[{group!r}] is the string {patterns!r}: pass a list of names, [{patterns!r}]")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
                raise ValueError(f"group {group!r} names {pattern!r}, which matches no tensor: the names are {some or 'none'}")
        members[group] = []
    for position, name in enumerate(names):
        found = (group for group, patterns in groups.items() if any(fnmatchcase(name, pattern) for pattern in patterns))
        members.setdefault(next(found, REST), []).append(position)
    return members
