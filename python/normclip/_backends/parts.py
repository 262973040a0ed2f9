"""The tensors of one device, of a list that is not, or not all, in CPU memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from normclip._backends.protocol import Norm

Array = npt.NDArray[np.float64]


def moved(numbers: torch.Tensor, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The numbers on a device, without waiting for them, but on the CPU, which would read them before they are there."""
    return numbers.detach().to(device, dtype, non_blocking=device.type != "cpu")


class Part(Protocol):
    """The tensors of one device. Norms and factors that are tensors may be on another."""

    device: torch.device

    def norm(self, order: float, dtype: torch.dtype) -> Norm: ...
    def moments(self, *, finite_only: bool) -> Array:
        """A row for each tensor, of the numbers that :meth:`normclip.Moments.to_array` gives."""

    def clip_(self, limit: float, norm: torch.Tensor, epsilon: float) -> None: ...
    def scale_(self, factor: float | torch.Tensor) -> None:
        """Where the factor is a tensor and 1, nothing is written."""

    def scale_each_(self, factors: Array) -> None: ...
    def clamp_(self, limit: float) -> None: ...
    def zero_nonfinite_(self) -> None: ...
    def dot(self, other: Part) -> torch.Tensor:
        """Σxy, √Σx², √Σy² and the cosine, in step with the tensors of another part on the same device."""
