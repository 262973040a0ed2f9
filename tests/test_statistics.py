"""Statistics of tensors and of a model's gradients."""

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normclip
from normclip import Moments, PerTensor, Stats
from normclip._core import FIGURES
from normclip._names import module_of
from support.tensors import Recipe, recipes


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    net(torch.arange(9)).square().sum().backward()
    return net


@pytest.mark.parametrize(("kind", "others"), [(Stats, ["moments", "norms", "groups", "per_tensor"]), (PerTensor, ["names"])])
def test_figures_are_attributes(kind: type, others: list[str]) -> None:
    assert [field.name for field in dataclasses.fields(kind) if field.name not in others] == list(FIGURES), "in this order"
    assert {name for name, value in vars(Moments).items() if inspect.isgetsetdescriptor(value)} == set(FIGURES)
    assert all(f"    {figure}: " in (Stats.__doc__ or "") for figure in FIGURES), "explained"


@given(st.lists(recipes(), max_size=5))
def test_the_whole_and_its_parts_are_moments(given_recipes: list[Recipe]) -> None:
    tensors = [recipe.make() for recipe in given_recipes]
    names = [f"t{i}" for i in range(len(tensors))]
    found = normclip.stats(tensors, names=names, per_tensor=True)
    assert found.per_tensor is not None
    assert found.per_tensor.names == tuple(names)
    for figure in FIGURES:
        np.testing.assert_array_equal(getattr(found, figure), getattr(Moments.of(tensors), figure))
        each = [getattr(Moments.of(tensor), figure) for tensor in tensors]
        np.testing.assert_array_equal(getattr(found.per_tensor, figure), np.array(each, np.float64))


def test_further_norms() -> None:
    tensors = [Recipe("float32", 1000, seed=seed).make() for seed in range(3)]
    found = normclip.stats(tensors, norms=(3, 0.5, -math.inf))
    assert found.norms == {order: normclip.total_norm(tensors, order) for order in (3.0, 0.5, -math.inf)}


def test_a_repeated_tensor_counts_once_and_reads_the_same() -> None:
    a, b = np.ones(4), np.full(2, 3.0)
    found = normclip.stats([a, b, a], names="xyz", per_tensor=True, groups={"first": ["x"], "last": ["z"]})
    assert found.count == 6
    assert found.per_tensor is not None
    assert found.per_tensor.l1.tolist() == [4.0, 6.0, 4.0]
    assert (found.groups["first"].count, found.groups["last"].count) == (4, 0)


def test_gradients_are_named_by_the_module() -> None:
    net = model()
    net[1].bias.grad = None
    found = normclip.grad_stats(net, per_tensor=True)
    assert found.per_tensor is not None
    assert found.per_tensor.names == ("0.weight", "1.weight", "2.weight", "2.bias")
    assert found.l2 == pytest.approx(
        torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]).item(), rel=1e-6
    )
    by_pairs = normclip.grad_stats(net.named_parameters(), per_tensor=True)
    assert by_pairs.per_tensor is not None
    assert by_pairs.per_tensor.names == found.per_tensor.names
    by_position = normclip.grad_stats(net.parameters(), per_tensor=True)
    assert by_position.per_tensor is not None
    assert by_position.per_tensor.names == ("0", "1", "3", "4")
    assert normclip.grad_stats(net[0].weight).count == 66


def test_groups_by_name_pattern_and_function() -> None:
    net = model()
    grads = {name: p.grad for name, p in net.named_parameters()}
    by_pattern = normclip.grad_stats(net, groups={"biases": ["*.bias"], "first": ["1.*", "0.weight"]}).groups
    assert set(by_pattern) == {"biases", "first", "rest"}
    assert by_pattern["biases"] == Moments.of([grads["1.bias"], grads["2.bias"]])
    assert by_pattern["first"] == Moments.of([grads["0.weight"], grads["1.weight"]]), "the bias went to the group before"
    assert by_pattern["rest"] == Moments.of(grads["2.weight"])
    by_function = normclip.grad_stats(net, groups=lambda name: name.split(".")[0]).groups
    assert list(by_function) == ["0", "1", "2"]
    assert sum(by_function.values(), Moments()).l2 == normclip.grad_stats(net).l2


def test_groups_are_those_of_parameters_whichever_have_gradients() -> None:
    net = model()
    groups = {"head": ["2.*"], "embedding": ["0.*"], "nobody": ["0.weight"], "empty": []}
    names = ["head", "embedding", "nobody", "empty", "rest"]
    whole = normclip.grad_stats(net, groups=groups).groups
    assert list(whole) == names
    assert [whole[name].count for name in names] == [24, 66, 0, 0, 35]
    net[2].requires_grad_(False).zero_grad()
    found = normclip.grad_stats(net, groups=groups)
    assert list(found.groups) == names
    assert [found.groups[name].count for name in names] == [0, 66, 0, 0, 35]
    assert found.to_dict()["groups"]["head"]["count"] == 0
    assert list(normclip.grad_stats(net, groups=lambda name: name[0]).groups) == ["0", "1", "2"]
    net.zero_grad()
    assert normclip.grad_stats(net, groups=groups).groups == dict.fromkeys(names, Moments())
    with pytest.raises(ValueError, match=r"names '3.\*', which matches no tensor: the names are 0.weight, .* 2.bias$"):
        normclip.grad_stats(net, groups={"typo": ["3.*"]})


