"""What is taken for parameters and is none: a warning at the line of the call, in every function that asks for parameters."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import normclip

WAYS: dict[str, Callable[[Any], object]] = {
    "clip_grad_norm_": lambda given: normclip.clip_grad_norm_(given, 1.0),
    "clip_grads_with_norm_": lambda given: normclip.clip_grads_with_norm_(given, 1.0, 5.0),
    "clip_grad_value_": lambda given: normclip.clip_grad_value_(given, 1.0),
    "clip_grads_": lambda given: normclip.clip_grads_(given, 1.0),
    "grad_stats": normclip.grad_stats,
}


def weight(**given: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2), **given)


@pytest.mark.parametrize("given", [lambda grads: grads, iter, lambda grads: grads[0], tuple], ids=["list", "iterator", "alone", "tuple"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_instead_of_parameters(way: str, given: Callable[[list[torch.Tensor]], Any]) -> None:
    grads = [torch.ones(2), torch.ones(3)]
    with pytest.warns(UserWarning, match="pass parameters, such as model.parameters\\(\\), and not their gradients") as caught:
        WAYS[way](given(grads))
    assert [(warning.filename, len(caught)) for warning in caught] == [(__file__, 1)], "it points to the caller"
    assert torch.equal(grads[0], torch.ones(2))


def test_by_the_name_that_torch_has_for_it() -> None:
    with normclip.patch_torch(), pytest.warns(UserWarning, match="and not their gradients") as caught:
        torch.nn.utils.clip_grad_norm_([torch.ones(2)], 1.0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "made",
    [
        list,
        lambda: [weight()],
        lambda: [weight(requires_grad=False), weight()],
        lambda: [torch.ones(2), weight()],
    ],
    ids=["nothing", "no gradient yet", "partly frozen", "one that may have one"],
)
def test_parameters_without_gradients(made: Callable[[], Any], way: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WAYS[way](made())


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_enough(way: str) -> None:
    parameter = weight(requires_grad=False)
    parameter.grad = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WAYS[way]([parameter, torch.ones(2)])
