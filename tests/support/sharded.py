"""Models that are whole and sharded, and what has to hold between them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import normclip

ORDERS = (1.0, 2.0, math.inf, 3.0, 0.5, 0.0, -1.0, -math.inf)


class Net(nn.Module):
    """With 3 rows of the head, which leave one of 4 ranks without any."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 8)
        self.down = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def make_tensor_parallel(model: nn.Module, mesh: Any) -> None:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def make_tensor_parallel_and_shard(model: nn.Module, mesh: Any) -> None:
    """Weights on the mesh of both, and those that are not tensor parallel on that of "dp" alone: two meshes in one list."""
    make_tensor_parallel(model, mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])


def model_of(shard: Callable[[nn.Module], Any] = lambda _: None, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The whole model, and the same one sharded, both with the gradients of the same batch."""
    torch.manual_seed(0)
    whole = Net().to(dtype)
    sharded = copy.deepcopy(whole)
    shard(sharded)
    x = 10.0 * torch.randn(2, 8, 12, dtype=dtype)
    for model in (whole, sharded):
        model(x).square().sum().backward()
    return whole, sharded


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def grads_of(model: nn.Module) -> list[torch.Tensor]:
    return [full(parameter.grad).clone() for parameter in model.parameters()]


def close(found: float, expected: float, tolerance: float = 1e-12) -> None:
    assert abs(float(found) - float(expected)) <= tolerance * abs(float(expected)), (float(found), float(expected))


def raised_by(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def check_like_whole(whole: nn.Module, sharded: nn.Module) -> list[Any]:
    """Norms, statistics and clipping of a sharded model against the whole one."""
    same: list[Any] = []
    before = grads_of(sharded)
    grads = [parameter.grad for parameter in sharded.parameters()]
    for order in ORDERS:
        # Products are rounded otherwise on shards, which the smallest element shows.
        tolerance = 1e-12 if order > 0.0 else 1e-9
        norm = normclip.get_total_norm(grads, order)
        assert type(norm) is torch.Tensor
        assert norm.dtype == torch.float64
        assert norm.shape == ()
        close(norm, normclip.get_total_norm([p.grad for p in whole.parameters()], order), tolerance)
        close(norm, normclip.get_total_norm(before, order), 1e-15 if order != 0.5 else 1e-14)
        same.append(norm.item())

    figures = normclip.grad_stats(sharded, per_tensor=True, norms=[2.0, 3.0], groups={"matrices": ["*weight"]})
    expected = normclip.grad_stats(whole, per_tensor=True, norms=[2.0, 3.0], groups={"matrices": ["*weight"]})
    assert figures.moments.count == expected.moments.count
    assert figures.per_tensor.names == expected.per_tensor.names
    np.testing.assert_array_equal(figures.per_tensor.count, expected.per_tensor.count)
    np.testing.assert_allclose(figures.per_tensor.l2, expected.per_tensor.l2, rtol=1e-12)
    np.testing.assert_allclose(figures.per_tensor.sign_cosine, expected.per_tensor.sign_cosine, rtol=1e-12)
    modules = [normclip.grad_stats(model, per_tensor=True, depth=1).per_tensor for model in (sharded, whole)]
    assert modules[0].names == modules[1].names
    assert len(modules[0].names) < len(figures.per_tensor.names)
    np.testing.assert_array_equal(modules[0].zeros, modules[1].zeros)
    np.testing.assert_allclose(modules[0].l2, modules[1].l2, rtol=1e-15)
    for group in ("matrices", "rest"):
        assert figures.groups[group].count == expected.groups[group].count
        close(figures.groups[group].l2, expected.groups[group].l2)
    close(figures.norms[3.0], expected.norms[3.0])
    same.append(figures.to_dict())

    versions = [grad._version for grad in grads]
    assert normclip.clip_grad_norm_(sharded.parameters(), math.inf).item() == same[1]
    assert normclip.clip_grad_norm_(sharded.parameters(), 1e9).item() == same[1]
    assert versions == [grad._version for grad in grads]
    assert all(map(torch.equal, grads_of(sharded), before))

    norm = normclip.clip_grad_norm_(sharded.parameters(), 0.5)
    for grad, version in zip(grads, versions, strict=True):
        assert grad._version > version or grad.to_local().numel() == 0
    close(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5))
    for found, expected_grad in zip(grads_of(sharded), grads_of(whole), strict=True):
        torch.testing.assert_close(found, expected_grad, rtol=1e-10, atol=1e-13)

    clipped = normclip.clip_grads_(sharded, limits={"matrices": 0.25}, groups={"matrices": ["*weight"]})
    torch_norm = torch.nn.utils.clip_grad_norm_([p for name, p in whole.named_parameters() if name.endswith("weight")], 0.25)
    close(clipped.coefficients["matrices"], 0.25 / torch_norm)
    same.append(dict(clipped.coefficients))
    same.append([normclip.clip_(grads, 0.125).item(), normclip.total_norm(grads).item()])
    close(same[-1][1], 0.125)
    return [*same, *(grad.numpy().tobytes() for grad in grads_of(sharded))]


def mesh_of(size: int, *names: str) -> Any:
    return init_device_mesh("cpu", (size,) if len(names) == 1 else (2, size // 2), mesh_dim_names=names)


class counted_collectives:  # noqa: N801 (used like a function)
    """The bytes that this rank sends in each all-gather."""

    def __enter__(self) -> list[int]:
        self.before = dist.all_gather_into_tensor
        calls: list[int] = []

        def counting(output: torch.Tensor, mine: torch.Tensor, **arguments: Any) -> Any:
            calls.append(mine.nbytes)
            return self.before(output, mine, **arguments)

        dist.all_gather_into_tensor = counting
        return calls

    def __exit__(self, *_: object) -> None:
        dist.all_gather_into_tensor = self.before
