"""The kernels for CUDA, in Triton. They know tables of addresses and numbers; :mod:`normclip._cuda` knows tensors.

A *chunk* is a run of elements of one tensor, a row of the table, and one program's work. All chunks of all tensors of all element types
are read in one launch: each program takes the branch of its element type. Nothing is merged by atomics; partials have their places, and
one more launch adds them in a fixed tree. The same memory gives the same bits on every run.

float16, bfloat16 and float32 are widened; products and sums are taken in float64, where squares of these types are exact and cannot
overflow. Chunks of float64 whose sum of squares leaves the safe range are read again at another scale (after Blue, 1978), as on the CPU.
Error bound: a chunk has at most 2^20 elements in at least 256 lanes, and more partials than 128 have 4096 lanes, so up to 2^35 elements a
sum passes through fewer than 2^13 roundings of 2^-53: 1e-12 relative.
"""

import triton
import triton.language as tl

# Element types, as the table of tensors numbers them. A set of them is a bit mask.
HALF = tl.constexpr(0)
BFLOAT = tl.constexpr(1)
SINGLE = tl.constexpr(2)
DOUBLE = tl.constexpr(3)

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

# What to change.
CLIP = tl.constexpr(0)
SCALE = tl.constexpr(1)
SCALE_EACH = tl.constexpr(2)
CLAMP = tl.constexpr(3)
ZERO_NONFINITE = tl.constexpr(4)

# A table of chunks: address, elements << 3 | element type, index of the tensor.
ROW = tl.constexpr(3)
# Numbers of a moments partial: count, zeros, NaN, infinities, sum of |x|, squares (medium, small, large), largest.
COLUMNS = tl.constexpr(9)

# See `Squares` in rust/core/src/moments.rs.
_UP = tl.constexpr(2.0**538)
_DOWN = tl.constexpr(2.0**-538)
_SAFE_LOW = tl.constexpr(2.0**-900)
_SAFE_HIGH = tl.constexpr(2.0**900)

_INF = tl.constexpr(float("inf"))
# Loads are vectors of this many bytes.
_VECTOR = tl.constexpr(16)


# ---- One chunk, read ----


