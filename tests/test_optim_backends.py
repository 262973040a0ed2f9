"""ClippedSGD where it is refused, without changing anything, and by torch operations, as on a device."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normclip._backends.choose import serving
from normclip._backends.protocol import USUAL, Served
from normclip.optim import ClippedSGD
from normclip.rules import Soft
from support.optim import DTYPES, bits, by_decay, by_dtype, by_momentum, parameters_of, run

# ---- Errors, which change nothing ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"rule": -1.0}, "rule is -1.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClippedSGD(parameters_of(torch.float32), **{"lr": 0.1, "rule": 1.0, **settings})
    if "rule" not in settings:
        optimizer = ClippedSGD(parameters_of(torch.float32), 0.1, 1.0)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **settings})
        assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused() -> None:
    optimizer = ClippedSGD(parameters_of(torch.float32), 0.1, 1.0)
    with pytest.raises(TypeError, match=r"params\[1\] is complex \(torch.complex64\): .*view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def sparse_gradient(parameter: nn.Parameter, optimizer: ClippedSGD) -> None:
    parameter.grad = torch.eye(5, 9).to_sparse()


def expanded(parameter: nn.Parameter, optimizer: ClippedSGD) -> None:
    parameter.data = torch.zeros(9).expand(5, 9)


def shared(parameter: nn.Parameter, optimizer: ClippedSGD) -> None:
    parameter.data = optimizer.param_groups[0]["params"][0].data.flatten()[:45].view(5, 9)


def own_gradient(parameter: nn.Parameter, optimizer: ClippedSGD) -> None:
    parameter.grad = parameter.data


def buffer_of_another_type(parameter: nn.Parameter, optimizer: ClippedSGD) -> None:
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros(5, 9, dtype=torch.float64)


def buffer_of_another_shape(parameter: nn.Parameter, optimizer: ClippedSGD) -> None:
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros(45)


@pytest.mark.parametrize("place", ["rust", "device"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (sparse_gradient, TypeError, r"param_groups\[1\]\['params'\]\[2\]\.grad .* is sparse"),
        (expanded, ValueError, r"param_groups\[1\]\['params'\]\[2\] .* by several indices"),
        (shared, ValueError, r"shares part of its memory with param_groups\[0\]\['params'\]\[0\]"),
        (own_gradient, ValueError, r"\[2\]\.grad .* shares part of its memory with param_groups\[1\]\['params'\]\[2\]"),
        (
            buffer_of_another_type,
            TypeError,
            r"the momentum_buffer of param_groups\[1\]\['params'\]\[2\] \(torch.float64.* differ in element type",
        ),
        (buffer_of_another_shape, ValueError, r"the momentum_buffer of param_groups\[1\].* have different shapes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors_name_the_tensor_and_change_nothing(
    spoil: Any, error: type[Exception], message: str, place: str, request: pytest.FixtureRequest
) -> None:
    if place == "device":
        request.getfixturevalue("on_device")
    first, others = parameters_of(torch.float32)[1], [nn.Parameter(torch.ones(3)), *parameters_of(torch.float32, sizes=((2, 2), (5, 9)))]
    optimizer = ClippedSGD([{"params": [first]}, {"params": others}], 0.1, 1.0, momentum=0.9)
    run(optimizer, range(1))
    others[0].grad = None
    spoil(others[2], optimizer)
    before = bits(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert bits(optimizer) == before
    # Nor does a first step leave empty buffers behind.
    optimizer.state.clear()
    if "buffer" not in spoil.__name__:
        with pytest.raises(error):
            optimizer.step()
        assert not optimizer.state


def test_gradients_may_be_expanded_and_shared() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(3).expand(2, 3)
    ClippedSGD(parameters, 1.0, math.inf).step()
    assert all(parameter.eq(-1.0).all() for parameter in parameters)


# ---- By torch operations, as on a device ----


@pytest.fixture
def on_device() -> Iterator[None]:
    """CPU tensors pass for those of a device, without kernels of ours there."""
    with serving(Served(rust=(), triton=())):
        yield


@by_dtype
@by_momentum
@by_decay
def test_torch_operations_do_the_same(on_device: None, dtype: torch.dtype, momentum: float, nesterov: bool, weight_decay: float) -> None:
    settings = {"lr": 0.1, "rule": Soft(1.0), "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    device, rust = (ClippedSGD(parameters_of(dtype, "transposed"), **settings) for _ in range(2))
    run(device, range(5))
    with serving(USUAL):
        run(rust, range(5))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(device.param_groups[0]["params"], rust.param_groups[0]["params"], rtol=8 * eps, atol=8 * eps)
    assert float(device.last_norm) == pytest.approx(rust.last_norm, rel=1e-12)
    assert float(device.last_coefficient) == pytest.approx(rust.last_coefficient, rel=1e-12)
    assert isinstance(device.last_norm, Tensor)
    assert isinstance(rust.last_norm, float)


def test_mixed_types_by_torch_operations(on_device: None) -> None:
    parameters = [parameter for dtype in DTYPES for parameter in parameters_of(dtype)]
    before = [parameter.detach().double().clone() for parameter in parameters]
    optimizer = ClippedSGD(parameters, 1.0, 1.0)
    run(optimizer, range(1))
    for parameter, x in zip(parameters, before, strict=True):
        eps = torch.finfo(parameter.dtype).eps
        torch.testing.assert_close(
            parameter.double(), x - float(optimizer.last_coefficient) * parameter.grad.double(), rtol=2 * eps, atol=2 * eps
        )
