"""No setting of the calling thread changes a result: neither the flushing of subnormal numbers nor the direction of rounding."""

import ctypes
import ctypes.util
import math
import platform
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import normclip
from normclip import Moments, _core, rules
from normclip.optim import ClippedAdamW, ClippedSGD
from normclip.thresholds import AdaGN, AutoClip, ZClip
from support.tensors import raw

# Rounding directions by the numbers that the C library has for them.
ROUNDINGS = {
    "x86_64": {"down": 0x400, "up": 0x800, "to zero": 0xC00},
    "aarch64": {"down": 0x800000, "up": 0x400000, "to zero": 0xC00000},
}.get(platform.machine(), {})

# Subnormal in float64, and in float32; then ordinary numbers whose sums and quotients are rounded.
TINY = [1e-310, 2e-310, -3e-310, 0.0]
SINGLE = [1e-40, 2e-40, -3e-40, 0.0]
PLAIN = [0.1, -0.7, 1 / 3, 1e-9]


@contextmanager
def mode(name: str) -> Iterator[None]:
    """A mode of this thread, for as long as it takes."""
    if name == "flush":
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU does not flush denormal numbers")
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
        return
    if name not in ROUNDINGS:
        pytest.skip("the numbers of this machine's rounding directions are not known here")
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    nearest = library.fegetround()
    assert library.fesetround(ROUNDINGS[name]) == 0
    try:
        yield
    finally:
        library.fesetround(nearest)


# Made before any mode is set: to round them is arithmetic, too.
ARRAYS = (
    np.array(TINY),
    np.array(SINGLE, np.float32),
    np.array(PLAIN),
    np.array(PLAIN, np.float32),
    np.array(PLAIN, np.float16),
    np.array([1.0, 2.0**-53, 2.0**-105, 3.0]),
)
BFLOATS = torch.tensor(PLAIN).to(torch.bfloat16)
NORMS = (1e-310, 3e-310, 1e-5, 0.7, 3.0, 1e300, math.inf, *map(np.float32, (1e-40, 0.7, 3.0)))


def arrays() -> list[np.ndarray]:
    return [array.copy() for array in ARRAYS]


def tensors() -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays()] + [BFLOATS.clone()]


def parameters() -> list[torch.nn.Parameter]:
    made = []
    for tensor in tensors():
        parameter = torch.nn.Parameter(torch.zeros_like(tensor))
        parameter.grad = tensor
        made.append(parameter)
    return made


def each(measure: Callable[[Any], Any]) -> Callable[[], Any]:
    """Of every array and tensor by itself."""
    return lambda: [measure(given) for given in arrays() + tensors()]


def changed(change: Callable[[Any], Any]) -> Callable[[], Any]:
    """What comes of every array, tensor and the gradient of every parameter."""
    return each(lambda given: (change(given), given))


def stepped(**settings: Any) -> Callable[[], Any]:
    def step() -> Any:
        groups = [[parameter] for parameter in parameters()]
        for group in groups:
            ClippedSGD(group, 0.3, 1e-310, momentum=0.9, **settings).step()
        return groups

    return step


def stepped_adamw(**settings: Any) -> Callable[[], Any]:
    def step() -> Any:
        optimizers = [ClippedAdamW([parameter], 0.3, rule=1e-310, eps=1e-300, **settings) for parameter in parameters()]
        for optimizer in optimizers:
            optimizer.step()
        return [list(optimizer.state.values()) + optimizer.param_groups[0]["params"] for optimizer in optimizers]

    return step


def of_gradients(call: Callable[[Any], Any]) -> Callable[[], Any]:
    def measured() -> Any:
        found = []
        for parameter in parameters():
            found += [call([parameter]), parameter.grad]
        return found

    return measured


def moments() -> list[Moments]:
    return [Moments.of(array) for array in arrays()]


CALLS: dict[str, Callable[[], Any]] = {
    **{f"total_norm, order {order}": each(lambda x, order=order: normclip.total_norm(x, order)) for order in (2, 1, 3, 4, 0.5, -1, 0)},
    "total_norm, order inf": each(lambda x: normclip.total_norm(x, math.inf)),
    "get_total_norm": each(lambda x: normclip.get_total_norm([torch.as_tensor(x)])),
    "stats": each(lambda x: normclip.stats(x, per_tensor=True, norms=[3], groups=lambda _: "all")),
    "grad_stats": of_gradients(normclip.grad_stats),
    "Moments.of": moments,
    "Moments, merged": lambda: [a + b for a in moments() for b in moments()],
    "Moments.from_array": lambda: [Moments.from_array(each.to_array()) for each in moments()],
    "Moments, compared": lambda: [(a == b, hash(a) == hash(b)) for a in moments() for b in moments()],
    "Moments, printed": lambda: str(Moments.of(np.array(PLAIN))),
    "dot": lambda: [normclip.dot(x, y) for x in arrays() for y in arrays() if x.shape == y.shape],
    "dot_stats": lambda: [normclip.dot_stats(x, y) for x in arrays() for y in arrays()],
    "clip_": changed(lambda x: normclip.clip_(x, 1e-310)),
    "clip_ by a ratio": changed(lambda x: normclip.clip_(x, 0.3)),
    "scale_": changed(lambda x: normclip.scale_(x, 0.3)),
    "scale_ by little": changed(lambda x: normclip.scale_(x, 1e-310)),
    "clamp_": changed(lambda x: normclip.clamp_(x, 1.5e-310)),
    "clip_grad_norm_": of_gradients(lambda ps: normclip.clip_grad_norm_(ps, 0.3)),
    "clip_grad_norm_ by a rule": of_gradients(lambda ps: normclip.clip_grad_norm_(ps, rule=rules.Soft(0.3))),
    "clip_grads_with_norm_": of_gradients(lambda ps: normclip.clip_grads_with_norm_(ps, 0.3, 0.7)),
    "clip_grad_value_": of_gradients(lambda ps: normclip.clip_grad_value_(ps, 1.5e-310)),
    "clip_grads_": of_gradients(lambda ps: normclip.clip_grads_(ps, 1e-310)),
    "clip_grads_ by groups": of_gradients(lambda ps: normclip.clip_grads_(ps, limits={"a": 1e-310}, groups=lambda _: "a")),
    "ClippedSGD": stepped(),
    "ClippedSGD of Nesterov": stepped(nesterov=True, weight_decay=0.01),
    "ClippedSGD within limits": stepped(descent_limit=1e-310, update_rms_limit=1e-310),
    "ClippedAdamW": stepped_adamw(),
    "ClippedAdamW within limits": stepped_adamw(amsgrad=True, descent_limit=1e-310, update_rms_limit=1e-310),
    **{
        f"{rule}": lambda rule=rule: [number for n in NORMS for number in (rule.coefficient(n), rule.multiplier(n))]
        for rule in (
            rules.Hard(1e-310),
            rules.Hard(0.3),
            rules.Soft(0.3),
            rules.Normalize(0.3),
            rules.Normalize(0.3, 0.1),
            rules.Smoothness(0.3, 0.7, 0.1),
            rules.Smoothness(0.3, 0.7, 0.1, exact=True),
            rules.DescentLimit(0.3),
        )
    },
}


