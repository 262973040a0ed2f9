"""Chunks, read: a partial for each."""

import triton
import triton.language as tl

from normclip._backends.triton.elements import (
    DOWN,
    ELEMENTS,
    INF,
    ROW,
    SAFE_HIGH,
    SAFE_LOW,
    UP,
    bits_of,
    number_of,
    power,
    tiles_of,
)

# What to measure.
SQUARES = tl.constexpr(0)
ABSOLUTES = tl.constexpr(1)
LARGEST = tl.constexpr(2)
SMALLEST = tl.constexpr(3)
NONZEROS = tl.constexpr(4)
POWERS = tl.constexpr(5)
INVERSE_POWERS = tl.constexpr(6)
MOMENTS = tl.constexpr(7)
# Used only inside this file.
SPECIALS = tl.constexpr(8)


@triton.jit
def _add(x, sums, more, top, number, factor, order, WHAT: tl.constexpr, SCALED: tl.constexpr, FINITE: tl.constexpr):
    """Adds a tile of elements to the accumulators. Elements that are not there read as 0 (for a smallest one: as inf)."""
    if FINITE:
        x = tl.where(x.to(tl.float64) - x.to(tl.float64) == 0.0, x, 0.0)
    wide = x.to(tl.float64)
    if WHAT == SQUARES or WHAT == MOMENTS:
        if SCALED:
            scaled = wide * factor
            sums += scaled * scaled
        else:
            sums += wide * wide
    if WHAT == ABSOLUTES or WHAT == MOMENTS:
        more += tl.abs(wide)
    if WHAT == POWERS or WHAT == INVERSE_POWERS:
        sums += power(tl.abs(wide) / factor, order)
    if WHAT == LARGEST or WHAT == SMALLEST or WHAT == NONZEROS or WHAT == MOMENTS:
        top = tl.maximum(top, bits_of(x))
    if WHAT == SMALLEST:
        sums = tl.minimum(sums, tl.abs(wide))
    if WHAT == NONZEROS or WHAT == MOMENTS:
        number += (x != 0.0).to(tl.int32)
    if WHAT == SPECIALS:
        number += (x != x).to(tl.int32)
        more += (tl.abs(wide) == INF).to(tl.float64)
    return sums, more, top, number


