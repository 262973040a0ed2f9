"""Gradients without memory of their own: meta and fake tensors, and subclasses that keep their elements elsewhere."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

import normclip
from normclip.rules import Soft


class Elsewhere(torch.Tensor):
    """A tensor that keeps its elements in another."""

    elements: torch.Tensor

    @staticmethod
    def __new__(cls, elements: torch.Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, elements.shape, strides=elements.stride(), dtype=elements.dtype, device=elements.device
        )
        made.elements = elements
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.elements, (args, kwargs or {}))
        return function(*args, **kwargs)


class Barren(Elsewhere):
    """One that cannot be written."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            raise NotImplementedError("no copy_")
        if function is torch.ops.aten.detach.default:
            return cls(args[0].elements)
        return super().__torch_dispatch__(function, types, args, kwargs)


ORDERS = (0.0, 1.0, 2.0, 2.5, math.inf, -math.inf)
DRY = {
    "meta": lambda *shape, **given: torch.ones(*shape, device="meta", **given),
    "fake": lambda *shape, **given: FakeTensorMode().from_tensor(torch.ones(*shape, **given)),
}


def parameters(*grads: torch.Tensor) -> list[Any]:
    return [SimpleNamespace(grad=grad) for grad in grads]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("kind", DRY)
def test_dry_runs(kind: str, dtype: torch.dtype) -> None:
    grad = DRY[kind](3, 4, dtype=dtype)
    norms = [normclip.total_norm(grad, order) for order in ORDERS]
    norms += [
        normclip.clip_grad_norm_(parameters(grad), 1.0),
        normclip.get_total_norm([grad]),
        normclip.clip_(grad, 1.0),
    ]
    for norm in norms:
        assert (norm.shape, norm.dtype) == ((), torch.float64 if dtype is torch.float64 else torch.float32)
        assert norm.device == grad.device
        assert isinstance(norm, FakeTensor) == (kind == "fake")
    normclip.clip_grads_with_norm_(parameters(grad), 1.0, norms[0])
    normclip.scale_(grad, 0.5)
    if not dtype.is_complex:
        normclip.clip_grad_value_(parameters(grad), 1.0)


def test_steps_on_the_meta_device_with_patched_torch() -> None:
    model = torch.nn.Linear(3, 2, device="meta")
    model(torch.ones(4, 3, device="meta")).sum().backward()
    with normclip.patch_torch():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert (norm.device.type, norm.shape) == ("meta", ())


def test_steps_in_a_fake_mode() -> None:
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2)
        model(torch.ones(4, 3)).sum().backward()
        norms = [normclip.clip_grad_norm_(model.parameters(), 1.0), normclip.clip_grad_norm_(model.parameters(), rule=Soft(1.0))]
    for norm in norms:
        assert isinstance(norm, FakeTensor)
        assert norm.device.type == "cpu"


@pytest.mark.parametrize("order", ORDERS)
def test_wrappers_are_measured(order: float) -> None:
    tensors = [torch.tensor([3.0, -4.0, 0.5]), torch.tensor([12.0], dtype=torch.float64)]
    for given in ([Elsewhere(tensors[0]), tensors[1]], [tensors[0], Elsewhere(tensors[1])], [Elsewhere(tensor) for tensor in tensors]):
        assert normclip.total_norm(given, order).item() == pytest.approx(normclip.total_norm(tensors, order).item(), rel=1e-12)


def test_wrappers_are_clipped() -> None:
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    wrapped = Elsewhere(first)
    assert normclip.clip_grad_norm_(parameters(wrapped, second, wrapped), 1.0).item() == 5.0  # one of them twice
    torch.testing.assert_close(first, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(second, torch.tensor([0.8]))
    normclip.clip_grad_value_(parameters(wrapped, second), 0.5)
    assert (first.tolist(), second.tolist()) == ([0.5, 0.0], [0.5])
    statistics = normclip.stats([wrapped, second], per_tensor=True)
    assert (statistics.count, statistics.zeros, statistics.l1) == (3, 1, 1.0)
    assert float(normclip.dot([wrapped, second], [first, Elsewhere(second)])) == pytest.approx(0.5)


def test_equal_wrappers_are_not_the_same() -> None:
    wrapped = [Elsewhere(torch.tensor([3.0])), Elsewhere(torch.tensor([4.0]))]
    assert normclip.total_norm(wrapped).item() == 5.0
    assert normclip.clip_(wrapped, 1.0).item() == 5.0
    assert [tensor.elements.item() for tensor in wrapped] == pytest.approx([0.6, 0.8])


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch exports the memory behind it")
def test_what_cannot_be_written_leaves_the_others_alone() -> None:
    first, last = torch.tensor([3.0]), torch.tensor([4.0])
    with pytest.raises(NotImplementedError, match="no copy_"):
        normclip.clip_([first, Barren(torch.tensor([12.0])), last], 1.0)
    assert (first.item(), last.item()) == (3.0, 4.0)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_are_waited_for(one_rank: None) -> None:
    functional = pytest.importorskip("torch.distributed._functional_collectives")
    made = [functional.AsyncCollectiveTensor(functional.all_reduce(torch.tensor([value]), "sum", dist.group.WORLD)) for value in (3.0, 4.0)]
    assert all(type(tensor) is functional.AsyncCollectiveTensor for tensor in made)
    assert normclip.clip_grad_norm_(parameters(made[0], made[1], torch.tensor([12.0])), 1.0).item() == 13.0
    assert [tensor.wait().item() for tensor in made] == pytest.approx([3.0 / 13.0, 4.0 / 13.0], rel=1e-6)
    assert all(tensor.completed for tensor in made)
    assert normclip.dot(made, made).__class__ is float, "by Rust, from memory"