def bits(found: Any) -> Any:
    """Numbers as their bits: to compare or to print them is arithmetic."""
    if isinstance(found, float):
        return struct.pack("d", found)
    if isinstance(found, (torch.Tensor, np.ndarray, np.generic)):
        return raw(found) if not isinstance(found, np.generic) else found.tobytes()
    if isinstance(found, Moments):
        names = ("count", "zeros", "nans", "infs", "l1", "l2", "linf", "rms", "mean_abs", "sign_cosine", "density")
        return [bits(getattr(found, name)) for name in names] + [found.to_array().tobytes()]
    if isinstance(found, dict):
        return {key: bits(value) for key, value in found.items() if key != "norms"} | {"norms": bits([*found.get("norms", {}).values()])}
    if isinstance(found, (list, tuple)):
        return [bits(item) for item in found]
    if hasattr(found, "__dataclass_fields__"):
        return bits({name: getattr(found, name) for name in found.__dataclass_fields__})
    return found


def test_nothing_public_is_missing() -> None:
    """Every function of the package that computes is in the table."""
    named = " ".join(CALLS)
    silent = {"set_num_threads", "get_num_threads", "patch_torch"}
    functions = {name for name in normclip.__all__ if name.islower() and callable(getattr(normclip, name))}
    assert {name for name in functions - silent if name not in named} == set()


@pytest.mark.parametrize("name", ["flush", "down", "up", "to zero"])
def test_results_in_every_mode(name: str) -> None:
    expected = {call: bits(compute()) for call, compute in CALLS.items()}
    found = {}
    with mode(name):
        ready = SimpleNamespace(third=np.float64(1.0) / np.float64(3.0), half=torch.tensor([1e-310], dtype=torch.float64) * 0.5)
        for call, compute in CALLS.items():
            found[call] = bits(compute())
    assert {call for call in CALLS if found[call] != expected[call]} == set()
    # The mode was on, and no call has left it off.
    if name == "flush":
        assert raw(ready.half) == bytes(8)
    else:
        assert (ready.third.tobytes() != np.float64(1 / 3).tobytes()) == (name == "up")


@pytest.mark.parametrize("name", ["flush", "up"])
def test_subnormal_gradients_are_clipped(name: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([1e-310, 2e-310], dtype=torch.float64)
    with mode(name):
        normclip.clip_grads_([parameter], 1e-310)
    assert parameter.grad.tolist() == pytest.approx([1e-310 / math.sqrt(5), 2e-310 / math.sqrt(5)], rel=1e-12, abs=0.0)


def test_the_mode_comes_back_when_a_call_fails() -> None:
    def fail() -> None:
        raise RuntimeError("as expected")

    half = torch.tensor([1e-310], dtype=torch.float64)
    with mode("flush"):
        with pytest.raises(RuntimeError, match="as expected"):
            _core.strictly(fail)
        halved = half * 0.5
    assert raw(halved) == bytes(8)


def test_numbers_that_flushing_would_take_for_zero_are_positive() -> None:
    with mode("flush"):
        rule = rules.Normalize(1e-310)
        with pytest.raises(ValueError, match="positive"):
            rules.Normalize(0.0)
    assert rule == rules.Normalize(1e-310)


@pytest.mark.parametrize("name", ["flush", *ROUNDINGS])
@pytest.mark.parametrize(
    "make", [lambda: AutoClip(30.0, window=4), lambda: ZClip(alpha=0.9, z=0.5, warmup=3), AdaGN], ids=["AutoClip", "ZClip", "AdaGN"]
)
def test_what_thresholds_remember(make: Callable[[], Any], name: str) -> None:
    norms = [0.1, 0.7, 1 / 3, 1e-310, 3.3, 0.2, 7.7]
    rule, twin = make(), make()
    expected = [rule.multiplier(norm) for norm in norms]
    with mode(name):
        found = [twin.multiplier(norm) for norm in norms]
    assert [struct.pack("d", each) for each in found] == [struct.pack("d", each) for each in expected]
    assert repr(twin.state_dict()) == repr(rule.state_dict())
