"""Sums in pairs of float32, for devices on which float64 is slow: a pair (high, low) stands for high + low.

Contract: squares or absolute values of float16, bfloat16 or float32, at most 2^15 of them → one pair. A term is added to the high part by
Knuth's two-sum, and what that rounds off, and what was rounded off the square itself, go to the low part.

Error bound: of n terms in a lane, each rounds the low part by at most 3·2^-48 of the sum, so 68 of them, the most that a lane adds of
2^15 elements in 512 lanes, lose less than 206·2^-48; folding 512 lanes adds 9 times 3·2^-48: 8.3e-13 in all, and half of that in the norm.
Squares below 2^-102 lose up to 2^-150 each to underflow, so a sum of them below 2^-108 for each element is to be taken in float64, and so
is one that overflows. Neither happens to sums of float16 or of absolute values.

Kernels that use this must be compiled without fusing multiplications and additions, or what is added is not what the error is known of.
"""

import triton
import triton.language as tl
from triton import knobs

# The most elements that are summed in pairs before the sum goes to float64.
BLOCK = tl.constexpr(1 << 15)
# A sum of squares below this for each element may have lost digits to underflow.
FAINT = tl.constexpr(2.0**-108)
# The interpreter of Triton 3.6 rounds twice in `tl.fma`.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def two_sum(x, y):
    """The rounded sum of two numbers, and its error."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


@triton.jit
def fast_two_sum(x, y):
    """As `two_sum`, where |x| ≥ |y| or x is 0."""
    total = x + y
    return total, y - (total - x)


@triton.jit
def add_pairs(high, low, more_high, more_low):
    """The sum of two pairs: what `tl.reduce` combines lanes with."""
    # Written out, as calls in what combines single lanes cost the interpreter seconds.
    total = high + more_high
    part = total - high
    error = (high - (total - part)) + (more_high - part) + (low + more_low)
    rounded = total + error
    return rounded, error - (rounded - total)


@triton.jit
def square_of(x, EXACT: tl.constexpr):
    """The rounded square of float32 numbers, and its error. With EXACT, of numbers that have so few digits that there is none."""
    square = x * x
    if EXACT:
        return square, tl.zeros_like(square)
    elif _INTERPRETED:
        wide = x.to(tl.float64)
        return square, (wide * wide - square.to(tl.float64)).to(tl.float32)
    else:
        return square, tl.fma(x, x, -square)
