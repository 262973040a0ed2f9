"""What all backends have in common: lists of tensors that measure and change themselves, and optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from normclip._core import Moments

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Served:
    """The kinds of devices that backends serve, by DLPack's numbers. Plain torch operations serve all others."""

    rust: tuple[int, ...] = (1, 3)
    """Memory that the CPU reads."""
    triton: tuple[int, ...] = (2, 10, 13)
    """CUDA, ROCm, memory that either manages."""
    tuning: Any = None
    """The sizes that Triton's kernels are compiled for, other than the usual ones."""


USUAL = Served()


@dataclass(frozen=True)
class Norm:
    """A norm on a device: in float64 to compute with, and in the type that users get. ``float(norm)`` waits for it."""

    exact: torch.Tensor
    rounded: torch.Tensor

    def __float__(self) -> float:
        return float(self.exact)


AnyNorm: TypeAlias = "float | Norm"
"""A norm as a backend has it: a float, or on a device, where it stays."""


class Batch(Protocol):
    """Tensors whose memory was found and checked once, to be measured and changed. :class:`~normclip._core.TensorList` is one.

    What changes tensors returns the torch tensors that may have been written. Nothing here waits for a device but ``statistics`` and
    ``nonfinite``, whose answers are Python's, and what changes CPU tensors by a norm that a device computes.
    """

    @property
    def is_torch(self) -> bool: ...
    @property
    def is_double(self) -> bool: ...
    @property
    def positions(self) -> list[int]: ...
    def __len__(self) -> int: ...

    def norm(self, order: float) -> AnyNorm: ...
    def statistics(self, groups: list[int] = ..., *, finite_only: bool = False) -> tuple[Moments, list[Moments], bytes]: ...
    def nonfinite(self) -> list[tuple[str, int, int]]: ...
    def clip_(self, limit: float, norm: Any, epsilon: float) -> list[Any]: ...
    def scale_(self, factor: float | torch.Tensor) -> list[Any]: ...
    def scale_each_(self, factors: list[float | None]) -> list[Any]: ...
    def clamp_(self, limit: float) -> list[Any]: ...
    def zero_nonfinite_(self, indices: list[int]) -> list[Any]: ...
    def check_elementwise(self) -> None: ...
    def check_unchanged(self) -> None:
        """Refuse tensors that have got other memory since they were checked. Asked where code of others has run, before writing."""


Member: TypeAlias = "tuple[int, int, torch.Tensor, torch.Tensor, list[torch.Tensor], bool]"
"""A parameter of an optimizer: its group and its place there, the tensor, its gradient, the tensors that the optimizer keeps for it (its
states: for SGD the momentum buffer, or none), and whether these are new and hold zeros."""


class Settings(NamedTuple):
    """What a step of gradient descent takes from a group of parameters."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class Step(Protocol):
    """A step of an optimizer, whose tensors were found and checked once. :class:`~normclip._core.Step` is one."""

    def norm(self) -> AnyNorm:
        """The L2 norm of all gradients."""

    def step_(self, coefficient: Any, settings: list[Settings]) -> list[Any]:
        """Take it, with the gradients times the coefficient and the settings of each group. Returns the tensors to be marked as written."""
