"""The gradients of a workload, with parameters that hold them and a copy to restore them from."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from normclip.bench.exact import exact_norm

__all__ = ["Gradients"]

# torch and normclip divide by norm + 1e-6. Above this norm that changes the result by less than 0.1 %, so the norm
# after a clipping call is `max_norm` without measuring it again.
_SMALLEST_NORM = 1e-3
_CHUNK = 65536  # elements compared at once; half a megabyte in float64, which stays in cache


class Gradients:
    """The gradients of one model in one dtype, with a pristine copy to check against and to restore from."""

    def __init__(self, tensors: Iterable[Tensor], work: Callable[[], object] | None = None) -> None:
        """Take the tensors as they are.

        Args:
            tensors: The gradients.
            work: What torch does before each call in training; by default, a matrix product that uses all threads.
        """
        matrix = torch.ones(512, 512)
        self.work: Callable[[], object] = work or partial(torch.mm, matrix, matrix)
        self.tensors: list[Tensor] = list(tensors)
        self.pristine: list[Tensor] = [tensor.clone() for tensor in self.tensors]
        # Clipping reads only `.grad`, so uninitialized parameters suffice, whose memory pages are never touched.
        self.parameters: list[nn.Parameter] = [nn.Parameter(torch.empty_like(tensor)) for tensor in self.tensors]
        for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
            parameter.grad = tensor
        self._exact: dict[float, float] = {}
        self._norm = self.exact_norm(2.0)

    @property
    def elements(self) -> int:
        """The number of elements."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """The number of bytes that one pass reads."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def halvings(self) -> int:
        """How many times the gradients can be halved before they must be restored."""
        return max(1, int(math.log2(self.exact_norm(2.0) / _SMALLEST_NORM)))

    def exact_norm(self, order: float) -> float:
        """The norm of the original gradients, computed once for each order."""
        if order not in self._exact:
            self._exact[order] = exact_norm(self.pristine, order)
        return self._exact[order]

    def restore(self) -> None:
        """Write the original values back."""
        torch._foreach_copy_(self.tensors, self.pristine)
        self._norm = self.exact_norm(2.0)

    def are_pristine_times(self, coefficient: float) -> bool:
        """Whether every element is the original one times `coefficient`, rounded once; `coefficient` may be off by 1e-12."""
        if coefficient == 1.0:
            return all(map(torch.equal, self.tensors, self.pristine))
        limits = torch.finfo(self.tensors[0].dtype)
        relative, absolute = limits.eps + 1e-12, limits.eps * limits.tiny  # `absolute` is the spacing of subnormal numbers
        for tensor, before in zip(self.tensors, self.pristine, strict=True):
            chunks = (torch.split(whole.view(-1), _CHUNK) for whole in (tensor, before))
            for found, value in zip(*chunks, strict=True):
                expected = value.double() * coefficient
                if bool(((found.double() - expected).abs() > relative * expected.abs() + absolute).any()):
                    return False
        return True

    def halving_limits(self, count: int) -> list[float]:
        """The next `count` values of `max_norm`, each half the norm before its call, so that every clipping call scales.

        The gradients are restored first if `count` halvings would make the norm so small that it no longer equals the
        limit after clipping: see `_SMALLEST_NORM`.
        """
        if self._norm * 0.5**count < _SMALLEST_NORM:
            self.restore()
        limits = [self._norm * 0.5**call for call in range(1, count + 1)]
        self._norm = limits[-1]
        return limits
