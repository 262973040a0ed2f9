"""The part of devices for which normclip has no kernels (MPS, XPU, CUDA without Triton), and of abstract tensors, by torch operations.

Abstract tensors have no memory of their own, but torch can compute with them: meta tensors, fake tensors, and subclasses that keep their
elements elsewhere. Norms of meta and fake tensors are meta and fake too, so that dry runs of training work.

Sums are computed in float64, or in float32 on devices without float64, which then limits the precision. Powers are taken relative
to the largest element, so that none overflows. A NaN makes norms NaN; without elements they are 0. Each tensor is read several times, and
scaling always writes: this backend makes every call work, and is not fast.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from normclip._backends.parts import Part, moved
from normclip._backends.protocol import Norm
from normclip._backends.totals import COLUMN, HUGE, SHRINK, hard_coefficient
from normclip._core import MOMENTS, SCALES

_UP = SCALES["up"]


class TorchPart:
    """Tensors of one device, measured and changed by torch operations."""

    def __init__(self, tensors: list[torch.Tensor], *, writable: bool, abstract: bool = False) -> None:
        self.device, self.abstract = tensors[0].device, abstract
        self._wide = torch.float32 if self.device.type == "mps" else torch.float64
        self._tensors = [_dense(tensor.detach(), writable=writable) for tensor in tensors]
        # The same memory listed twice counts once.
        firsts: dict[tuple[object, ...], int] = {}
        for index, tensor in enumerate(self._tensors):
            if abstract:
                memory: tuple[object, ...] = (id(tensors[index]),)
            elif tensor.numel() > 0:
                memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            else:
                memory = (index,)
            firsts.setdefault(memory, index)
        self._firsts = list(firsts.values())

    # ---- Measuring ----

    def norm(self, order: float, dtype: torch.dtype) -> Norm:
        each = [self._widened(tensor) for tensor in self._used() if tensor.numel() > 0]
        if not each:
            exact = torch.zeros((), dtype=self._wide, device=self.device)
        elif order == 0.0:
            counts = torch.stack([torch.count_nonzero(x) for x in each]).sum().to(self._wide)
            exact = counts.masked_fill(torch.stack([torch.isnan(x).any() for x in each]).any(), math.nan)
        else:
            sizes = [x.abs() for x in each]
            scale = torch.stack([x.max() if order > 0.0 else x.min() for x in sizes])
            scale = scale.max() if order > 0.0 else scale.min()
            usable = torch.isfinite(scale) & (scale > 0.0)
            divisor = scale.masked_fill(~usable, 1.0)
            if math.isinf(order):
                exact = scale
            else:
                powers = torch.stack([(x / divisor).pow(order).sum() for x in sizes]).sum()
                exact = torch.where(usable, scale * powers.pow(1.0 / order), scale)
        return Norm(exact, exact.to(self._wide if self._wide == torch.float32 else dtype))

    def moments(self, *, finite_only: bool) -> npt.NDArray[np.float64]:
        rows = np.zeros((len(self._tensors), len(MOMENTS)))
        for index in self._firsts:
            x = self._widened(self._tensors[index])
            if x.numel() == 0:
                continue
            nans, infs = torch.isnan(x).sum(), torch.isinf(x).sum()
            if finite_only:
                x = torch.where(torch.isfinite(x), x, 0.0)
            size = x.abs()
            largest = size.max()
            zeros = x.numel() - torch.count_nonzero(x)
            scales = {"medium": 1.0, "small": _UP, "large": 1.0 / _UP} if self._wide == torch.float64 else {"medium": 1.0}
            numbers = {
                "zeros": zeros,
                "nans": nans,
                "infs": infs,
                "largest": largest,
                "sum_abs": torch.where(largest >= HUGE, (size * SHRINK).sum(), size.sum()),
                **{name: (size * scale).square().sum() for name, scale in scales.items()},
            }
            found = dict(zip(numbers, torch.stack([number.to(self._wide) for number in numbers.values()]).tolist(), strict=True))
            # The sum of squares is kept at the scale at which it neither overflows nor underflows.
            medium = found["medium"]
            if len(scales) == 1 or math.isnan(medium) or SCALES["safe_low"] <= medium <= SCALES["safe_high"]:
                scale = "medium"
            else:
                scale = "large" if medium > 1.0 else "small"
            for name in ("zeros", "nans", "infs", "sum_abs", "largest", scale):
                rows[index, COLUMN[name]] = found[name]
            rows[index, COLUMN["count"]] = x.numel()
        return rows

    # ---- Changing ----

    def clip_(self, limit: float, norm: torch.Tensor, epsilon: float) -> None:
        coefficient = hard_coefficient(limit, moved(norm, self.device, self._wide), epsilon)
        for tensor in self._used():
            self._scale(tensor, coefficient)

    def scale_(self, factor: float | torch.Tensor) -> None:
        if isinstance(factor, torch.Tensor):
            factor = moved(factor, self.device, self._wide)
        for tensor in self._used():
            self._scale(tensor, factor)

    def scale_each_(self, factors: npt.NDArray[np.float64]) -> None:
        for index in self._firsts:
            if factors[index] != 1.0:
                self._scale(self._tensors[index], float(factors[index]))

    def clamp_(self, limit: float) -> None:
        for tensor in self._used():
            tensor.clamp_(-limit, limit)

    def zero_nonfinite_(self) -> None:
        for tensor in self._used():
            tensor.nan_to_num_(0.0, 0.0, 0.0)

    def _scale(self, tensor: torch.Tensor, factor: float | torch.Tensor) -> None:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        tensor.copy_(tensor.to(wide) * (factor.to(wide) if isinstance(factor, torch.Tensor) else factor))

    # ---- Pairs ----

    def dot(self, other: Part) -> torch.Tensor:
        assert isinstance(other, TorchPart)
        pairs = [(self._widened(x), self._widened(y)) for x, y in zip(self._tensors, other._tensors, strict=True)]
        product = torch.stack([(x * y).sum() for x, y in pairs]).sum()
        x_norm, y_norm = (part.norm(2.0, self._wide).exact for part in (self, other))
        # Of unit vectors, as the product itself may overflow or underflow.
        cosine = torch.stack([(x / x_norm * (y / y_norm)).sum() for x, y in pairs]).sum()
        return torch.stack([product, x_norm, y_norm, cosine])

    def _used(self) -> list[torch.Tensor]:
        return [self._tensors[index] for index in self._firsts]

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(self._wide)


def _dense(tensor: torch.Tensor, *, writable: bool) -> torch.Tensor:
    """A dense tensor itself; of a sparse one the values: as stored, to write them, or coalesced, to measure them."""
    if not tensor.is_sparse:
        return tensor
    return tensor._values() if writable else tensor.coalesce().values()
