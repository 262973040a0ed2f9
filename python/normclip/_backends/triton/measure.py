"""Kernels that read chunks and write one partial for each: sums, extremes and counts, by mode."""

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

# The modes of the kernel.
SQUARES = tl.constexpr(0)
ABSOLUTES = tl.constexpr(1)
LARGEST = tl.constexpr(2)
SMALLEST = tl.constexpr(3)
NONZEROS = tl.constexpr(4)
POWERS = tl.constexpr(5)
INVERSE_POWERS = tl.constexpr(6)
MOMENTS = tl.constexpr(7)
# Counts of NaN and infinities, used only in this file.
SPECIALS = tl.constexpr(8)


@triton.jit
def _add(x, sums, more, top, number, factor, order, WHAT: tl.constexpr, SCALED: tl.constexpr, FINITE: tl.constexpr):
    """Adds a tile of elements to the accumulators. Lanes outside the chunk hold 0, or inf where the smallest element counts."""
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
    """Reads a chunk once and returns four float64, of which WHAT decides which are computed.

    They are the sum (of squares or powers) or the smallest |x|, the second sum (of |x|, or the count of infinities), the largest |x|, and
    the count (of elements that are not zero, or of NaN). With SCALED, elements are multiplied by factor before they are squared; powers are
    taken of |x| / factor. With FINITE, NaN and infinities count as 0.
    """
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    TILE: tl.constexpr = BYTES // (TYPE.primitive_bitwidth // 8)
    # What lanes outside the chunk hold: 0 must not be taken for the smallest element, and inf has an inverse power of 0.
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
        # The minimum of floats ignores NaN, but the largest by `bits_of` does not. The inf in lanes outside the chunk is below NaN there.
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
    """Writes a sum of squares in one of three columns: medium, small, large; the others are 0.

    A sum of float64 that is below or above the safe range is taken again, of elements times 2^538 for small or 2^-538 for large.
    """
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
    """Writes the partial of one chunk, whose columns are `stride` numbers apart."""
    if WHAT == MOMENTS:
        squares, absolutes, largest, nonzeros = _fold(address, count, 1.0, order, TYPE, MOMENTS, False, False, BYTES, UNROLL)
        nans = tl.full([], 0.0, tl.float64)
        infs = nans
        # NaN and infinities are rare, so they are counted by a second read only if there are any.
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
        # Powers are taken relative to the element with the largest power, so that none overflows. The second read comes from the cache.
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
    """Writes a partial for each chunk. TYPES is a bit mask of the element types in the table; code for others is not compiled."""
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
