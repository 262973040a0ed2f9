"""Shared by the kernels: the format of the table of chunks, element types, and the walk over a chunk in aligned tiles."""

import triton
import triton.language as tl

# The element types, in the order of their numbers in the table of chunks. A set of types is a bit mask of these numbers.
ELEMENTS = tl.constexpr((tl.float16, tl.bfloat16, tl.float32, tl.float64))

# Numbers in a row of the table of chunks: number of the tensor, distance from its address in bytes, elements << 3 | element type.
ROW = tl.constexpr(3)

# The scales of sums of squares: see `Squares` in rust/core/src/moments.rs.
UP = tl.constexpr(2.0**538)
DOWN = tl.constexpr(2.0**-538)
SAFE_LOW = tl.constexpr(2.0**-900)
SAFE_HIGH = tl.constexpr(2.0**900)

# A sum of |x| is of |x|·SHRINK where the largest |x| is HUGE or more: see `Largest::unit` there.
HUGE = tl.constexpr(2.0**960)
SHRINK = tl.constexpr(2.0**-64)

INF = tl.constexpr(float("inf"))
# Bytes of a vector load. Tiles begin at multiples of this, so that loads are aligned.
VECTOR = tl.constexpr(16)


@triton.jit
def bits_of(x):
    """The bits of |x| as an integer. Integers compare as the numbers do, with NaN above inf, so a maximum of them keeps NaN."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def number_of(bits):
    """The inverse of `bits_of`, in float64."""
    if bits.dtype == tl.int64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def octave_of(x):
    """A power of two that brings x into [1, 2), for float64 0 < x < inf; subnormal x come to 2^-52 or more."""
    exponent = x.to(tl.int64, bitcast=True) >> 52
    return (tl.minimum(tl.maximum(2046 - exponent, 1), 2045) << 52).to(tl.float64, bitcast=True)


@triton.jit
def chunk_of(rows, chunk):
    """The row of a chunk: number of its tensor, distance from that tensor's address in bytes, elements, element type."""
    place = rows + ROW * chunk.to(tl.int64)
    packed = tl.load(place + 2)
    return tl.load(place), tl.load(place + 1), (packed >> 3).to(tl.int32), packed & 7


@triton.jit
def tiles_of(address, count, TYPE: tl.constexpr, TILE: tl.constexpr):
    """Divides a chunk, at any address, into aligned tiles and two edges.

    Returns (base, begin, end, first, last). `base` points to the last vector boundary at or before the chunk, and the others are positions
    in elements from there: the chunk is begin .. end, whole tiles cover first .. last, and the rest is to be loaded under a mask.
    """
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    surplus = address % VECTOR
    base = tl.multiple_of((address - surplus).to(tl.pointer_type(TYPE)), VECTOR)
    begin = (surplus // SIZE).to(tl.int32)
    end = begin + count
    first = (begin > 0).to(tl.int32) * TILE
    last = tl.maximum(end // TILE * TILE, first)
    return base, begin, end, first, last
