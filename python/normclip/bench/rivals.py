"""The calls of rows that compute more than one norm, by torch and by normclip. Each returns the L2 norm, which is checked."""

import math
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import SGD

import normclip
from normclip.bench.gradients import Gradients
from normclip.optim import ClippedSGD

__all__ = [
    "Stepping",
    "normclip_dot",
    "normclip_l2",
    "normclip_statistics",
    "normclip_statistics_per_tensor",
    "torch_dot",
    "torch_l1_and_l2",
    "torch_statistics",
]


def torch_statistics(gradients: Gradients) -> float:
    """Three norms, counts of zeros, NaN and infinities, and the sign-cosine, in plain torch."""
    tensors = gradients.tensors
    l2 = torch.nn.utils.get_total_norm(tensors)
    l1 = torch.nn.utils.get_total_norm(tensors, 1.0)
    torch.nn.utils.get_total_norm(tensors, math.inf)
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors)
    sum(int(tensor.isnan().sum()) for tensor in tensors)
    sum(int(tensor.isinf().sum()) for tensor in tensors)
    _ = l1 / (math.sqrt(gradients.elements - zeros) * l2)
    return l2.item()


def torch_l1_and_l2(gradients: Gradients) -> float:
    """Only the two norms that the sign-cosine needs."""
    torch.nn.utils.get_total_norm(gradients.tensors, 1.0)
    return torch.nn.utils.get_total_norm(gradients.tensors).item()


def torch_dot(gradients: Gradients) -> float:
    """The inner product with a copy of the gradients, which is the square of the norm."""
    pairs = zip(gradients.tensors, gradients.pristine, strict=True)
    return math.sqrt(sum(torch.dot(x.view(-1), y.view(-1)).item() for x, y in pairs))


def normclip_l2(gradients: Gradients) -> float:
    """The L2 norm alone, to compare the cost of all statistics with."""
    return normclip.get_total_norm(gradients.tensors).item()


def normclip_statistics(gradients: Gradients) -> float:
    """All statistics of all gradients together."""
    return normclip.stats(gradients.tensors).l2


def normclip_statistics_per_tensor(gradients: Gradients) -> float:
    """All statistics of all gradients together, and of each tensor."""
    return normclip.stats(gradients.tensors, per_tensor=True).l2


def normclip_dot(gradients: Gradients) -> float:
    """The inner product with a copy of the gradients, which is the square of the norm."""
    return math.sqrt(normclip.dot(gradients.tensors, gradients.pristine))


class Stepping:
    """Clipping and a step of gradient descent. torch and normclip have an optimizer each, on the same parameters.

    Both always have to clip: torch's clipping leaves gradients of norm 1, and normclip's limit is half of that.
    """

    _LR = 1e-4

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._made: WeakKeyDictionary[Gradients, tuple[SGD, ClippedSGD]] = WeakKeyDictionary()

    def torch_step(self, gradients: Gradients) -> float:
        """`clip_grad_norm_`, then a step of torch's fused optimizer."""
        sgd, _ = self._optimizers(gradients)
        norm = torch.nn.utils.clip_grad_norm_(gradients.parameters, 1.0, foreach=True)
        sgd.step()
        return norm.item()

    def normclip_step(self, gradients: Gradients) -> float:
        """One step of `ClippedSGD`."""
        _, clipped = self._optimizers(gradients)
        clipped.step()
        return float(clipped.last_norm or 0.0)

    def error(self, gradients: Gradients) -> float:
        """The largest error of the parameters after a first step, in units of half a unit in the last place."""
        before = [torch.linspace(-1.0, 1.0, tensor.numel(), dtype=tensor.dtype).view_as(tensor) for tensor in gradients.tensors]
        parameters = [nn.Parameter(value.clone()) for value in before]
        for parameter, gradient in zip(parameters, gradients.tensors, strict=True):
            parameter.grad = gradient
        ClippedSGD(parameters, self._LR, 0.5, self._momentum).step()
        move = -self._LR * min(1.0, 0.5 / gradients.exact_norm(2.0))
        return max(map(partial(_worst, move), parameters, before, gradients.tensors))

    def _optimizers(self, gradients: Gradients) -> tuple[SGD, ClippedSGD]:
        if gradients not in self._made:
            with torch.no_grad():
                torch._foreach_zero_(list[Tensor](gradients.parameters))
            sgd = SGD(gradients.parameters, self._LR, self._momentum, fused=True)
            self._made[gradients] = sgd, ClippedSGD(gradients.parameters, self._LR, 0.5, self._momentum)
        return self._made[gradients]


def _worst(move: float, parameter: Tensor, before: Tensor, gradient: Tensor) -> float:
    exact = before.double() + move * gradient.double()
    half_unit = 0.5 * torch.finfo(parameter.dtype).eps
    return ((parameter.detach().double() - exact).abs() / (half_unit * exact.abs() + half_unit * 1e-6)).max().item()
