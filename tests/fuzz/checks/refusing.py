"""Calls that must be refused: nothing may have changed afterwards."""

import math
from typing import Any

import numpy as np
import torch

import normclip
from fuzz.draw import Draw
from fuzz.registry import check, expect, expect_refusal, nudge, swallow
from fuzz.tensors import lots, parameters


def _read_only() -> np.ndarray:
    array = np.ones(3)
    array.flags.writeable = False
    return array


BAD_ITEMS: dict[str, Any] = {
    "a read-only array": _read_only,
    "an array of integers": lambda: np.ones(3, np.int64),
    "an array of booleans": lambda: np.ones(3, bool),
    "an array of wide floats": lambda: np.ones(3, np.longdouble),
    "an array of objects": lambda: np.array([1.0, None]),
    "an array of the other byte order": lambda: np.ones(3, ">f4"),
    "an expanded array": lambda: np.lib.stride_tricks.as_strided(np.ones(1), (3,), (0,)),
    "sliding windows": lambda: np.lib.stride_tricks.as_strided(np.ones(8), (4, 4), (8, 8)),
    "an expanded tensor": lambda: torch.ones(1).expand(3),
    "a tensor of integers": lambda: torch.ones(3, dtype=torch.int32),
    "text": lambda: "text",
    "bytes": lambda: b"1234",
    "None": lambda: None,
    "a number": lambda: 3.0,
    "a class": lambda: np.ndarray,
    "a list": lambda: [np.ones(3)],
    "a dictionary": lambda: {"a": np.ones(3)},
}


def _then_damage(function: Any) -> Any:
    """A function that writes before it refuses."""

    def wrong(items: Any, *args: Any, **kwargs: Any) -> Any:
        items = list(items)
        try:
            return function(items, *args, **kwargs)
        except Exception:
            nudge(items)
            raise

    return wrong


@check("refusals", weight=12, plants=dict.fromkeys(("scale_", "clip_", "clamp_"), _then_damage))
def bad_tensor(draw: Draw) -> None:
    """One of the tensors cannot be taken."""
    made = lots(draw, real=True)
    what = draw.pick(list(BAD_ITEMS))
    tensors = [each.tensor for each in made]
    tensors.insert(draw.integer(0, len(tensors)), BAD_ITEMS[what]())
    name = draw.pick(["scale_", "clip_", "clamp_"])
    versions = [tensor._version for tensor in tensors if isinstance(tensor, torch.Tensor)]
    expect_refusal(f"{what} among {len(made)} tensors of {name}", lambda: draw.call(getattr(normclip, name), tensors, 0.25))
    expect(all(each.untouched for each in made), f"{name} refused {what} and has written")
    expect(versions == [tensor._version for tensor in tensors if isinstance(tensor, torch.Tensor)], "a version has risen")


@check("refusals", weight=8, plants=dict.fromkeys(("clip_grad_norm_", "clip_grad_value_", "clip_grads_"), _then_damage))
def bad_gradient(draw: Draw) -> None:
    """One of the gradients cannot be taken."""
    made = lots(draw, real=True, library="torch")
    items = parameters(draw, made)
    bad = torch.nn.Parameter(torch.ones(2, 3))
    what = draw.pick(["expanded", "overlapping", "windows", "text"])
    if what == "expanded":
        bad.grad = torch.ones(1, 3).expand(2, 3)
    elif what == "windows":
        bad.grad = torch.ones(8).as_strided((2, 3), (1, 1))
    elif what == "overlapping":
        memory = torch.ones(8)
        other = torch.nn.Parameter(torch.ones(6))
        bad.grad, other.grad = memory[:6].view(2, 3), memory[2:]
        items.insert(draw.integer(0, len(items)), other)
    given: list[Any] = list(items)
    given.insert(draw.integer(0, len(items)), type("NoTensor", (), {"grad": "text"})() if what == "text" else bad)
    name, settings = draw.pick([("clip_grad_norm_", (0.25,)), ("clip_grad_value_", (0.25,)), ("clip_grads_", (0.25,))])
    expect_refusal(f"a gradient that is {what}, by {name},", lambda: draw.call(getattr(normclip, name), given, *settings))
    expect(all(each.untouched for each in made), f"{name} refused a gradient that is {what} and has written")


BAD_CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("clip_", (-1.0,)),
    ("clip_", (math.nan,)),
    ("clip_", (0.1, math.nan)),
    ("clip_", ("x",)),
    ("clip_", (None,)),
    ("clip_", (0.1, "fro")),
    ("clip_", ([1.0],)),
    ("clip_", (normclip.rules.Soft,)),
    ("scale_", (math.nan,)),
    ("scale_", (math.inf,)),
    ("scale_", (None,)),
    ("clamp_", (-1.0,)),
    ("clamp_", (math.nan,)),
    ("total_norm", (math.nan,)),
]


@check("refusals", weight=4, plants=dict.fromkeys(("clip_", "scale_", "clamp_"), _then_damage) | {"total_norm": swallow})
def bad_argument(draw: Draw) -> None:
    made = lots(draw, real=True)
    name, arguments = draw.pick(BAD_CALLS)
    expect_refusal(f"{name}(…, {arguments!r})", lambda: draw.call(getattr(normclip, name), [each.tensor for each in made], *arguments))
    expect(all(each.untouched for each in made), f"{name}{arguments!r} was refused and has written")


@check("sizes", weight=1, plants={"total_norm": swallow, "clip_": swallow})
def impossible_sizes(draw: Draw) -> None:
    """Expanded tensors whose number of elements or bytes is beyond 64 bits, or all memory: an error, at once."""
    exponents = draw.pick([(31, 31), (32, 30), (40, 22), (30, 30), (62,), (61,), (24, 24)])
    shape = tuple(2**exponent for exponent in exponents)
    if sum(exponents) > 61 or draw.chance(0.5):
        tensor: Any = torch.ones(1).expand(shape)
    else:
        tensor = np.lib.stride_tricks.as_strided(np.ones(1, np.float16), shape, (0,) * len(shape))
    name, arguments = draw.pick([("total_norm", ()), ("clip_", (1.0,)), ("clip_", (math.inf,)), ("scale_", (0.5,)), ("dot", (tensor,))])
    expect_refusal(f"{name} of a tensor of 2**{exponents} elements", lambda: getattr(normclip, name)(tensor, *arguments))
