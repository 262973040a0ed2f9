"""Kernels of limits on the update: partials of chunks → what a step would do to each parameter → what to multiply learning rates by.

Computed in float64, in a fixed order, by the formula of limits.rs in rust/core/src. NaN in what was measured limits nothing.
"""

import triton
import triton.language as tl

from normclip._backends.triton.merge import add_up

# The columns of what a step would do to a parameter: Σu·g, Σu² and the number of elements.
COLUMNS = tl.constexpr(3)


@triton.jit(do_not_specialize=["partials", "chunks", "segments", "addresses", "movements"])
def merge(partials, chunks, segments, addresses, movements, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Writes the sums of the chunks segments[tensor] .. segments[tensor + 1] to the row of the tensor in `movements`.

    Which row that is stands last of its WIDTH numbers in `addresses`.
    """
    tensor = tl.program_id(0).to(tl.int64)
    first = tl.load(segments + tensor).to(tl.int32)
    last = tl.load(segments + tensor + 1).to(tl.int32)
    row = movements + COLUMNS * tl.load(addresses + WIDTH * tensor + WIDTH - 1)
    stride = tl.full([], 0, tl.int64) + chunks
    for column in tl.static_range(COLUMNS):
        tl.store(row + column, add_up(partials + column * stride, first, last, LANES))


@triton.jit
def _limited(movements, places, inside, limit):
    """Σu·g, RMS(u), and the pace that its limit allows, of some parameters."""
    row = movements + COLUMNS * places
    along = tl.load(row, mask=inside, other=0.0)
    squares = tl.load(row + 1, mask=inside, other=0.0)
    size = tl.sqrt(squares / tl.maximum(tl.load(row + 2, mask=inside, other=0.0), 1.0))
    return along, size, tl.where(size > limit, limit / size, 1.0)


@triton.jit(do_not_specialize=["movements", "count", "scale", "paces", "sizes", "descent"])
def limit(movements, count, scale, paces, sizes, descent, descent_limit: tl.float64, size_limit: tl.float64, LANES: tl.constexpr):
    """Writes the pace and RMS(u) of each of `count` parameters, and ⟨u, g⟩, in one program. What has no limit has one of inf.

    Gradients in memory are the number at `scale` times as large as they are.
    """
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for start in range(0, count, LANES):
        places = start + lanes
        along, _size, pace = _limited(movements, places, places < count, size_limit)
        total += pace * along
    found = tl.sum(total, 0) / tl.load(scale)
    descent_limit = tl.full([], descent_limit, tl.float64)
    factor = tl.where(found > descent_limit, descent_limit / found, 1.0)
    for start in range(0, count, LANES):
        places = start + lanes
        inside = places < count
        _along, size, pace = _limited(movements, places, inside, size_limit)
        tl.store(paces + places, pace * factor, mask=inside)
        tl.store(sizes + places, size, mask=inside)
    tl.store(descent, found)
