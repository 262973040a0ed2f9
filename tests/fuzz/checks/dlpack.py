"""Producers of DLPack that break the rules in ways that can be found out: refused, with no byte written."""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import normclip
from fuzz import oracles
from fuzz.draw import Draw
from fuzz.registry import check, expect, expect_refusal, off_by_1e9, swallow
from support.capsules import Producer

TYPES = {"float16": (2, 16, 1), "float32": (2, 32, 1), "float64": (2, 64, 1), "complex64": (5, 64, 1), "complex128": (5, 128, 1)}
READ_ONLY, IS_COPIED = 1, 2


@check("DLPack", weight=8, plants={"total_norm": off_by_1e9, "scale_": lambda function: lambda *arguments: None})
def producers(draw: Draw) -> None:
    """Producers that keep the rules, of every version and layout within their memory."""
    dtype = draw.pick(list(TYPES))
    with np.errstate(all="ignore"):
        memory = draw.rng.standard_normal(64).astype(dtype)
    shape = tuple(draw.pick([0, 1, 2, 2, 3, 4]) for _ in range(draw.pick([0, 1, 1, 2, 3])))
    unit = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    strides = tuple(stride * draw.pick([1, 1, -1]) for stride in unit)
    if any(stride <= 0 for stride in strides) and not all(shape):
        strides = tuple(unit)
    back = -sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True) if stride < 0) if all(shape) else 0
    given = None if strides == tuple(unit) and draw.chance(0.5) else strides
    size = np.dtype(dtype).itemsize
    view = (
        np.ndarray(shape, dtype, memory, back * size, tuple(stride * size for stride in strides)) if all(shape) else np.empty(shape, dtype)
    )
    version = draw.pick([None, (1, 0), (1, 1), (1, 9)])
    flags = 0 if version is None else draw.pick([0, 0, READ_ONLY])
    settings: dict[str, Any] = {"dtype": TYPES[dtype], "byte_offset": back * size, "device": draw.pick([(1, 0), (3, 0)])}
    producer = Producer(
        memory, shape=shape, strides=given, version=version, flags=flags, data=bool(view.size) or draw.chance(0.5), **settings
    )
    exact = oracles.exact_norm([view])
    found = draw.call(normclip.total_norm, [producer])
    expect(oracles.near(found, exact), f"the norm of {view!r} from a capsule is {found!r}, not {exact!r}")
    before, expected = memory.tobytes(), memory.copy()
    if version is None or flags:
        expect_refusal("to write to what is read-only", lambda: draw.call(normclip.scale_, [producer], 0.5))
        expect(memory.tobytes() == before, "it was refused, and has changed")
        return
    draw.call(normclip.scale_, [producer], 0.5)
    if view.size:
        np.ndarray(shape, dtype, expected, back * size, tuple(stride * size for stride in strides))[...] *= expected.dtype.type(0.5)
    expect(memory.tobytes() == expected.tobytes(), f"{shape} {strides} of {before!r} times 0.5 is {memory.tobytes()!r}")


class _Bent(Producer):
    """A producer whose tensor is described wrongly after all."""

    def bend(self, change: Callable[[Any], None]) -> "_Bent":
        for tensor in (self._plain.tensor, self._versioned.tensor):
            change(tensor)
        return self


class _Odd(Producer):
    """A producer of any capsule."""

    def __init__(self, array: np.ndarray, capsule: Callable[[], Any]) -> None:
        super().__init__(array)
        self._capsule = capsule

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._capsule()


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda tensor: setattr(tensor, name, value)


def _capsule(memory: np.ndarray, name: bytes) -> Any:
    return ctypes.pythonapi.PyCapsule_New(memory.ctypes.data, name, None)


_NO_NUMBERS = ctypes.POINTER(ctypes.c_int64)()