@triton.jit
def _bits(x):
    """The bits of |x|. As integers they are ordered like the numbers, with inf above every number and NaN above inf."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _number(bits):
    """The number with these bits, in float64."""
    if bits.dtype == tl.int64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _power(x, order):
    """x^order for x ≥ 0; 0 for 0 and for what is infinite, which callers have dealt with."""
    usable = (x > 0.0) & (x < _INF)
    return tl.where(usable, tl.exp2(order * tl.log2(tl.where(usable, x, 1.0))), 0.0)


@triton.jit
def _place(address, count, TYPE: tl.constexpr, TILE: tl.constexpr):
    """How to walk a chunk in aligned tiles, wherever it begins.

    Returns a pointer to the last vector border at or before the chunk, the positions of the chunk's first element and of its end from
    there, and the range of positions that whole tiles cover. What lies outside of that range are the edges, to be read under a mask.
    """
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    surplus = address % _VECTOR
    base = tl.multiple_of((address - surplus).to(tl.pointer_type(TYPE)), _VECTOR)
    begin = (surplus // SIZE).to(tl.int32)
    end = begin + count
    first = (begin > 0).to(tl.int32) * TILE
    last = tl.maximum(end // TILE * TILE, first)
    return base, begin, end, first, last


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
        sums += _power(tl.abs(wide) / factor, order)
    if WHAT == LARGEST or WHAT == SMALLEST or WHAT == NONZEROS or WHAT == MOMENTS:
        top = tl.maximum(top, _bits(x))
    if WHAT == SMALLEST:
        sums = tl.minimum(sums, tl.abs(wide))
    if WHAT == NONZEROS or WHAT == MOMENTS:
        number += (x != 0.0).to(tl.int32)
    if WHAT == SPECIALS:
        number += (x != x).to(tl.int32)
        more += (tl.abs(wide) == _INF).to(tl.float64)
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
    ABSENT: tl.constexpr = _INF if WHAT == SMALLEST or WHAT == INVERSE_POWERS else 0.0
    lanes = tl.arange(0, TILE)
    base, begin, end, first, last = _place(address, count, TYPE, TILE)

    sums = tl.full([TILE], ABSENT if WHAT == SMALLEST else 0.0, tl.float64)
    more = tl.zeros([TILE], tl.float64)
    top = _bits(tl.zeros([TILE], WIDE))
    number = tl.zeros([TILE], tl.int32)
    for start in tl.range(first, last, TILE, loop_unroll_factor=UNROLL):
        x = tl.load(base + start + lanes).to(WIDE)
        sums, more, top, number = _add(x, sums, more, top, number, factor, order, WHAT, SCALED, FINITE)
    for edge in range(0, first + tl.maximum(end - last, 0), TILE):
        at = tl.where(edge < first, edge, edge - first + last) + lanes
        x = tl.load(base + at, mask=(at >= begin) & (at < end), other=ABSENT).to(WIDE)
        sums, more, top, number = _add(x, sums, more, top, number, factor, order, WHAT, SCALED, FINITE)

    largest = _number(tl.max(top, 0))
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
        if total > _SAFE_HIGH:
            large, _a, _b, _c = _fold(address, count, _DOWN, 2.0, TYPE, SQUARES, True, FINITE, BYTES, UNROLL)
            total = zero
        elif total < _SAFE_LOW:
            small, _a, _b, _c = _fold(address, count, _UP, 2.0, TYPE, SQUARES, True, FINITE, BYTES, UNROLL)
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
        if (largest == _INF) | (largest != largest):
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
        if (scale > 0.0) & (scale < _INF):
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
    if TYPES & 1:
        if code == HALF:
            _measure(address, count, place, stride, order, tl.float16, WHAT, FINITE, SCALES, BYTES, UNROLL)
    if TYPES & 2:
        if code == BFLOAT:
            _measure(address, count, place, stride, order, tl.bfloat16, WHAT, FINITE, SCALES, BYTES, UNROLL)
    if TYPES & 4:
        if code == SINGLE:
            _measure(address, count, place, stride, order, tl.float32, WHAT, FINITE, SCALES, BYTES, UNROLL)
    if TYPES & 8:
        if code == DOUBLE:
            _measure(address, count, place, stride, order, tl.float64, WHAT, FINITE, SCALES, BYTES, UNROLL)


# ---- Partials, merged ----


@triton.jit
def _sum(values, first, last, LANES: tl.constexpr):
    """Σ values[first:last], in a fixed order."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for start in range(first, last, LANES):
        total += tl.load(values + start + lanes, mask=start + lanes < last, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _largest(values, first, last, LANES: tl.constexpr):
    """The largest of values that are not negative; NaN if one is."""
    lanes = tl.arange(0, LANES)
    top = tl.zeros([LANES], tl.int64)
    for start in range(first, last, LANES):
        top = tl.maximum(top, _bits(tl.load(values + start + lanes, mask=start + lanes < last, other=0.0)))
    return _number(tl.max(top, 0))


@triton.jit
def _smallest(values, first, last, LANES: tl.constexpr):
    """The smallest of values that are not negative; NaN if one is."""
    lanes = tl.arange(0, LANES)
    bottom = _bits(tl.full([LANES], _INF, tl.float64))
    for start in range(first, last, LANES):
        bottom = tl.minimum(bottom, _bits(tl.load(values + start + lanes, mask=start + lanes < last, other=_INF)))
    largest = _largest(values, first, last, LANES)
    return tl.where(largest != largest, largest, _number(tl.min(bottom, 0)))


@triton.jit
def _root(medium, small, large):
    """√ of a sum of squares at three scales."""
    ordinary = tl.sqrt(medium + small * _DOWN * _DOWN)
    ordinary = tl.where(medium != 0.0, ordinary, tl.sqrt(small) * _DOWN)
    return tl.where(large != 0.0, tl.sqrt(large + medium * _DOWN * _DOWN) * _UP, ordinary)


@triton.jit(do_not_specialize=["chunks"])
def norm(partials, chunks, exact, rounded, order: tl.float64, TYPES: tl.constexpr, WHAT: tl.constexpr, LANES: tl.constexpr):
    """The norm of all chunks, in one program: in float64, and in the type of `rounded`."""
    stride = tl.full([], 0, tl.int64) + chunks
    if WHAT == SQUARES:
        medium = _sum(partials, 0, chunks, LANES)
        if TYPES & 8:
            small = _sum(partials + stride, 0, chunks, LANES)
            large = _sum(partials + 2 * stride, 0, chunks, LANES)
            found = _root(medium, small, large)
        else:
            found = tl.sqrt(medium)
    elif WHAT == LARGEST:
        found = _largest(partials, 0, chunks, LANES)
    elif WHAT == SMALLEST:
        found = _smallest(partials, 0, chunks, LANES)
    elif WHAT == POWERS or WHAT == INVERSE_POWERS:
        order = tl.full([], order, tl.float64)
        if WHAT == POWERS:
            scale = _largest(partials, 0, chunks, LANES)
        else:
            scale = _smallest(partials, 0, chunks, LANES)
        lanes = tl.arange(0, LANES)
        powers = tl.zeros([LANES], tl.float64)
        for start in range(0, chunks, LANES):
            inside = start + lanes < chunks
            own = tl.load(partials + start + lanes, mask=inside, other=0.0)
            powers += _power(own / scale, order) * tl.load(partials + stride + start + lanes, mask=inside, other=0.0)
        # 0, inf and NaN are their own norm.
        usable = (scale > 0.0) & (scale < _INF)
        root = tl.exp2(tl.log2(tl.where(usable, tl.sum(powers, 0), 1.0)) / order)
        found = tl.where(usable, scale * root, scale)
    else:
        found = _sum(partials, 0, chunks, LANES)
    tl.store(exact, found)
    tl.store(rounded, found.to(rounded.dtype.element_ty))


@triton.jit(do_not_specialize=["chunks"])
def tabulate(partials, chunks, segments, moments, PER_PROGRAM: tl.constexpr, LANES: tl.constexpr):
    """The moments of each tensor, a row a tensor, from those of its chunks, which are segments[tensor] .. segments[tensor + 1]."""
    tensor = tl.program_id(0).to(tl.int64)
    first = tl.load(segments + tensor).to(tl.int32)
    last = tl.load(segments + tensor + 1).to(tl.int32)
    for k in tl.static_range(PER_PROGRAM):
        column = tl.program_id(1) * PER_PROGRAM + k
        values = partials + column.to(tl.int64) * chunks
        if column == COLUMNS - 1:
            tl.store(moments + tensor * COLUMNS + column, _largest(values, first, last, LANES))
        else:
            tl.store(moments + tensor * COLUMNS + column, _sum(values, first, last, LANES))


# ---- Chunks, changed ----


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
    base, begin, end, first, last = _place(address, count, TYPE, TILE)
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
    by number, SCALE_EACH by numbers[tensor]. CLAMP has number as its limit. The last chunk comes first: what a measurement has read last
    is still in the cache.
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
        factor = tl.load(numbers + tl.load(table + ROW * chunk + 2))
        busy = factor != 1.0
    if busy:
        address = tl.load(table + ROW * chunk)
        packed = tl.load(table + ROW * chunk + 1)
        count = (packed >> 3).to(tl.int32)
        code = packed & 7
        if TYPES & 1:
            if code == HALF:
                _change(address, count, factor, tl.float16, WHAT, BYTES, UNROLL)
        if TYPES & 2:
            if code == BFLOAT:
                _change(address, count, factor, tl.bfloat16, WHAT, BYTES, UNROLL)
        if TYPES & 4:
            if code == SINGLE:
                _change(address, count, factor, tl.float32, WHAT, BYTES, UNROLL)
        if TYPES & 8:
            if code == DOUBLE:
                _change(address, count, factor, tl.float64, WHAT, BYTES, UNROLL)
