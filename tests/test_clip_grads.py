"""Clipping with all statistics: together, by groups, and with gradients that are not finite."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import normclip
from normclip import clip_grads_
from normclip.thresholds import AutoClip


def parameters(**grads: Any) -> list[tuple[str, torch.nn.Parameter]]:
    named = []
    for name, values in grads.items():
        grad = torch.as_tensor(values)
        parameter = torch.nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad.clone()
        named.append((name, parameter))
    return named


def grads_of(named: list[tuple[str, torch.nn.Parameter]]) -> dict[str, list[float]]:
    return {name: parameter.grad.tolist() for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_together(norm_type: float) -> None:
    generator = torch.Generator().manual_seed(0)
    named = parameters(a=torch.randn(70_000, generator=generator), b=torch.randn(3, 4, generator=generator))
    before = [parameter.grad.clone() for _, parameter in named if parameter.grad is not None]
    clipped = clip_grads_(named, 0.5, norm_type=norm_type, per_tensor=True)
    exact = normclip.total_norm([grad.double() for grad in before], norm_type).item()
    assert clipped.norm == exact
    assert clipped.coefficient == 0.5 / exact
    assert clipped.stats.l2 == normclip.total_norm([grad.double() for grad in before]).item()
    assert clipped.stats.per_tensor is not None
    assert clipped.stats.per_tensor.names == ("a", "b")
    for (_, parameter), grad in zip(named, before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad * np.float32(clipped.coefficient))
        assert parameter.grad._version == 1
    assert (clipped.found_inf, clipped.skipped) == (False, False)


def test_within_the_limit_nothing_is_written() -> None:
    named = parameters(a=[3.0, 4.0])
    assert clip_grads_(named, 5.0).coefficient == 1.0
    assert named[0][1].grad is not None
    assert named[0][1].grad._version == 0


def test_each_group_by_its_own_norm() -> None:
    named = parameters(embedding=[3.0, 4.0], weight=[6.0, 0.0], bias=[8.0], head=[1e6])
    clipped = clip_grads_(named, limits={"emb": 0.5, "body": 1.0, "rest": math.inf}, groups={"emb": ["emb*"], "body": ["weight", "bias"]})
    assert clipped.coefficients == {"emb": 0.1, "body": 0.1, "rest": 1.0}
    after = grads_of(named)
    assert after["embedding"] == pytest.approx([0.3, 0.4])
    assert after["weight"] + after["bias"] == pytest.approx([0.6, 0.0, 0.8])
    assert after["head"] == [1e6]
    assert [parameter.grad._version for _, parameter in named if parameter.grad is not None] == [1, 1, 1, 0]
    assert clipped.stats.groups["body"].l2 == 10.0


def test_limits_with_one_implicit_group() -> None:
    named = parameters(a=[3.0, 4.0])
    assert clip_grads_(named, limits={"rest": 1.0}, groups={}).coefficients == {"rest": 0.2}


class Mixture(torch.nn.Module):
    """Of experts, of which each batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
        self.head = torch.nn.Linear(2, 1)

    def step(self, expert: int) -> None:
        self.zero_grad()
        self.head(self.experts[expert](torch.tensor([3.0, 4.0]))).square().sum().backward()


@pytest.mark.parametrize("groups", [{"first": ["*.0.*"], "experts": ["experts.*"]}, lambda name: ".".join(name.split(".")[:2])])
def test_groups_without_gradients_are_left_alone(groups: Any) -> None:
    """Unused experts, a frozen layer, no gradients at all: the same groups in each step."""
    torch.manual_seed(0)
    model = Mixture()
    labels = {groups(name) for name, _ in model.named_parameters()} if callable(groups) else {*groups, "rest"}
    limits = dict.fromkeys(labels, 0.01)
    for expert in range(3):
        model.step(expert)
        if expert == 2:
            model.head.requires_grad_(False).zero_grad()
        clipped = clip_grads_(model, limits=limits, groups=groups)
        assert set(clipped.coefficients) == set(clipped.stats.groups) == labels
        for label in labels:
            there = clipped.stats.groups[label].count > 0
            assert (clipped.coefficients[label] < 1.0) == there, label
        used = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        parts = sum(1 for moments in clipped.stats.groups.values() if moments.count > 0)
        assert normclip.total_norm(used).item() == pytest.approx(0.01 * math.sqrt(parts))
    assert parts == 1, "of a frozen head and one expert"
    model.zero_grad()
    clipped = clip_grads_(model, limits=limits, groups=groups)
    assert dict(clipped.coefficients) == dict.fromkeys(labels, 1.0)
    with pytest.raises(ValueError, match="typo"):
        clip_grads_(model, limits={"typo": 1.0}, groups=groups)


def test_alternating_training() -> None:
    """One limit for each half of a pair, of which each step trains one."""
    torch.manual_seed(0)
    pair = torch.nn.ModuleDict({"generator": torch.nn.Linear(2, 2), "critic": torch.nn.Linear(2, 1)})
    rules = {half: AutoClip(percentile=50) for half in pair}
    for step in range(4):
        half, other = ("generator", "critic") if step % 2 else ("critic", "generator")
        pair.zero_grad()
        pair[other].requires_grad_(False)
        pair[half].requires_grad_(True)
        pair["critic"](pair["generator"](torch.tensor([[3.0, 4.0 + step]]))).square().sum().backward()
        norm = normclip.grad_stats(pair).l2
        clipped = clip_grads_(pair, limits=rules, groups={"generator": ["generator.*"], "critic": ["critic.*"]})
        assert (clipped.stats.groups[half].l2, clipped.stats.groups[other].count) == (norm, 0)
        assert clipped.coefficients[other] == 1.0
    assert [len(rule.state_dict()["history"]) for rule in rules.values()] == [2, 2], "no norms of gradients that are not there"


