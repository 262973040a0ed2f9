"""What the kernels share: the table of chunks, element types, where elements are and what numbers they are."""

import triton
import triton.language as tl

# Element types, as the table of chunks numbers them. A set of them is a bit mask.
ELEMENTS = tl.constexpr((tl.float16, tl.bfloat16, tl.float32, tl.float64))

# A table of chunks: address, elements << 3 | element type, index of the tensor.
ROW = tl.constexpr(3)

# The scales of sums of squares: see `Squares` in rust/core/src/moments.rs.
UP = tl.constexpr(2.0**538)
DOWN = tl.constexpr(2.0**-538)
SAFE_LOW = tl.constexpr(2.0**-900)
SAFE_HIGH = tl.constexpr(2.0**900)

INF = tl.constexpr(float("inf"))
# Loads are vectors of this many bytes.
VECTOR = tl.constexpr(16)


@triton.jit
def bits_of(x):
    """The bits of |x|. As integers they are ordered like the numbers, with inf above every number and NaN above inf."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def number_of(bits):
    """The number with these bits, in float64."""
    if bits.dtype == tl.int64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def power(x, order):
    """x^order for x ≥ 0; 0 for 0 and for what is infinite, which callers have dealt with."""
    usable = (x > 0.0) & (x < INF)
    return tl.where(usable, tl.exp2(order * tl.log2(tl.where(usable, x, 1.0))), 0.0)


@triton.jit
def tiles_of(address, count, TYPE: tl.constexpr, TILE: tl.constexpr):
    """How to walk a chunk in aligned tiles, wherever it begins.

    Returns a pointer to the last vector border at or before the chunk, the positions of the chunk's first element and of its end from
    there, and the range of positions that whole tiles cover. What lies outside of that range are the edges, to be read under a mask.
    """
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    surplus = address % VECTOR
    base = tl.multiple_of((address - surplus).to(tl.pointer_type(TYPE)), VECTOR)
    begin = (surplus // SIZE).to(tl.int32)
    end = begin + count
    first = (begin > 0).to(tl.int32) * TILE
    last = tl.maximum(end // TILE * TILE, first)
    return base, begin, end, first, last
