"""Chunks, changed in place."""

import triton
import triton.language as tl

from normclip._backends.triton.elements import ELEMENTS, ROW, tiles_of

# What to change.
CLIP = tl.constexpr(0)
SCALE = tl.constexpr(1)
SCALE_EACH = tl.constexpr(2)
CLAMP = tl.constexpr(3)
ZERO_NONFINITE = tl.constexpr(4)


@triton.jit
def _changed(x, factor, WHAT: tl.constexpr):
    """What becomes of elements, and which are to be written."""
    TYPE: tl.constexpr = x.dtype
    if WHAT == CLAMP:
        # Rounded to the element's type, by way of float32, as torch does it.
        limit = factor if TYPE == tl.float64 else factor.to(tl.float32).to(TYPE).to(tl.float32)
        wide = x if TYPE == tl.float64 else x.to(tl.float32)
        return tl.where(wide > 0.0, limit, -limit).to(TYPE), tl.abs(wide) > limit
    elif WHAT == ZERO_NONFINITE:
        wide = x if TYPE == tl.float64 else x.to(tl.float32)
        return tl.zeros_like(x), wide - wide != 0.0
    else:
        product = x.to(factor.dtype) * factor
        if TYPE != tl.float64:
            product = product.to(tl.float32)
        return product.to(TYPE), x == x


@triton.jit
def _map(address, count, factor, TYPE: tl.constexpr, WHAT: tl.constexpr, BYTES: tl.constexpr, UNROLL: tl.constexpr):
    """Changes a chunk in place. Scaling writes all of it, the others only what they change."""
    TILE: tl.constexpr = BYTES // (TYPE.primitive_bitwidth // 8)
    SELECT: tl.constexpr = WHAT == CLAMP or WHAT == ZERO_NONFINITE
    lanes = tl.arange(0, TILE)
    base, begin, end, first, last = tiles_of(address, count, TYPE, TILE)
    for start in tl.range(first, last, TILE, loop_unroll_factor=UNROLL):
        place = base + start + lanes
        y, written = _changed(tl.load(place), factor, WHAT)
        if SELECT:
            tl.store(place, y, mask=written)
        else:
            tl.store(place, y)
    for edge in range(0, first + tl.maximum(end - last, 0), TILE):
        at = tl.where(edge < first, edge, edge - first + last) + lanes
        inside = (at >= begin) & (at < end)
        y, written = _changed(tl.load(base + at, mask=inside, other=0.0), factor, WHAT)
        if SELECT:
            inside = inside & written
        tl.store(base + at, y, mask=inside)


@triton.jit
def _change(address, count, factor, TYPE: tl.constexpr, WHAT: tl.constexpr, BYTES: tl.constexpr, UNROLL: tl.constexpr):
    if WHAT == CLAMP or WHAT == ZERO_NONFINITE or TYPE == tl.float64:
        _map(address, count, factor, TYPE, WHAT, BYTES, UNROLL)
    else:
        # A factor that is subnormal or infinite in float32 would lose products that fit.
        size = tl.abs(factor)
        if (factor == 0.0) | ((size >= 1.1754943508222875e-38) & (size <= 3.4028234663852886e38)):
            _map(address, count, factor.to(tl.float32), TYPE, WHAT, BYTES, UNROLL)
        else:
            _map(address, count, factor, TYPE, WHAT, BYTES, UNROLL)


@triton.jit
def change(
    table,
    numbers,
    number: tl.float64,
    epsilon: tl.float64,
    TYPES: tl.constexpr,
    WHAT: tl.constexpr,
    BYTES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Changes all chunks in place.

    CLIP multiplies by number / (numbers[0] + epsilon), a limit over a norm, and returns at once where that is 1 or more. SCALE multiplies
    by number, or if there are numbers by numbers[0], SCALE_EACH by numbers[tensor], and both return at once where that is 1. CLAMP has
    number as its limit. The last chunk comes first: what a measurement has read last is still in the cache.
    """
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    factor = tl.full([], number, tl.float64)
    busy = True
    if WHAT == CLIP:
        size = tl.load(numbers) + epsilon
        factor = factor / size
        # Not `factor < 1`: NaN has to reach the elements.
        busy = (size != 0.0) & ((factor < 1.0) | (factor != factor))
    if WHAT == SCALE_EACH:
        numbers += tl.load(table + ROW * chunk + 2)
    if WHAT != CLIP and numbers is not None:
        factor = tl.load(numbers)
        busy = factor != 1.0
    if busy:
        address = tl.load(table + ROW * chunk)
        packed = tl.load(table + ROW * chunk + 1)
        count = (packed >> 3).to(tl.int32)
        code = packed & 7
        for CODE in tl.static_range(4):
            if TYPES >> CODE & 1:
                if code == CODE:
                    _change(address, count, factor, ELEMENTS[CODE], WHAT, BYTES, UNROLL)