def test_top() -> None:
    found = normclip.stats([np.array([1.0]), np.array([math.nan]), np.array([5.0])], names=["a", "b", "c"], per_tensor=True)
    assert [name for name, _ in found.top(2)] == ["b", "c"]
    assert found.top(1, by="count") == [("a", 1.0)]
    with pytest.raises(ValueError, match="choose one of count"):
        found.top(1, by="l7")
    with pytest.raises(ValueError, match="per_tensor=True"):
        normclip.stats(np.ones(3)).top(1)


def test_to_dict_is_plain() -> None:
    found = normclip.stats([np.ones(3)], names=["a"], per_tensor=True, norms=[3], groups={"g": ["a"]}).to_dict()
    assert json.loads(json.dumps(found))["per_tensor"]["a"]["l1"] == 3.0
    assert found["groups"]["g"]["count"] == 3
    assert found["norms"] == {3.0: pytest.approx(3 ** (1 / 3))}


def test_a_table_of_huge_figures() -> None:
    table = str(normclip.stats([np.full(1000, 1e307)]))
    assert max(map(len, table.splitlines())) < 120
    assert "1e+307" in table.split()
    assert "1000" in table.split()


def test_the_table_has_a_row_a_tensor() -> None:
    text = str(normclip.stats([np.ones(3), np.zeros(2)], names=["ones", "zeros"], per_tensor=True, groups={"g": ["ones"]}, norms=[3]))
    lines = text.splitlines()
    assert lines[0].split() == list(FIGURES)
    assert [line.split()[0] for line in lines[1:]] == ["all", "group", "group", "ones", "zeros", "norm"]
    assert len({len(line) for line in lines[:-1]}) == 1, "columns are aligned"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"fine": ["0"], "a": "pi.*"}, r"groups\['a'\] is the string 'pi.\*': pass a list of names, \['pi.\*'\]"),
        (["a"], "groups is a list: pass a mapping"),
        ("a", "groups is a str: pass a mapping"),
    ],
)
def test_groups_of_other_types(groups, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        normclip.stats([np.ones(2), np.ones(3)], groups=groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["a"]}, "1 names for 2 tensors"),
        ({"groups": {"g": ["nothing"]}}, "group 'g' names 'nothing'"),
        ({"norms": [math.nan]}, "norms is NaN"),
    ],
)
def test_errors(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normclip.stats([np.ones(2), np.ones(3)], **arguments)


def test_same_bits_for_any_number_of_threads(set_threads) -> None:
    tensors = [
        Recipe(dtype, size, library="torch").make() for dtype in ("float16", "bfloat16", "float32", "float64") for size in (7, 300_001)
    ]
    arrays = set()
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        arrays.add(Moments.of(tensors).to_array().tobytes())
    assert len(arrays) == 1


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("weight", ["weight", "weight"]),
        ("fc.weight", ["fc", "fc"]),
        ("transformer.h.10.attn.c_attn.weight", ["transformer", "transformer.h.10", "transformer.h.10.attn"]),
        ("layer1.0.conv1.weight", ["layer1.0", "layer1.0.conv1"]),
        ("0.weight", ["0", "0"]),
        ("0.1.weight", ["0", "0.1"]),
        ("h.0.1.bias", ["h.0", "h.0.1", "h.0.1"]),
        ("layers.0.experts.3.w1.weight", ["layers.0", "layers.0.experts.3", "layers.0.experts.3.w1"]),
        ("a.1x.0.weight", ["a", "a.1x.0"]),
    ],
)
def test_modules_by_depth(name: str, modules: list[str]) -> None:
    assert [module_of(name, depth) for depth in range(1, len(modules) + 1)] == modules


def test_modules_in_place_of_tensors() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2) for name in ("a", "b")})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    rows = normclip.grad_stats(model, per_tensor=True, depth=1)
    assert rows.per_tensor.names == ("a", "b")
    assert rows.per_tensor.l2[1] == normclip.total_norm([p.grad for p in model["b"].parameters()])
    assert rows.top(1)[0][0] in "ab"
    for function in (normclip.grad_stats, lambda *given, **how: normclip.clip_grads_(*given, 1.0, **how)):
        with pytest.raises(ValueError, match="depth is 0: pass 1 or more"):
            function(model, per_tensor=True, depth=0)
        with pytest.raises(ValueError, match="pass per_tensor=True"):
            function(model, depth=1)