BAD = {"good": [3.0, 4.0], "nan": [1.0, math.nan], "inf": [math.inf, -math.inf, 2.0]}


def test_raise_names_every_offender_and_changes_nothing() -> None:
    named = parameters(**BAD)
    with pytest.raises(RuntimeError, match=r"nan \(1 NaN, 0 inf\), inf \(0 NaN, 2 inf\)"):
        clip_grads_(named, 1.0, nonfinite="raise")
    assert str(grads_of(named)) == str(BAD)
    assert clip_grads_(parameters(a=[3.0, 4.0]), 1.0, nonfinite="raise").norm == 5.0


def test_skip_changes_nothing_and_says_so() -> None:
    named = parameters(**BAD)
    clipped = clip_grads_(named, 1.0, nonfinite="skip")
    assert (clipped.found_inf, clipped.skipped, clipped.coefficient) == (True, True, 1.0)
    assert (clipped.stats.nans, clipped.stats.infs) == (1, 2)
    assert str(grads_of(named)) == str(BAD)
    assert clip_grads_(parameters(a=[3.0, 4.0]), 1.0, nonfinite="skip").skipped is False


def test_zero_replaces_them_before_the_norm_is_taken() -> None:
    named = parameters(**BAD)
    clipped = clip_grads_(named, 1.0, nonfinite="zero")
    norm = math.sqrt(3 * 3 + 4 * 4 + 1 + 2 * 2)
    assert clipped.norm == pytest.approx(norm, rel=1e-15)
    assert (clipped.found_inf, clipped.skipped) == (True, False)
    assert (clipped.stats.nans, clipped.stats.infs, clipped.stats.zeros, clipped.stats.linf) == (1, 2, 3, 4.0)
    after = grads_of(named)
    assert after["good"] == pytest.approx([3 / norm, 4 / norm])
    assert after["nan"] == pytest.approx([1 / norm, 0.0])
    assert after["inf"] == pytest.approx([0.0, 0.0, 2 / norm])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_writes_to_the_affected_tensors_only(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(70_000, generator=generator).to(dtype)
    dirty = torch.randn(70_001, generator=generator).to(dtype)
    dirty[66_000], dirty[5] = math.nan, -math.inf
    named = parameters(clean=clean, dirty=dirty)
    clipped = clip_grads_(named, 1e9, nonfinite="zero")
    kept = torch.where(dirty.isfinite(), dirty, torch.zeros_like(dirty))
    assert clipped.norm == pytest.approx(normclip.total_norm([clean.double(), kept.double()]).item(), rel=1e-12)
    for (_, parameter), expected, version in zip(named, (clean, kept), (0, 1), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected)
        assert parameter.grad._version == version


def test_propagate_is_what_torch_does() -> None:
    for values in ([1.0, math.nan], [1.0, math.inf]):
        ours, theirs = parameters(a=values, b=[2.0]), parameters(a=values, b=[2.0])
        clip_grads_(ours, 1.0)
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in theirs], 1.0)
        assert str(grads_of(ours)) == str(grads_of(theirs))


def test_huge_but_finite_is_finite() -> None:
    clipped = clip_grads_(parameters(a=[1e20, 1e20]), 1.0, nonfinite="raise")
    assert clipped.norm == pytest.approx(math.sqrt(2) * 1e20, rel=1e-7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either rule"),
        ({"rule": 1.0, "limits": {"rest": 1.0}}, ValueError, "either rule"),
        ({"rule": -1.0}, ValueError, "rule is -1"),
        ({"rule": math.nan}, ValueError, "rule is nan"),
        ({"limits": {"rest": -1.0}, "groups": {}}, ValueError, r"limits\['rest'\] is -1"),
        ({"limits": {"typo": 1.0}, "groups": {}}, ValueError, "typo"),
        ({"limits": {"rest": 1.0}}, ValueError, "rest"),
        ({"rule": 1.0, "norm_type": 3}, ValueError, "choose 1, 2 or inf"),
        ({"rule": 1.0, "nonfinite": "ignore"}, ValueError, "choose 'propagate'"),
        ({"rule": 1.0, "groups": {"g": ["zzz"]}}, ValueError, "zzz"),
        ({"rule": 1.0, "groups": {"g": "a*"}}, TypeError, r"groups\['g'\] is the string"),
    ],
)
def test_errors_change_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    named = parameters(a=[3.0, 4.0])
    with pytest.raises(error, match=message):
        clip_grads_(named, **arguments)
    assert grads_of(named) == {"a": [3.0, 4.0]}


def test_zero_refuses_what_has_no_real_elements() -> None:
    named = parameters(a=[3.0, math.nan], b=torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameters\[1\].grad .*complex64"):
        clip_grads_(named, 1.0, nonfinite="zero")
    assert str(grads_of(named)["a"]) == "[3.0, nan]"
    indices = torch.tensor([[0, 0]])
    with torch.sparse.check_sparse_tensor_invariants():
        named[1][1].grad = None
        sparse = torch.nn.Parameter(torch.zeros(3))
        sparse.grad = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0]), (3,))
    with pytest.raises(ValueError, match="coalesce"):
        clip_grads_([*named, ("sparse", sparse)], 1.0, nonfinite="zero")


def test_no_gradients() -> None:
    clipped = clip_grads_([torch.nn.Parameter(torch.zeros(3))], 1.0)
    assert (clipped.norm, clipped.coefficient, clipped.stats.count) == (0.0, 1.0, 0)
