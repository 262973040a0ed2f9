"""Rows that tell more than one norm: what torch takes for it, and what normclip does. Each returns the L2 norm, to be checked."""

import math

import torch

import normclip
from normclip.bench.gradients import Gradients


def torch_statistics(gradients: Gradients) -> float:
    """Three norms, counts of zeros, NaN and infinities, and the sign-cosine, as one writes them in plain torch."""
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
    """The two norms of the sign-cosine alone."""
    torch.nn.utils.get_total_norm(gradients.tensors, 1.0)
    return torch.nn.utils.get_total_norm(gradients.tensors).item()


def torch_dot(gradients: Gradients) -> float:
    """The inner product with a copy of the gradients, which is the square of the norm."""
    pairs = zip(gradients.tensors, gradients.pristine, strict=True)
    return math.sqrt(sum(torch.dot(x.view(-1), y.view(-1)).item() for x, y in pairs))


def normclip_l2(gradients: Gradients) -> float:
    """The L2 norm alone, for the cost of the rest."""
    return normclip.get_total_norm(gradients.tensors).item()


def normclip_statistics(gradients: Gradients) -> float:
    """All statistics of the whole."""
    return normclip.stats(gradients.tensors).l2


def normclip_statistics_per_tensor(gradients: Gradients) -> float:
    """All statistics of the whole and of each tensor."""
    return normclip.stats(gradients.tensors, per_tensor=True).l2


def normclip_dot(gradients: Gradients) -> float:
    """The inner product with a copy of the gradients, which is the square of the norm."""
    return math.sqrt(normclip.dot(gradients.tensors, gradients.pristine))