@triton.jit
def _fold(
    address,
    count,
    factor,
    order,
    TYPE: tl.constexpr,
    WHAT: tl.constexpr,
    SCALED: tl.constexpr,
    FINITE: tl.constexpr,
    BYTES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Reads a chunk once. Returns what WHAT asks for as four float64.

    They are the sum (or smallest), the second sum, the largest absolute value, and the number of elements.
    """
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    TILE: tl.constexpr = BYTES // (TYPE.primitive_bitwidth // 8)
    # A smallest element must not be one that is not there; nor must it count in a sum of inverse powers.
    ABSENT: tl.constexpr = INF if WHAT == SMALLEST or WHAT == INVERSE_POWERS else 0.0
    lanes = tl.arange(0, TILE)
    base, begin, end, first, last = tiles_of(address, count, TYPE, TILE)

    sums = tl.full([TILE], ABSENT if WHAT == SMALLEST else 0.0, tl.float64)
    more = tl.zeros([TILE], tl.float64)
    top = bits_of(tl.zeros([TILE], WIDE))
    number = tl.zeros([TILE], tl.int32)
    for start in tl.range(first, last, TILE, loop_unroll_factor=UNROLL):
        x = tl.load(base + start + lanes).to(WIDE)
        sums, more, top, number = _add(x, sums, more, top, number, factor, order, WHAT, SCALED, FINITE)
    for edge in range(0, first + tl.maximum(end - last, 0), TILE):
        at = tl.where(edge < first, edge, edge - first + last) + lanes
        x = tl.load(base + at, mask=(at >= begin) & (at < end), other=ABSENT).to(WIDE)
        sums, more, top, number = _add(x, sums, more, top, number, factor, order, WHAT, SCALED, FINITE)

    largest = number_of(tl.max(top, 0))
    if WHAT == SMALLEST:
        # A minimum knows no NaN, and absent elements know no largest: inf would hide nothing, NaN is above it.
        total = tl.where(largest != largest, largest, tl.min(sums, 0))
    else:
        total = tl.sum(sums, 0)
    return total, tl.sum(more, 0), largest, tl.sum(number, 0).to(tl.float64)


@triton.jit
def _squares(
    place,
    stride,
    total,
    address,
    count,
    TYPE: tl.constexpr,
    FINITE: tl.constexpr,
    SCALES: tl.constexpr,
    BYTES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Writes a sum of squares. Of float64 out of the safe range, that of elements times 2^538 or 2^-538, in columns of their own."""
    zero = tl.full([], 0.0, tl.float64)
    small = zero
    large = zero
    if TYPE == tl.float64:
        if total > SAFE_HIGH:
            large, _a, _b, _c = _fold(address, count, DOWN, 2.0, TYPE, SQUARES, True, FINITE, BYTES, UNROLL)
            total = zero
        elif total < SAFE_LOW:
            small, _a, _b, _c = _fold(address, count, UP, 2.0, TYPE, SQUARES, True, FINITE, BYTES, UNROLL)
            total = zero
    tl.store(place, total)
    if SCALES:
        tl.store(place + stride, small)
        tl.store(place + 2 * stride, large)


@triton.jit
def _measure(
    address,
    count,
    place,
    stride,
    order,
    TYPE: tl.constexpr,
    WHAT: tl.constexpr,
    FINITE: tl.constexpr,
    SCALES: tl.constexpr,
    BYTES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Writes the partial of one chunk; its columns are `stride` apart."""
    if WHAT == MOMENTS:
        squares, absolutes, largest, nonzeros = _fold(address, count, 1.0, order, TYPE, MOMENTS, False, False, BYTES, UNROLL)
        nans = tl.full([], 0.0, tl.float64)
        infs = nans
        # What is rare is counted only where there is some.
        if (largest == INF) | (largest != largest):
            _a, infs, _b, nans = _fold(address, count, 1.0, order, TYPE, SPECIALS, False, False, BYTES, UNROLL)
            if FINITE:
                squares, absolutes, largest, nonzeros = _fold(address, count, 1.0, order, TYPE, MOMENTS, False, True, BYTES, UNROLL)
        tl.store(place, count.to(tl.float64))
        tl.store(place + stride, count.to(tl.float64) - nonzeros)
        tl.store(place + 2 * stride, nans)
        tl.store(place + 3 * stride, infs)
        tl.store(place + 4 * stride, absolutes)
        _squares(place + 5 * stride, stride, squares, address, count, TYPE, FINITE, SCALES, BYTES, UNROLL)
        tl.store(place + 8 * stride, largest)
    elif WHAT == POWERS or WHAT == INVERSE_POWERS:
        # Relative to the element that counts most, whose power is 1: nothing overflows. The second read comes from the cache.
        smallest, _a, largest, _b = _fold(
            address, count, 1.0, order, TYPE, LARGEST if WHAT == POWERS else SMALLEST, False, False, BYTES, UNROLL
        )
        scale = largest if WHAT == POWERS else smallest
        total = tl.full([], 0.0, tl.float64)
        if (scale > 0.0) & (scale < INF):
            total, _a, _b, _c = _fold(address, count, scale, order, TYPE, WHAT, False, False, BYTES, UNROLL)
        tl.store(place, scale)
        tl.store(place + stride, total)
    else:
        total, absolutes, largest, nonzeros = _fold(address, count, 1.0, order, TYPE, WHAT, False, False, BYTES, UNROLL)
        if WHAT == SQUARES:
            _squares(place, stride, total, address, count, TYPE, False, SCALES, BYTES, UNROLL)
        elif WHAT == ABSOLUTES:
            tl.store(place, absolutes)
        elif WHAT == LARGEST:
            tl.store(place, largest)
        elif WHAT == SMALLEST:
            tl.store(place, total)
        else:
            tl.store(place, tl.where(largest != largest, largest, nonzeros))


@triton.jit(do_not_specialize=["chunks"])
def measure(
    table,
    partials,
    chunks,
    order: tl.float64,
    TYPES: tl.constexpr,
    WHAT: tl.constexpr,
    FINITE: tl.constexpr,
    BYTES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One partial for each chunk. TYPES is the set of element types in the table; the others are not compiled."""
    chunk = tl.program_id(0)
    address = tl.load(table + ROW * chunk)
    packed = tl.load(table + ROW * chunk + 1)
    count = (packed >> 3).to(tl.int32)
    code = packed & 7
    place = partials + chunk
    stride = tl.full([], 0, tl.int64) + chunks
    SCALES: tl.constexpr = WHAT == MOMENTS or TYPES & 8 != 0
    for CODE in tl.static_range(4):
        if TYPES >> CODE & 1:
            if code == CODE:
                _measure(address, count, place, stride, order, ELEMENTS[CODE], WHAT, FINITE, SCALES, BYTES, UNROLL)