# Each makes a producer that no call may take.
HOSTILE: dict[str, Callable[[np.ndarray], Any]] = {
    "version 2": lambda a: Producer(a, version=(2, 0)),
    "version 0": lambda a: Producer(a, version=(0, 8)),
    "a far version": lambda a: Producer(a, version=(2**32 - 1, 0)),
    "elements without memory": lambda a: Producer(a, data=False),
    "a memory offset without memory": lambda a: Producer(a, data=False, byte_offset=8),
    "-1 dimensions": lambda a: _Bent(a).bend(_set("ndim", -1)),
    "the least number of dimensions": lambda a: _Bent(a).bend(_set("ndim", -(2**31))),
    "no shape": lambda a: _Bent(a, shape=(4,)).bend(_set("shape", _NO_NUMBERS)),
    "a negative dimension": lambda a: Producer(a, shape=(-1,)),
    "two negative dimensions": lambda a: Producer(a, shape=(-2, -2)),
    "a negative dimension beside an empty one": lambda a: Producer(a, shape=(0, -2)),
    "the least dimension": lambda a: Producer(a, shape=(-(2**63),)),
    "2**64 elements": lambda a: Producer(a, shape=(2**32, 2**32), strides=(0, 0)),
    "2**63 elements": lambda a: Producer(a, shape=(2**31, 2**32), strides=(0, 0)),
    "2**62 elements": lambda a: Producer(a, shape=(2**31, 2**31), strides=(0, 0)),
    "2**64 elements in rows": lambda a: Producer(a, shape=(2**32, 2**32)),
    "far strides": lambda a: Producer(a, shape=(2, 2), strides=(2**62, 1)),
    "far strides back": lambda a: Producer(a, shape=(2, 2), strides=(-(2**62), 1)),
    "the least stride": lambda a: Producer(a, shape=(2, 2), strides=(-(2**63), 1)),
    "strides that add up to nothing": lambda a: Producer(a, shape=(3, 3), strides=(2**62, 2**62)),
    "lanes": lambda a: Producer(a, shape=(2,), dtype=(2, 32, 2)),
    "no lanes": lambda a: Producer(a, shape=(2,), dtype=(2, 32, 0)),
    "integers": lambda a: Producer(a, shape=(2,), dtype=(0, 32, 1)),
    "eight bits": lambda a: Producer(a, shape=(2,), dtype=(2, 8, 1)),
    "an unknown type": lambda a: Producer(a, shape=(2,), dtype=(99, 32, 1)),
    "a device": lambda a: Producer(a, device=(7, 0)),
    "a device in the capsule alone": lambda a: type("Liar", (Producer,), {"__dlpack_device__": lambda self: (1, 0)})(a, device=(7, 0)),
    "no capsule": lambda a: _Odd(a, lambda: None),
    "text for a capsule": lambda a: _Odd(a, lambda: "dltensor"),
    "a used capsule": lambda a: _Odd(a, lambda: _capsule(a, b"used_dltensor")),
    "a foreign capsule": lambda a: _Odd(a, lambda: _capsule(a, b"something")),
}


@check("DLPack", weight=12, plants={"total_norm": swallow, "scale_": swallow})
def hostile_producers(draw: Draw) -> None:
    memory, other = draw.rng.standard_normal(8).astype(np.float32), np.ones(3)
    what = draw.pick(list(HOSTILE))
    producer = HOSTILE[what](memory)
    before = memory.tobytes()
    tensors = draw.shuffled([producer, other])
    name, arguments = draw.pick([("total_norm", ()), ("scale_", (0.5,)), ("clip_", (0.1,)), ("stats", ()), ("clamp_", (0.1,))])
    expect_refusal(f"a producer with {what}, by {name},", lambda: draw.call(getattr(normclip, name), tensors, *arguments))
    expect((memory.tobytes(), other.tolist()) == (before, [1.0] * 3), f"{what} was refused by {name}, and memory has changed")


@check("DLPack", weight=2, plants={"scale_": swallow, "clip_": swallow})
def copies(draw: Draw) -> None:
    """A producer that lends a copy can be read. To write there would be in vain."""
    memory = draw.rng.standard_normal(8).astype(np.float32)
    producer = Producer(memory, flags=IS_COPIED)
    exact = oracles.exact_norm([memory])
    found = draw.call(normclip.total_norm, producer)
    expect(oracles.near(found, exact), f"the norm of a copy is {found!r}, not {exact!r}")
    name, arguments = draw.pick([("scale_", (0.5,)), ("clip_", (0.1,))])
    expect_refusal(f"{name} of a copy", lambda: getattr(normclip, name)([producer], *arguments))


@check("DLPack", weight=2, plants={"total_norm": swallow})
def failing_producers(draw: Draw) -> None:
    """A producer's own exception reaches the caller."""

    def fail() -> Any:
        raise KeyError("from the producer")

    memory = draw.rng.standard_normal(8)
    producer = _Odd(memory, fail)
    try:
        draw.call(normclip.total_norm, draw.shuffled([producer, memory]))
    except (KeyError, TypeError, ValueError, BufferError) as error:
        expect(not isinstance(error, KeyError) or "from the producer" in str(error), f"it was {error!r}")
        return
    expect(False, "a producer that failed was no error")
