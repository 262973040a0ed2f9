"""Code of others that runs while tensors are taken, and changes them: what was lent before is not used afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import normclip
from normclip._core import DeviceList, TensorList
from normclip.optim import ClippedSGD
from normclip.rules import Formula, Rule

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch lends no memory: its capsules keep what they export"
)


class Meddler:
    """An array whose export does something to others."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self.meddle = meddle

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **arguments: Any) -> Any:
        self.meddle()
        return np.zeros(2).__dlpack__(max_version=(1, 0))


def replaced(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on what was this one's memory, which keeps it, as this one gets other memory."""
    before = tensor.detach().view_as(tensor)
    tensor.data = torch.tensor([6.0, 8.0])
    return before


def test_producers_run_before_memory_is_borrowed() -> None:
    tensor, kept = torch.tensor([3.0, 4.0]), []
    given = [tensor, Meddler(lambda: kept.append(replaced(tensor)))]
    assert normclip.total_norm(given).item() == 10.0

    tensor = torch.tensor([3.0, 4.0])
    given = [tensor, Meddler(lambda: kept.append(replaced(tensor)))]
    assert normclip.clip_(given, 1.0).item() == 10.0
    torch.testing.assert_close(tensor, torch.tensor([0.6, 0.8]))
    assert torch.equal(kept[-1], torch.tensor([3.0, 4.0])), "no longer the tensor's"


def test_products() -> None:
    tensor, kept = torch.tensor([3.0, 4.0]), []
    given = [tensor, Meddler(lambda: kept.append(replaced(tensor)))]
    assert normclip.dot(given, [torch.ones(2), torch.ones(2)]) == 14.0


def test_what_is_gone_is_refused() -> None:
    tensor, other = torch.tensor([3.0, 4.0]), torch.tensor([1.0])
    given = [other, tensor, Meddler(lambda: tensor.untyped_storage().resize_(0))]
    with pytest.raises(RuntimeError, match=r"tensors\[1\] .*has got other memory since it was taken"):
        normclip.scale_(given, 0.5)
    assert other.item() == 1.0


@dataclass(frozen=True)
class Meddling(Formula):
    """A rule that does something to tensors."""

    meddle: Callable[[], object]

    def formula(self, xp: Any, n: Any) -> Any:
        self.meddle()
        return 0.5 * n / n


WAYS: dict[str, Callable[[list[torch.Tensor], Rule], object]] = {
    "clip_": normclip.clip_,
    "clip_grad_norm_": lambda tensors, rule: normclip.clip_grad_norm_([SimpleNamespace(grad=tensor) for tensor in tensors], rule=rule),
    "clip_grads_": lambda tensors, rule: normclip.clip_grads_([SimpleNamespace(grad=tensor) for tensor in tensors], rule),
    "by group": lambda tensors, rule: normclip.clip_grads_(
        [SimpleNamespace(grad=tensor) for tensor in tensors], limits={"all": rule}, groups=lambda name: "all"
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("meddle", [replaced, lambda tensor: tensor.untyped_storage().resize_(0), lambda tensor: tensor.resize_(1)])
def test_rules_that_change_tensors_are_refused(meddle: Callable[[torch.Tensor], Any], way: str) -> None:
    first, tensor, kept = torch.tensor([1.0]), torch.tensor([3.0, 4.0]), []
    rule = Meddling(lambda: kept.append(meddle(tensor)))
    with pytest.raises(RuntimeError, match=r"\[1\].* has got other memory since it was taken: a rule"):
        WAYS[way]([first, tensor], rule)
    assert first.item() == 1.0
    assert kept[0] is tensor or tensor.untyped_storage().nbytes() == 0 or torch.equal(kept[0], torch.tensor([3.0, 4.0]))


REFUSED_OF_OPTIMIZERS: list[tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = [
    (replaced, RuntimeError, "has got other memory since it was taken: a rule"),
    (lambda tensor: tensor.untyped_storage().resize_(0), ValueError, "has elements but no memory"),
]


@pytest.mark.parametrize(("meddle", "error", "reason"), REFUSED_OF_OPTIMIZERS)
@pytest.mark.parametrize("changed", ["parameter", "gradient", "momentum buffer"])
def test_rules_that_change_tensors_of_an_optimizer_are_refused(
    changed: str, meddle: Callable[[torch.Tensor], Any], error: type[Exception], reason: str
) -> None:
    weights = [torch.nn.Parameter(torch.tensor([1.0])), torch.nn.Parameter(torch.tensor([3.0, 4.0]))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer, kept = ClippedSGD(weights, lr=0.5, rule=1.0, momentum=0.5), []
    optimizer.step()
    before = weights[0].item()
    tensors = {"parameter": weights[1], "gradient": weights[1].grad, "momentum buffer": optimizer.state[weights[1]]["momentum_buffer"]}
    optimizer.rule = Meddling(lambda: kept.append(meddle(tensors[changed])))
    with pytest.raises(error, match=rf"param_groups\[0\]\['params'\]\[1\].* {reason}"):
        optimizer.step()
    assert weights[0].item() == before
    if error is RuntimeError:
        optimizer.rule = Meddling(lambda: None)
        optimizer.step()
        assert weights[0].item() < before


@pytest.mark.parametrize("way", WAYS)
def test_rules_that_do_not_are_heeded(way: str) -> None:
    tensors = [torch.tensor([1.0]), torch.tensor([3.0, 4.0])]
    WAYS[way](tensors, Meddling(lambda: None))
    assert [tensor.tolist() for tensor in tensors] == [[0.5], [1.5, 2.0]]


@pytest.mark.parametrize("kind", [TensorList, DeviceList])
def test_unchanged_lists(kind: Any) -> None:
    sparse = torch.sparse_coo_tensor([[0, 0]], torch.ones(2), (3,), check_invariants=True)
    tensors = [torch.ones(2), np.ones(2), sparse, torch.ones(2, 2).T, torch.empty(0)]
    taken = kind(tensors, writable=True)
    taken.check_unchanged()
    tensors[3].data = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"tensors\[3\]"):
        taken.check_unchanged()
