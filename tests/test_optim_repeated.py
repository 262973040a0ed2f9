"""Optimizers whose tensors and settings change between steps: what was checked for the same tensors is not checked again, and only that."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from normclip.optim import ClippedAdamW, ClippedSGD
from support.optim import bits, parameters_of, run

MAKERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "SGD": lambda parameters: ClippedSGD(parameters, 0.1, 1.0, momentum=0.9),
    "AdamW": lambda parameters: ClippedAdamW(parameters, 0.1, rule=1.0),
}
by_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


def other_memory(optimizer: Any, first: nn.Parameter) -> None:
    first.data = first.data.clone()


def other_layout(optimizer: Any, first: nn.Parameter) -> None:
    first.data = first.data.t().contiguous().t()


def other_states(optimizer: Any, first: nn.Parameter) -> None:
    for name, state in optimizer.state[first].items():
        optimizer.state[first][name] = state.clone()


def other_dict(optimizer: Any, first: nn.Parameter) -> None:
    optimizer.state[first] = {name: state.clone() for name, state in optimizer.state[first].items()}


def frozen(optimizer: Any, first: nn.Parameter) -> None:
    first.requires_grad_(False)


def reordered(optimizer: Any, first: nn.Parameter) -> None:
    optimizer.param_groups[0]["params"].reverse()


def number_for_number(optimizer: Any, first: nn.Parameter) -> None:
    optimizer.param_groups[0]["lr"] = float("0.1")


def its_own_state(optimizer: Any, first: nn.Parameter) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@by_maker
@pytest.mark.parametrize(
    "change",
    [other_memory, other_layout, other_states, other_dict, frozen, reordered, number_for_number, its_own_state],
    ids=lambda change: change.__name__,
)
def test_changes_that_make_no_difference(make: Any, change: Any) -> None:
    changed, same = make(parameters_of(torch.float32)), make(parameters_of(torch.float32))
    order = list(changed.param_groups[0]["params"])
    for optimizer in (changed, same):
        run(optimizer, range(3))
    old = order[0].data
    before = old.clone()
    change(changed, order[0])
    for step in range(3, 6):
        for optimizer in (changed, same):
            gradients = torch.Generator().manual_seed(step)
            listed = order if optimizer is changed else optimizer.param_groups[0]["params"]
            for parameter in listed:
                parameter.grad = torch.randn(parameter.shape, generator=gradients)
            optimizer.step()
    for ours, theirs in zip(order, same.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours.data, theirs.data, rtol=0.0, atol=0.0)
    if change in (other_memory, other_layout):
        assert torch.equal(old, before), "the old memory is left alone"


@by_maker
def test_gradients_that_come_and_go(make: Any) -> None:
    optimizer = make(parameters_of(torch.float32))
    run(optimizer, range(2))
    first, second = optimizer.param_groups[0]["params"]
    before = first.detach().clone(), second.detach().clone()
    first.grad = None
    optimizer.step()
    assert torch.equal(first, before[0])
    assert not torch.equal(second, before[1])
    assert optimizer.last_norm == pytest.approx(second.grad.norm().item(), rel=1e-6)
    run(optimizer, range(2, 3))
    assert not torch.equal(first, before[0])


@by_maker
def test_groups_that_are_added_and_settings_that_change(make: Any) -> None:
    optimizer = make(parameters_of(torch.float32))
    run(optimizer, range(2))
    added = nn.Parameter(torch.zeros(4))
    optimizer.add_param_group({"params": [added], "lr": 1.0})
    run(optimizer, range(2, 3))
    assert added.abs().max() > 0.0
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.param_groups[1]["weight_decay"] = 0.0
    before = added.detach().clone()
    run(optimizer, range(3, 4))
    assert torch.equal(added, before)
    lr = optimizer.param_groups[1]["lr"] = torch.tensor(0.0)
    run(optimizer, range(4, 5))
    assert torch.equal(added, before)
    lr += 1.0  # in place: the same object
    run(optimizer, range(5, 6))
    assert not torch.equal(added, before)
    del optimizer.param_groups[1]
    before = added.detach().clone()
    run(optimizer, range(6, 7))
    assert torch.equal(added, before)


def wrong_type(optimizer: Any, first: nn.Parameter) -> None:
    first.data = first.data.double()


def shared_gradient(optimizer: Any, first: nn.Parameter) -> None:
    first.grad = first.data


def expanded(optimizer: Any, first: nn.Parameter) -> None:
    first.data = torch.zeros(9).expand(5, 9)


def shared_parameter(optimizer: Any, first: nn.Parameter) -> None:
    first.data = optimizer.param_groups[0]["params"][1].data.flatten()[:45].view(5, 9)


def wrong_setting(optimizer: Any, first: nn.Parameter) -> None:
    optimizer.param_groups[0]["lr"] = -1.0


def nan_setting(optimizer: Any, first: nn.Parameter) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(math.nan)


@by_maker
@pytest.mark.parametrize(
    "spoil", [wrong_type, shared_gradient, expanded, shared_parameter, wrong_setting, nan_setting], ids=lambda spoil: spoil.__name__
)
def test_faults_that_come_later_are_found(make: Any, spoil: Any) -> None:
    optimizer = make(parameters_of(torch.float32))
    run(optimizer, range(3))
    spoil(optimizer, optimizer.param_groups[0]["params"][0])
    before = bits(optimizer)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"param_groups\[0\]"):
            optimizer.step()
    assert bits(optimizer) == before


@by_maker
def test_a_negated_gradient_in_the_same_memory(make: Any) -> None:
    """The flag is not to be seen in memory."""
    optimizer, twin = (make([nn.Parameter(torch.tensor([1.0]))]) for _ in range(2))
    (parameter,), (other,) = (each.param_groups[0]["params"] for each in (optimizer, twin))
    whole = torch.complex(torch.zeros(1), torch.tensor([2.0]))
    for gradient in (whole.imag, whole.conj().imag):
        parameter.grad = gradient
        other.grad = gradient.resolve_neg().clone()
        optimizer.step()
        twin.step()
    assert whole.conj().imag.is_neg()
    assert torch.equal(parameter, other)


@by_maker
def test_gradients_are_not_kept_alive(make: Any) -> None:
    import weakref

    optimizer = make(parameters_of(torch.float32))
    run(optimizer, range(2))
    kept = [weakref.ref(parameter.grad) for parameter in optimizer.param_groups[0]["params"]]
    optimizer.zero_grad()
    assert [each() for each in kept] == [None, None]
