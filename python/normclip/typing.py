"""The types of arguments, for annotations of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = ["Groups", "NamedParameters", "Order", "Parameters", "Scalar", "SupportsDLPack", "Tensors"]


class SupportsDLPack(Protocol):
    """An array or tensor that shares its memory by the DLPack protocol."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


Tensors: TypeAlias = "SupportsDLPack | Iterable[SupportsDLPack]"
"""A tensor of any library, or several."""

Parameters: TypeAlias = "torch.Tensor | Iterable[torch.Tensor]"
"""A torch tensor, or several."""

NamedParameters: TypeAlias = "torch.nn.Module | Parameters | Iterable[tuple[str, torch.nn.Parameter]]"
"""A module, parameters, or pairs of name and parameter."""

Groups: TypeAlias = "Mapping[str, Sequence[str]] | Callable[[str], str]"
"""Names of groups with the names of their parameters, or the group of each name."""

Order: TypeAlias = "float | Literal['inf']"
"""The order of a norm."""

Scalar = TypeVar("Scalar", float, "np.floating[Any]", "npt.NDArray[np.floating[Any]]", "torch.Tensor")
"""A float, a NumPy scalar or a torch tensor, which may be on a device and stays there; or an array or a tensor of several."""
