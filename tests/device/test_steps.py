"""Optimizer steps on device tensors, against those that Rust takes."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normclip._backends.choose import serving
from normclip._backends.protocol import USUAL
from normclip.optim import ClippedAdamW, ClippedSGD
from normclip.rules import Formula, Hard, Least, Soft
from normclip.thresholds import AutoClip
from support.optim import parameters

from .conftest import CHUNK, INTERPRETED
from .tensors import DTYPES, SIZES, Place, assert_same, by_dtype, make

# The interpreter computes in NumPy, which warns of overflow, where a device has none.
# That of Triton 3.6 makes numbers of arrays, of which NumPy warns before 2.4 refuses it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@dataclass(frozen=True)
class Constant(Formula):
    """The same coefficient for every norm, of which devices and Rust may have other last bits."""

    number: float

    def formula(self, xp: Any, n: Any) -> Any:
        return xp.full_like(n, self.number)


Maker = Callable[..., Any]
MAKERS: dict[str, Maker] = {
    "SGD": lambda params: ClippedSGD(params, 0.3, Constant(0.37)),
    "SGD of decay": lambda params: ClippedSGD(params, 0.3, Constant(0.37), weight_decay=0.1, maximize=True),
    "momentum": lambda params: ClippedSGD(params, 0.3, Constant(0.37), momentum=0.9, dampening=0.3, weight_decay=0.1),
    "Nesterov": lambda params: ClippedSGD(params, 0.3, Constant(0.37), momentum=0.9, nesterov=True, maximize=True),
    "AdamW": lambda params: ClippedAdamW(params, 0.3, rule=Constant(0.37), weight_decay=0.1),
    "AMSGrad": lambda params: ClippedAdamW(params, 0.3, (0.8, 0.9), 1e-3, rule=Constant(0.37), amsgrad=True, maximize=True),
    "wide states": lambda params: ClippedAdamW(params, 0.3, rule=Constant(0.37), state_dtype=torch.float32),
    "wide AMSGrad": lambda params: ClippedAdamW(params, 0.3, rule=Constant(0.37), amsgrad=True, state_dtype=torch.float32),
}
by_maker = pytest.mark.parametrize("maker", MAKERS.values(), ids=list(MAKERS))


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["place"] == "torch":
        pytest.skip("plain torch rounds by itself, and asks its device")


def values(optimizer: Any) -> list[Tensor]:
    """Parameters, each with its states."""
    found = []
    for parameter in parameters(optimizer):
        found += [parameter.detach(), *(state for state in optimizer.state.get(parameter, {}).values() if state is not None)]
    return found


def set_gradients(optimizer: Any, seed: int, at: Place) -> None:
    for index, parameter in enumerate(parameters(optimizer)):
        parameter.grad = at(make(parameter.dtype, parameter.numel(), 100 * seed + index).view(parameter.shape))


def follow(device: Any, rust: Any) -> None:
    """Give the one on the device the parameters and states of the other."""
    device.load_state_dict(copy.deepcopy(rust.state_dict()))
    with torch.no_grad():
        for x, y in zip(parameters(device), parameters(rust), strict=True):
            x.copy_(y)


def pair(place: Place, maker: Maker, tensors: list[Tensor]) -> tuple[Any, Any]:
    return maker([nn.Parameter(place(tensor.clone())) for tensor in tensors]), maker([nn.Parameter(tensor.clone()) for tensor in tensors])


def check_alike(
    device: Any, rust: Any, steps: int, place: Place, check: Callable[[list[Tensor], list[Tensor]], None] = assert_same
) -> None:
    """Step by step, each from what Rust had before."""
    for seed in range(steps):
        follow(device, rust)
        set_gradients(device, seed, place)
        set_gradients(rust, seed, lambda tensor: tensor)
        device.step()
        with serving(USUAL):
            rust.step()
        check(values(device), values(rust))


def within(rtol: float, atol: float, *, equal_nan: bool = False) -> Callable[[list[Tensor], list[Tensor]], None]:
    """A check that device tensors are this close to those that Rust has."""

    def check(found: list[Tensor], expected: list[Tensor]) -> None:
        torch.testing.assert_close([x.cpu() for x in found], expected, rtol=rtol, atol=atol, equal_nan=equal_nan)

    return check


# ---- The formulas ----


@by_dtype
@by_maker
def test_a_step_has_the_bits_of_the_cpu(place: Place, kernels: None, maker: Maker, dtype: torch.dtype) -> None:
    device, rust = pair(place, maker, [make(dtype, size) for size in SIZES])
    if dtype == torch.float32 and isinstance(device, ClippedSGD):
        # Rust computes these in float64. The terms of a sum come to less than 8 here, of which 8 · 2^-24 is the bound.
        check_alike(device, rust, 2, place, within(rtol=0.0, atol=2.0**-18))
    else:
        check_alike(device, rust, 2, place)


@by_maker
def test_special_values_spread_as_on_the_cpu(place: Place, kernels: None, maker: Maker) -> None:
    tensor = torch.tensor([0.0, 1.0, math.inf, -math.inf, math.nan, 2.0, -0.0, 1e-42])
    device, rust = pair(place, maker, [tensor, tensor.double()])
    for seed in range(2):
        follow(device, rust)
        for optimizer, at in ((device, place), (rust, lambda given: given)):
            for parameter in parameters(optimizer):
                # A NaN makes the norm NaN, and all parameters, so it comes last.
                gradient = tensor.roll(1) if seed else tensor.roll(1).nan_to_num(3.0, math.inf, -math.inf)
                parameter.grad = at(gradient.to(parameter.dtype))
        device.step()
        with serving(USUAL):
            rust.step()
        within(rtol=2**-22, atol=0.0, equal_nan=True)(values(device), values(rust))


@pytest.mark.parametrize("maker", [MAKERS["momentum"], MAKERS["AdamW"]], ids=["momentum", "AdamW"])
def test_groups_and_steps_of_their_own_share_a_launch(place: Place, kernels: None, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    from normclip._backends import cuda_steps

    launched = []
    monkeypatch.setattr(
        cuda_steps,
        "launch",
        lambda kernel, *args, launch=cuda_steps.launch, **options: launched.append(1) or launch(kernel, *args, **options),
    )
    tensors = [make(torch.float64, size) for size in (5, CHUNK + 1, 3)]

    def grouped(at: Place) -> Any:
        models = [nn.Parameter(at(tensor.clone())) for tensor in tensors]
        optimizer = maker([{"params": models[:1], "lr": 0.2, "weight_decay": 0.0}, {"params": models[1:], "lr": 0.7}])
        for model in models[:2]:
            model.grad = at(torch.ones_like(model, device="cpu"))
        optimizer.step()  # the last has taken a step less from here on
        return optimizer

    device = grouped(place)
    with serving(USUAL):
        rust = grouped(lambda tensor: tensor)
    del launched[:]
    check_alike(device, rust, 2, place)
    assert launched == [1, 1]


# ---- Where tensors lie ----

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "off the border of a vector": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "negative": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize(
    ("maker", "dtype"), [(MAKERS["Nesterov"], torch.float64), (MAKERS["wide states"], torch.float16)], ids=["Nesterov", "AdamW"]
)
@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("parameter", ["plain", "transposed", "columns", "off the border of a vector"])
def test_any_layout(place: Place, kernels: None, maker: Maker, dtype: torch.dtype, parameter: str, gradient: str) -> None:
    if gradient == "negative" and dtype == torch.float16:
        pytest.skip("a view that negates is of complex numbers, of which float16 has none on the CPU")
    x = LAYOUTS.get(parameter, lambda tensor: tensor)(make(dtype, 7 * (CHUNK // 4)).view(7, -1))
    device, rust = maker([nn.Parameter(place(x))]), maker([nn.Parameter(x.clone())])
    for seed in range(2):
        g = LAYOUTS[gradient](make(dtype, x.numel(), seed).view(x.shape))
        parameters(device)[0].grad, parameters(rust)[0].grad = (place(g) if INTERPRETED else g.cuda()), g
        device.step()
        with serving(USUAL):
            rust.step()
    assert_same(values(device), values(rust))


def test_what_lies_beside_a_parameter_stays(place: Place, kernels: None) -> None:
    memory = place(torch.zeros(4, 2 * CHUNK))
    parameter = nn.Parameter(memory[1:3, 3 : CHUNK + 5])
    parameter.grad = place(torch.ones(2, CHUNK + 2))
    optimizer = ClippedSGD([parameter], 1.0, math.inf, momentum=0.9)
    optimizer.step()
    assert parameter.eq(-1.0).all()
    assert memory.sum().item() == -float(parameter.numel())


def test_versions_rise_by_what_is_written(place: Place) -> None:
    parameter = nn.Parameter(place(torch.ones(CHUNK + 3)))
    parameter.grad = place(torch.ones(CHUNK + 3))
    optimizer = ClippedAdamW([parameter], rule=1.0)
    for _ in range(2):
        optimizer.step()
    watched = [parameter, parameter.grad, *optimizer.state[parameter].values()]
    before = [tensor._version for tensor in watched]
    optimizer.step()
    assert [tensor._version > old for tensor, old in zip(watched, before, strict=True)] == [True, False, True, True, True]


# ---- Nothing waits ----


@contextmanager
def host_asks_nothing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for read in ("item", "tolist", "numpy", "__float__", "__bool__", "__int__"):
            patch.setattr(Tensor, read, lambda *_: pytest.fail("the host has asked for a number"))
        yield


def scaled(optimizer: Any, place: Place, found_inf: float = 0.0) -> None:
    """What GradScaler gives a fused optimizer."""
    optimizer.grad_scale, optimizer.found_inf = (place(torch.tensor(number)) for number in (8.0, found_inf))


@by_maker
@pytest.mark.parametrize("limit", [None, 0.01], ids=["free", "limited"])
def test_a_scaled_step_asks_the_device_for_nothing(place: Place, kernels: None, maker: Maker, limit: float | None) -> None:
    device, rust = pair(place, maker, [make(torch.float64, size) for size in (CHUNK + 3, 7)])
    device.descent_limit = rust.descent_limit = limit
    for seed in range(3):
        set_gradients(device, seed, lambda tensor: place(8.0 * tensor))
        set_gradients(rust, seed, lambda tensor: tensor)
        scaled(device, place)
        if seed == 0:
            device.step()  # new states are kept only if the step was taken, so this one waits
        else:
            with host_asks_nothing():
                device.step()
        with serving(USUAL):
            rust.step()
    within(rtol=1e-13, atol=1e-15)(values(device), values(rust))
    assert float(device.last_coefficient) == 0.37


def test_rules_without_a_memory_ask_the_device_for_nothing(place: Place, kernels: None) -> None:
    optimizer = ClippedAdamW([nn.Parameter(place(torch.ones(3)))], rule=Least(0.5, Soft(2.0)))
    for seed in range(2):
        set_gradients(optimizer, seed, place)
        with host_asks_nothing():
            optimizer.step()
    assert 0.0 < float(optimizer.last_coefficient) < 1.0


@by_maker
@pytest.mark.parametrize("bad", ["found_inf", "a gradient"])
@pytest.mark.parametrize("limit", [None, 0.01], ids=["free", "limited"])
def test_the_device_skips_a_step(place: Place, kernels: None, maker: Maker, bad: str, limit: float | None) -> None:
    device, _ = pair(place, maker, [make(torch.float32, size) for size in (CHUNK + 3, 7)])
    device.update_rms_limit = limit
    for seed in range(2):
        set_gradients(device, seed, place)
        device.step()
    device.rule = Hard(0.5)
    before = [value.clone() for value in values(device)]
    scaled(device, place, found_inf=float(bad == "found_inf"))
    if bad == "a gradient":
        parameters(device)[1].grad[3] = math.inf
    with host_asks_nothing():
        device.step()
    for value, old in zip(values(device), before, strict=True):
        assert torch.equal(value, old)
    assert float(device.last_coefficient) == 0.0
    parameters(device)[1].grad[3] = 1.0
    scaled(device, place)
    device.step()
    assert not torch.equal(values(device)[0], before[0])


def test_a_rule_that_records_norms_is_not_asked_about_a_skipped_step(place: Place) -> None:
    optimizer = ClippedAdamW([nn.Parameter(place(torch.ones(3)))], rule=AutoClip())
    for _ in range(2):
        set_gradients(optimizer, 0, place)
        optimizer.step()
    noted = optimizer.rule.state_dict()
    scaled(optimizer, place, found_inf=1.0)
    optimizer.step()
    assert optimizer.rule.state_dict() == noted


# ---- Limits and checkpoints ----


def test_limits_shorten_steps(place: Place) -> None:
    for maker in (MAKERS["Nesterov"], MAKERS["AdamW"]):
        device, rust = pair(place, maker, [make(torch.float64, size) for size in (CHUNK + 3, 7)])
        for optimizer in (device, rust):
            optimizer.descent_limit, optimizer.update_rms_limit = 0.5, 0.3
        check_alike(device, rust, 2, place, within(rtol=1e-9, atol=1e-12))
        assert float(device.last_descent) == pytest.approx(rust.last_descent, rel=1e-9)


@by_maker
@pytest.mark.parametrize(("descent_limit", "update_rms_limit"), [(0.5, 0.3), (1e6, None)])
def test_limits_on_two_types_at_once(place: Place, maker: Maker, descent_limit: float | None, update_rms_limit: float | None) -> None:
    tensors = [make(dtype, size) for dtype in (torch.float64, torch.float32) for size in (7, 3 * CHUNK + 3)]
    device, rust = pair(place, maker, [tensors[0], torch.ones(0), *tensors[1:]])
    for optimizer in (device, rust):
        optimizer.descent_limit, optimizer.update_rms_limit = descent_limit, update_rms_limit
    # Rust computes gradient descent of float32 in float64.
    check_alike(device, rust, 2, place, within(rtol=2**-22, atol=2**-18))
    assert float(device.last_descent) == pytest.approx(rust.last_descent, rel=1e-6)
    assert [float(size) for size in device.last_update_rms] == pytest.approx(rust.last_update_rms, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_limits_have_the_digits_of_the_cpu(place: Place, kernels: None, dtype: torch.dtype) -> None:
    device, rust = pair(place, MAKERS["wide AMSGrad"], [make(dtype, size) for size in (7, 0, 3 * CHUNK + 3)])
    for optimizer in (device, rust):
        optimizer.descent_limit, optimizer.update_rms_limit = 0.5, 0.3
    check_alike(device, rust, 2, place, within(rtol=1e-12, atol=1e-15))
    assert float(device.last_descent) == pytest.approx(rust.last_descent, rel=1e-12)
    assert [float(size) for size in device.last_update_rms] == pytest.approx(rust.last_update_rms, rel=1e-12)


def test_nan_limits_nothing(place: Place) -> None:
    device, rust = pair(place, MAKERS["AdamW"], [torch.ones(3), torch.ones(2)])
    for optimizer in (device, rust):
        optimizer.descent_limit = optimizer.update_rms_limit = 0.01
    for optimizer, at in ((device, place), (rust, lambda tensor: tensor)):
        for parameter, number in zip(parameters(optimizer), (1.0, math.nan), strict=True):
            parameter.grad = at(torch.full_like(parameter, number, device="cpu"))
        with serving(USUAL) if optimizer is rust else nullcontext():
            optimizer.step()
    within(rtol=1.3e-6, atol=1e-5, equal_nan=True)(values(device), values(rust))
    assert math.isnan(float(device.last_descent))
    assert [float(size) for size in device.last_update_rms] == pytest.approx(rust.last_update_rms, rel=1e-6, nan_ok=True)


def test_torchs_optimizer_goes_on_from_here_and_back(place: Place) -> None:
    ours = ClippedAdamW([nn.Parameter(place(make(torch.float32, 9)))], 0.1, rule=math.inf)
    theirs = torch.optim.AdamW([nn.Parameter(place(make(torch.float32, 9)))], 0.1)
    for step in range(6):
        if step == 2:
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
            with torch.no_grad():
                parameters(theirs)[0].copy_(parameters(ours)[0])
        if step == 4:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for optimizer in (ours, theirs):
            set_gradients(optimizer, step, place)
            optimizer.step()
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-5, atol=1e-6)


def test_every_element_type_at_once(place: Place) -> None:
    models = [nn.Parameter(place(make(dtype, CHUNK + 5))) for dtype in DTYPES]
    before = [model.detach().double().cpu().clone() for model in models]
    optimizer = ClippedSGD(models, 1.0, Constant(0.5))
    set_gradients(optimizer, 0, place)
    optimizer.step()
    for model, x in zip(models, before, strict=True):
        eps = torch.finfo(model.dtype).eps
        torch.testing.assert_close(model.detach().double().cpu(), x - 0.5 * model.grad.double().cpu(), rtol=2 * eps, atol=4 * eps)
