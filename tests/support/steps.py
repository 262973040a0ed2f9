"""Scenarios of several steps: what remembers the steps before, and what logs them."""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import normclip
from normclip.monitor import Figures, GradMonitor
from normclip.rules import Least
from normclip.thresholds import AdaClip, AdaGC, AdaGN, AutoClip, ZClip
from support.sharded import close, grads_of, mesh_of, model_of, raised_by


def set_grads(model: nn.Module, grads: list[torch.Tensor], factor: float) -> None:
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = factor * grad


def sharded_twins(size: int) -> tuple[nn.Module, nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    whole, sharded = model_of(lambda model: fully_shard(model, mesh=mesh_of(size, "dp")))
    return whole, sharded, *([parameter.grad.clone() for parameter in model.parameters()] for model in (whole, sharded))


def thresholds(rank: int, size: int) -> Any:
    """They remember the same on all ranks, to the bit, and what they would remember of the whole model."""
    whole, sharded, grads, shards = sharded_twins(size)
    same: list[Any] = []
    policies = (AutoClip(percentile=50, window=3), ZClip(warmup=3, max_norm=1.0, mode="percentile"), AdaGN(), AdaClip(0.5), AdaGC(warmup=2))
    for policy in policies:
        twin = copy.deepcopy(policy)
        for factor in (1.0, 0.5, 2.0, 30.0, 3.0):
            set_grads(whole, grads, factor)
            set_grads(sharded, shards, factor)
            for clips, model in ((twin, whole), (policy, sharded)):
                if isinstance(clips, (AdaClip, AdaGC)):
                    clips.clip_(model)
                else:
                    normclip.clip_grad_norm_(model.parameters(), rule=Least(50.0, clips))
            for found, expected in zip(grads_of(sharded), grads_of(whole), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
        same.append(policy.state_dict())
    if rank == size - 1:
        sharded.up.weight.grad.to_local()[0, 0] = math.nan
    assert policy.clip_(sharded).found_inf
    return same


def monitored_error(rank: int, size: int) -> Any:
    """A shard that cannot be written, on one rank: all raise, none has changed, and no step has counted."""
    mesh, bad = mesh_of(size, "dp"), size - 1
    told: list[Figures] = []
    shards = [torch.tensor([3.0, 4.0]), torch.zeros(1).expand(4) if rank == bad else torch.zeros(4)]
    wholes = [nn.Parameter(DTensor.from_local(torch.ones_like(shard), mesh, [Shard(0)])) for shard in shards]
    named = list(zip("ab", wholes, strict=True))
    for parameter, shard in zip(wholes, shards, strict=True):
        parameter.grad = DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)
    monitor = GradMonitor(named, lambda figures, step: told.append(figures))
    with normclip.patch_torch(monitor):
        for clip in (monitor.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            for order in (2.0, 3.0):
                error = raised_by(lambda: clip(wholes, 0.5, order))  # noqa: B023
                assert isinstance(error, ValueError) if rank == bad else isinstance(error, RuntimeError), repr(error)
                assert ("expand" if rank == bad else f"rank {bad}") in str(error)
    assert [shard.tolist() for shard in shards] == [[3.0, 4.0], [0.0] * 4]
    assert (monitor.step, told) == (0, [])
    norm = monitor.clip_grad_norm_(wholes, math.inf)
    close(told[0]["norm"], 5.0 * math.sqrt(size), 1e-15)
    return [norm.item()]


def groups_without_gradients(rank: int, size: int) -> Any:
    """As of the whole model: a frozen layer, then none at all."""
    whole, sharded, grads, shards = sharded_twins(size)
    groups = {"head": ["head.*"], "body": ["up.*", "down.*"]}
    same: list[Any] = []
    for frozen in ("head.", ""):
        set_grads(whole, grads, 1.0)
        set_grads(sharded, shards, 1.0)
        for model in (whole, sharded):
            for name, parameter in model.named_parameters():
                if name.startswith(frozen):
                    parameter.grad = None
        expected, found = (normclip.clip_grads_(model, limits={"head": 0.5, "body": 0.5}, groups=groups) for model in (whole, sharded))
        assert list(found.coefficients) == ["head", "body", "rest"]
        assert found.coefficients["head"] == 1.0
        for group, moments in found.stats.groups.items():
            assert moments.count == expected.stats.groups[group].count
            close(found.coefficients[group], expected.coefficients[group])
        same.append(dict(found.coefficients))
    assert same[0]["body"] < 1.0 == same[1]["body"]
    return same


def monitored(rank: int, size: int) -> Any:
    """Sinks on one rank alone, and monitors on all, which measure together."""
    whole, sharded, grads, shards = sharded_twins(size)
    told: list[Figures] = []
    sinks = [lambda figures, step: told.append(figures)] if rank == 0 else []
    monitor, alone = GradMonitor(sharded, sinks, every=2), GradMonitor(whole, [lambda figures, step: told.append(figures)])
    same: list[Any] = []
    for _ in range(3):
        set_grads(sharded, shards, 1.0)
        monitor.observe()
        same.append(monitor.clip_(0.5).norm)
        set_grads(sharded, shards, 1.0)
        with normclip.patch_torch(monitor):
            same.append(torch.nn.utils.clip_grad_norm_(sharded.parameters(), 0.5).item())
        assert same[-1] == same[-2]
        close(normclip.total_norm([parameter.grad for parameter in sharded.parameters()]), 0.5, 1e-6)
    assert monitor.step == 9
    assert len(told) == (5 if rank == 0 else 0)
    set_grads(whole, grads, 1.0)
    alone.observe()
    for figures in told:
        close(figures["norm"], told[-1]["norm"])
        close(figures["norm/up.weight"], told[-1]["norm/up.weight"])
    return same
