"""Gradients to measure: their tensors, parameters that carry them, and the way back to the values they began with."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normclip.bench.exact import exact_norm

# torch and normclip divide by norm + 1e-6. Above this norm that changes the result by less than 0.1 %, so the norm
# after a clipping call is `max_norm` without measuring it again.
_SMALLEST_NORM = 1e-3
_CHUNK = 65536  # compared in float64, half a megabyte: stays in cache


class Gradients:
    """The gradients of one model in one dtype, with a pristine copy to check against and to restore from."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.pristine = [tensor.clone() for tensor in self.tensors]
        # Only `.grad` is ever looked at: parameters left uninitialised never touch their pages.
        self.parameters = [nn.Parameter(torch.empty_like(tensor)) for tensor in self.tensors]
        for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
            parameter.grad = tensor
        self._exact: dict[float, float] = {}
        self._norm = self.exact_norm(2.0)

    @property
    def elements(self) -> int:
        """How many values there are."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """How many bytes one pass reads."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def halvings(self) -> int:
        """How many times the pristine values can be halved before they must be restored."""
        return max(1, int(math.log2(self.exact_norm(2.0) / _SMALLEST_NORM)))

    def exact_norm(self, order: float) -> float:
        """The norm of the pristine values, computed once for each order."""
        if order not in self._exact:
            self._exact[order] = exact_norm(self.pristine, order)
        return self._exact[order]

    def restore(self) -> None:
        """Write the pristine values back."""
        torch._foreach_copy_(self.tensors, self.pristine)
        self._norm = self.exact_norm(2.0)

    def are_pristine_times(self, coefficient: float) -> bool:
        """Whether every value is the pristine one times `coefficient`, itself known to 1e-12, rounded once."""
        if coefficient == 1.0:
            return all(map(torch.equal, self.tensors, self.pristine))
        limits = torch.finfo(self.tensors[0].dtype)
        relative, absolute = limits.eps + 1e-12, limits.eps * limits.tiny  # the latter among subnormal values
        for tensor, before in zip(self.tensors, self.pristine, strict=True):
            chunks = (torch.split(whole.view(-1), _CHUNK) for whole in (tensor, before))
            for found, value in zip(*chunks, strict=True):
                expected = value.double() * coefficient
                if bool(((found.double() - expected).abs() > relative * expected.abs() + absolute).any()):
                    return False
        return True

    def halving_limits(self, count: int) -> list[float]:
        """The next `count` values of `max_norm`, each half the norm that the call before it leaves behind.

        Every one of these calls has to scale. The pristine values come back first where `count` halvings would
        make the norm too small to be known without measuring.
        """
        if self._norm * 0.5**count < _SMALLEST_NORM:
            self.restore()
        limits = [self._norm * 0.5**call for call in range(1, count + 1)]
        self._norm = limits[-1]
        return limits
