"""The interfaces that all backends implement: batches of tensors and optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from normclip._core import Moments

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Served:
    """Which backend serves which kinds of devices, by DLPack's device type numbers. Plain torch operations serve all other kinds."""

    rust: tuple[int, ...] = (1, 3)
    """kDLCPU, kDLCUDAHost: memory that the CPU can read."""
    triton: tuple[int, ...] = (2, 10, 13)
    """kDLCUDA, kDLROCM, kDLCUDAManaged."""
    tuning: Any = None
    """A :class:`~normclip._backends.cuda.Tuning` for the Triton kernels; None for the default sizes."""


USUAL = Served()


@dataclass(frozen=True)
class Norm:
    """A norm on a device. ``float(norm)`` waits for the device."""

    exact: torch.Tensor
    """0-dim, in float64 where the device has it: to compute coefficients from."""
    rounded: torch.Tensor
    """0-dim, in the dtype that users get."""
    settle: Callable[[], None] | None = None
    """Of a norm of several ranks, which is −inf if one of them has failed: waits for it, and raises the error of another rank."""

    def __float__(self) -> float:
        if self.settle is not None:
            self.settle()
        return float(self.exact)


AnyNorm: TypeAlias = "float | Norm"
"""A norm as backends return it: a float for CPU memory, else numbers that stay on the device."""


class Batch(Protocol):
    """A checked list of tensors, which can be measured and changed in place. :class:`~normclip._core.TensorList` is one.

    Methods that change tensors return the torch tensors that may have been written, for the caller to pass to ``mark_written``. A method
    waits for a device only if it returns Python numbers (``statistics``, ``nonfinite``), or changes CPU tensors by a norm on a device.
    """

    @property
    def is_torch(self) -> bool: ...
    @property
    def is_double(self) -> bool: ...
    @property
    def positions(self) -> list[int]: ...
    @property
    def is_empty(self) -> bool:
        """Whether there are no elements: of tensors that ranks share, on any rank, which is known when they are measured."""

    def __len__(self) -> int: ...

    def norm(self, order: float) -> AnyNorm: ...
    def statistics(self, groups: list[int] = ..., *, finite_only: bool = False, table: bool = True) -> tuple[Moments, list[Moments], bytes]:
        """The moments of all tensors and of each group, and a table of figures with a row for each tensor, which may be left out."""

    def nonfinite(self) -> list[tuple[str, int, int]]: ...
    def clip_(self, limit: float, norm: Any, epsilon: float) -> list[Any]: ...
    def scale_(self, factor: float | torch.Tensor) -> list[Any]: ...
    def scale_each_(self, factors: list[float | None]) -> list[Any]: ...
    def clamp_(self, limit: float) -> list[Any]: ...
    def zero_nonfinite_(self, indices: list[int]) -> list[Any]: ...
    def check_elementwise(self) -> None: ...
    def check_unchanged(self) -> None:
        """Raise if a tensor's memory was replaced since the batch was made. Call it before writing if user code has run since then."""


Member: TypeAlias = "tuple[int, int, torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor | int]"
"""A parameter in an optimizer step: the number of its group, its position there, the parameter, its gradient, the tensors that the
optimizer keeps for it, and how many steps it has taken: a number, or the tensor that counts them. New tensors hold zeros."""


class SGDSettings(NamedTuple):
    """The settings of one parameter group for a step of gradient descent."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool

    @property
    def states(self) -> int:
        """How many tensors are kept for a parameter."""
        return int(self.momentum != 0.0)


class AdamWSettings(NamedTuple):
    """The settings of one parameter group for a step of AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool

    @property
    def states(self) -> int:
        """How many tensors are kept for a parameter, besides the number of its steps."""
        return 3 if self.amsgrad else 2


Settings: TypeAlias = "SGDSettings | AdamWSettings"


class Step(Protocol):
    """An optimizer step whose tensors have been checked. :class:`~normclip._core.Step` is one."""

    @property
    def is_empty(self) -> bool:
        """Whether there are no parameters with a gradient."""

    @property
    def fresh(self) -> list[tuple[torch.Tensor, str, torch.Tensor]]:
        """The tensors that the optimizer is to keep once the step is taken: the parameter, the name, and the tensor."""

    def norm(self) -> AnyNorm:
        """The L2 norm of all gradients."""

    def check_unchanged(self) -> None:
        """As for :class:`Batch`."""

    def step_(self, coefficient: Any, settings: list[Any]) -> list[Any]:
        """Update the parameters, with gradients multiplied by the coefficient and the settings of each group.

        Returns the tensors to pass to ``mark_written``.
        """

    def step_within(
        self, coefficient: Any, settings: list[Any], descent_limit: float | None, update_rms_limit: float | None, scale: Any
    ) -> tuple[list[Any], float | torch.Tensor, list[float] | torch.Tensor]:
        """As ``step_``, with learning rates reduced to keep limits on ⟨u, g⟩ and RMS(u), for the direction u of the step.

        g is the gradient of what is minimized, which is ``scale`` times as much in memory, and u is of the gradient times the coefficient.

        Returns the tensors to pass to ``mark_written``, ⟨u, g⟩ with only RMS(u) limited, and RMS(u) of each parameter. Numbers of a device
        stay there.
        """


class PacedStep(Step, Protocol):
    """A step of tensors that this process holds, of which a caller may compute the pace of each parameter."""

    def measure(self, coefficient: Any, settings: list[Any]) -> Sequence[tuple[float, float, float]]:
        """For each parameter, Σu·g in memory and Σu² of the direction u in which it would go, and the number of its elements."""

    def step_(self, coefficient: Any, settings: list[Any], paces: list[float] | None = None) -> list[Any]:
        """As for any step, with the learning rate of each parameter multiplied by its pace."""
