"""Tensors that share memory: against an oracle that marks bytes."""

import math
from typing import Any

import numpy as np

import normclip
from fuzz import oracles
from fuzz.draw import Draw
from fuzz.registry import REFUSALS, check, expect, swallow

ITEMSIZES = {"float16": 2, "float32": 4, "float64": 8, "complex64": 8}
BYTES = 192


def _view(draw: Draw, memory: bytearray, dtype: str) -> np.ndarray | None:
    """Some elements of the memory, in any pattern that fits."""
    size = ITEMSIZES[dtype]
    shape = tuple(draw.pick([1, 2, 2, 3, 4, 5]) for _ in range(draw.pick([0, 1, 1, 2, 2, 3])))
    strides = tuple(draw.pick([0, 1, 1, 2, 2, 3, 4, 5, 6, 8, -1, -2]) for _ in shape)
    reaches = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    low, high = sum(reach for reach in reaches if reach < 0) * size, sum(reach for reach in reaches if reach > 0) * size + size
    if high - low > BYTES:
        return None
    offset = draw.integer(-low // 2, (BYTES - high) // 2) * 2
    return np.ndarray(shape, dtype, memory, offset, tuple(stride * size for stride in strides))


def _addresses(array: np.ndarray, base: int) -> list[int]:
    """Where each element begins."""
    start = array.__array_interface__["data"][0] - base
    return [start + sum(i * s for i, s in zip(index, array.strides, strict=True)) for index in np.ndindex(array.shape)]


@check("overlaps", weight=15, plants={"scale_": swallow})
def overlaps(draw: Draw) -> None:
    memory = bytearray(BYTES)
    np.frombuffer(memory, np.uint8)[:] = draw.rng.integers(0, 256, BYTES)
    dtype = draw.pick(list(ITEMSIZES))
    kinds = list(ITEMSIZES) if draw.chance(0.2) else [dtype]
    made = [(kind, _view(draw, memory, kind)) for kind in (draw.pick(kinds) for _ in range(draw.pick([1, 2, 2, 3, 4])))]
    views = [(kind, view) for kind, view in made if view is not None]
    if draw.chance(0.2) and views:
        views.append(draw.pick(views))
    base = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]

    # What the answer has to be: every byte belongs to one element of one tensor, or to the same elements again.
    refused, unsure, written = False, False, {}
    for place, (kind, view) in enumerate(views):
        starts = _addresses(view, base)
        size = ITEMSIZES[kind]
        taken = [start + byte for start in starts for byte in range(size)]
        if len(set(taken)) < len(taken):
            refused = True
            continue
        owners = {written[byte] for byte in taken if byte in written}
        if not owners:
            written |= dict.fromkeys(taken, place)
            continue
        other = views[next(iter(owners))]
        repeated = len(owners) == 1 and other[0] == kind and sorted(_addresses(other[1], base)) == sorted(starts)
        # The same elements in another order may be a repetition, or an overlap.
        unsure |= repeated and (other[1].shape, other[1].strides) != (view.shape, view.strides)
        refused |= not repeated

    before = bytes(memory)
    expected = bytearray(before)
    for place in set(written.values()):
        kind, view = views[place]
        copy = np.ndarray(view.shape, kind, expected, view.__array_interface__["data"][0] - base, view.strides)
        with np.errstate(all="ignore"):
            for numbers in _numbers(copy):
                numbers *= numbers.dtype.type(2.0)
    tensors = [view for _, view in views]
    described = [(kind, view.shape, view.strides, view.__array_interface__["data"][0] - base) for kind, view in views]
    try:
        draw.call(normclip.scale_, tensors, 2.0)
    except REFUSALS as error:
        expect(refused or unsure, f"{described!r} was refused: {error}")
        expect(bytes(memory) == before, f"{described!r} was refused, and has changed")
        return
    expect(not refused, f"{described!r} was accepted")
    expect(_numbers_alike(memory, expected, [views[place] for place in set(written.values())], base), f"{described!r} was not scaled once")


def _numbers_alike(memory: bytearray, expected: bytearray, views: list[tuple[str, np.ndarray]], base: int) -> bool:
    """The same bytes, with NaN as one value."""
    found, wanted = bytearray(memory), bytearray(expected)
    for kind, view in views:
        for buffer in (found, wanted):
            part = np.ndarray(view.shape, kind, buffer, view.__array_interface__["data"][0] - base, view.strides)
            for numbers in _numbers(part):
                numbers[np.isnan(numbers)] = math.nan
    return found == wanted


def _numbers(array: np.ndarray) -> list[np.ndarray]:
    return [array.real, array.imag] if np.iscomplexobj(array) else [array]


@check("overlaps", weight=5, plants={"total_norm": lambda function: lambda tensors, order=2.0: function(tensors[:1], order)})
def overlapping_reads(draw: Draw) -> None:
    """What is only read may share memory, and counts each time that it is another view."""
    memory = bytearray(BYTES)
    np.frombuffer(memory, np.float64)[:] = draw.rng.standard_normal(BYTES // 8)
    views = [view for view in (_view(draw, memory, "float64") for _ in range(3)) if view is not None]
    seen: set[Any] = set()
    distinct = []
    for view in views:
        cut = tuple((length, stride) for length, stride in zip(view.shape, view.strides, strict=True) if length != 1)
        key = (view.__array_interface__["data"][0], cut)
        starts = {tuple(sorted(_addresses(other, 0))) for other in distinct}
        if key not in seen and tuple(sorted(_addresses(view, 0))) in starts:
            return  # the same elements in another order, which may count as a repetition
        if key not in seen:
            distinct.append(view)
        seen.add(key)
    found = draw.call(normclip.total_norm, views, 0.0)
    exact = oracles.exact_norm(distinct, 0.0)
    described = [(view.shape, view.strides) for view in views]
    expect(oracles.near(found, exact), f"{described!r} have {found!r} elements that are not zero, and should have {exact!r}")
