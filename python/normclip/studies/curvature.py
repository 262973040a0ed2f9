"""The curvature of a loss at a point, by gradients at fixed distances from it, whatever the length of the step of training.

Local smoothness along a step, as of :class:`normclip.theory.SmoothnessProbe`, divides by the length of the step, which follows the norm
of the gradient. Where gradients are mostly noise, that alone makes the two correlate. Here no distance depends on the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normclip import dot, total_norm

Vector = list[Tensor]

_APART = 0.01
"""Half the distance of the two gradients whose difference is a product with the Hessian."""


@dataclass(frozen=True)
class Point:
    """The curvature at one point."""

    norm: float
    """The norm n of the gradient."""
    secant: float
    """The change of the gradient over a fixed distance against the gradient, divided by that distance."""
    along: float
    """The absolute value of the curvature along the gradient."""
    top: float
    """The norm of the Hessian: the largest absolute value of an eigenvalue, by power iteration."""


class CurvatureProbe:
    """Measures curvature at points along training. The model's parameters are left as they are, bit for bit.

    Args:
        model: The model. Its forward pass must be a function of parameters and batch alone: no dropout, no running statistics.
        length: The distance over which the secant is taken.
        iterations: The number of power iterations. They go on from the last point's eigenvector.
        seed: For the first vector.
    """

    def __init__(self, model: nn.Module, length: float = 0.1, iterations: int = 8, seed: int = 0) -> None:
        self.parameters: list[nn.Parameter] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.length: float = length
        self.iterations: int = iterations
        generator = torch.Generator().manual_seed(seed)
        self._top = [torch.randn(parameter.shape, generator=generator) for parameter in self.parameters]

    def measure(self, loss: Callable[[], Tensor]) -> Point:
        """The curvature of the loss at the model's present parameters."""
        gradient = self._gradient(loss)
        norm = _norm(gradient)
        downhill = _scaled(gradient, -1.0 / norm)
        with self._moved(downhill, self.length):
            ahead = self._gradient(loss)
        along = dot(downhill, self.hessian_product(loss, downhill))
        for _ in range(self.iterations):
            product = self.hessian_product(loss, _scaled(self._top, 1.0 / _norm(self._top)))
            self._top = product
        change = _norm([a - b for a, b in zip(ahead, gradient, strict=True)])
        return Point(norm, change / self.length, abs(float(along)), _norm(self._top))

    def hessian_product(self, loss: Callable[[], Tensor], unit: Vector) -> Vector:
        """The Hessian times a vector of norm 1, by the difference of two gradients."""
        with self._moved(unit, _APART):
            ahead = self._gradient(loss)
        with self._moved(unit, -_APART):
            behind = self._gradient(loss)
        return [(a - b) / (2.0 * _APART) for a, b in zip(ahead, behind, strict=True)]

    def _gradient(self, loss: Callable[[], Tensor]) -> Vector:
        return list(torch.autograd.grad(loss(), self.parameters))

    @contextmanager
    def _moved(self, direction: Vector, distance: float) -> Iterator[None]:
        """Inside, the parameters are this distance away."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with torch.no_grad():
                for parameter, each in zip(self.parameters, direction, strict=True):
                    parameter.add_(each, alpha=distance)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, before, strict=True):
                    parameter.copy_(old)


def _norm(vector: Sequence[Tensor]) -> float:
    return float(total_norm(vector))


def _scaled(vector: Vector, factor: float) -> Vector:
    return [each * factor for each in vector]
