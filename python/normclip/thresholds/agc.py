"""AGC: clips the gradient of each unit of a layer in proportion to the norm of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from normclip._arguments import check_not_negative, check_positive
from normclip._backends import collect_grads, hard_coefficient
from normclip._formulas import times
from normclip._names import named
from normclip.thresholds.policy import Policy
from normclip.typing import NamedParameters

if TYPE_CHECKING:
    import torch

__all__ = ["AGC"]


@dataclass(eq=False)
class AGC(Policy):
    """Adaptive gradient clipping: the gradient of each unit is limited in proportion to the norm of its weights. It has no state.

        gᵤ ← gᵤ · min(1, λ·max(‖Wᵤ‖, ε) / ‖gᵤ‖)

    for the weights Wᵤ and the gradient gᵤ of unit u. A unit is the slice of a tensor at one index of the first dimension: an output of a
    linear layer or a convolution, a row of an embedding, but an input of a transposed convolution. Biases and other tensors with at most
    one dimension are one unit. Leave out the last layer, as the authors do. (Their code also takes a tensor for one unit that has at most
    one dimension of more than one element, such as the weights of shape (k, 1) of a linear layer with one input; here that layer has k
    units. Tensors of more than four dimensions, which it refuses, have units here.)

    Weights and gradients are read by torch's operations. On a device, a call does not wait, and always raises the version counters.

    Args:
        clip: λ ≥ 0.
        eps: ε > 0, used in place of the norm of the weights of a unit if that is smaller.

    Raises:
        ValueError: A number is out of its range.

    References:
        Brock, De, Smith, Simonyan: High-performance large-scale image recognition without normalization, 2021 (arXiv 2102.06171).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
        >>> weight.grad = torch.tensor([[0.6, 0.8], [0.3, 0.4]])
        >>> AGC(clip=0.01).clip_([weight])
        >>> weight.grad
        tensor([[0.0300, 0.0400],
                [0.3000, 0.4000]])
    """

    clip: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        self.clip, self.eps = check_not_negative("clip", self.clip), check_positive("eps", self.eps)

    def clip_(self, parameters: NamedParameters) -> None:
        """Clip the gradients in place.

        Args:
            parameters: A module, parameters, or pairs of name and parameter; those without a gradient are passed over.

        Raises:
            TypeError: As for :func:`normclip.clip_grad_norm_`, or a gradient is sparse.
            ValueError: A gradient cannot be written. Nothing has changed.
        """
        import torch

        pairs = named(parameters)
        given = {id(parameter): (name, parameter) for name, parameter in pairs if parameter.grad is not None}
        collect_grads([parameter for _, parameter in given.values()], writable=True)
        for name, parameter in given.values():
            if parameter.grad.layout != torch.strided:
                raise TypeError(f"the gradient of parameter {name} is sparse: leave the parameter out, or make its gradient dense")
        for _, parameter in given.values():
            weight, gradient = (torch.view_as_real(x) if x.is_complex() else x for x in (parameter.detach(), parameter.grad.detach()))
            limits, norms = (_unit_norms(x, whole=parameter.ndim <= 1) for x in (weight, gradient))
            limits = times(torch, limits.clamp(min=self.eps), self.clip)
            coefficients = hard_coefficient(limits, norms)
            if not gradient.is_cpu or not bool((coefficients == 1.0).all()):
                gradient.mul_(coefficients.to(torch.promote_types(gradient.dtype, torch.float32)))


def _unit_norms(x: torch.Tensor, *, whole: bool) -> torch.Tensor:
    """The norm of each unit, in a shape that broadcasts with x; in float64 if the device has it."""
    import torch

    wide = torch.float32 if x.device.type == "mps" else torch.float64
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=tuple(range(0 if whole else 1, x.ndim)), keepdim=True, dtype=wide)
    return norms
