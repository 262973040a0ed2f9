"""Kernels for inner products of pairs of chunks, of the same element type and with addresses that are equal modulo the vector size.

Error bound: 1e-12·Σ|xy|, also where products or their sum come near the limits of float64.
"""

import triton
import triton.language as tl

from normclip._backends.triton.elements import DOWN, ELEMENTS, SAFE_HIGH, SAFE_LOW, UP, chunk_of, tiles_of
from normclip._backends.triton.merge import add_up, root_of


@triton.jit
def _add(x, y, xy, xx, yy, factor, SCALED: tl.constexpr):
    """Adds the products of two tiles of elements to the accumulators."""
    TYPE: tl.constexpr = x.dtype
    x = x.to(tl.float64 if TYPE == tl.float64 else tl.float32).to(tl.float64)
    y = y.to(tl.float64 if TYPE == tl.float64 else tl.float32).to(tl.float64)
    if SCALED:
        x *= factor
        y *= factor
    return xy + x * y, xx + x * x, yy + y * y


@triton.jit
def _multiply(x_address, y_address, count, factor, TYPE: tl.constexpr, SCALED: tl.constexpr, BYTES: tl.constexpr, UNROLL: tl.constexpr):
    """Σxy, Σx² and Σy² of two chunks that begin at the same distance from a vector boundary. With SCALED, of elements times factor."""
    TILE: tl.constexpr = BYTES // (TYPE.primitive_bitwidth // 8)
    lanes = tl.arange(0, TILE)
    x_base, begin, end, first, last = tiles_of(x_address, count, TYPE, TILE)
    y_base, _a, _b, _c, _d = tiles_of(y_address, count, TYPE, TILE)
    xy = tl.zeros([TILE], tl.float64)
    xx = tl.zeros([TILE], tl.float64)
    yy = tl.zeros([TILE], tl.float64)
    for start in tl.range(first, last, TILE, loop_unroll_factor=UNROLL):
        xy, xx, yy = _add(tl.load(x_base + start + lanes), tl.load(y_base + start + lanes), xy, xx, yy, factor, SCALED)
    for edge in range(0, first + tl.maximum(end - last, 0), TILE):
        at = tl.where(edge < first, edge, edge - first + last) + lanes
        inside = (at >= begin) & (at < end)
        x = tl.load(x_base + at, mask=inside, other=0.0)
        y = tl.load(y_base + at, mask=inside, other=0.0)
        xy, xx, yy = _add(x, y, xy, xx, yy, factor, SCALED)
    return tl.sum(xy, 0), tl.sum(xx, 0), tl.sum(yy, 0)


@triton.jit
def _products(
    x_address, y_address, count, place, stride, TYPE: tl.constexpr, SCALES: tl.constexpr, BYTES: tl.constexpr, UNROLL: tl.constexpr
):
    """Writes nine columns: xy, xx and yy at the scales medium, small and large. At most one of the three scales of a sum is not 0."""
    xy, xx, yy = _multiply(x_address, y_address, count, 1.0, TYPE, False, BYTES, UNROLL)
    zero = tl.full([], 0.0, tl.float64)
    xy_small = zero
    xy_large = zero
    xx_small = zero
    xx_large = zero
    yy_small = zero
    yy_large = zero
    if TYPE == tl.float64:
        low = (xx < SAFE_LOW) | (yy < SAFE_LOW)
        high = (xx > SAFE_HIGH) | (yy > SAFE_HIGH)
        if low | high:
            xy_up, xx_up, yy_up = _multiply(x_address, y_address, count, UP, TYPE, True, BYTES, UNROLL)
            xy_down, xx_down, yy_down = _multiply(x_address, y_address, count, DOWN, TYPE, True, BYTES, UNROLL)
            xx_small = tl.where(xx < SAFE_LOW, xx_up, zero)
            xx_large = tl.where(xx > SAFE_HIGH, xx_down, zero)
            yy_small = tl.where(yy < SAFE_LOW, yy_up, zero)
            yy_large = tl.where(yy > SAFE_HIGH, yy_down, zero)
            # √Σx² √Σy² bounds Σ|xy|. Products are scaled up where this bound is so small that underflow would lose digits, and scaled down
            # where their sum comes near overflow. Elsewhere they are summed unscaled, even if x is very large and y very small.
            bound = root_of(tl.where(xx_small + xx_large == 0.0, xx, zero), xx_small, xx_large)
            bound *= root_of(tl.where(yy_small + yy_large == 0.0, yy, zero), yy_small, yy_large)
            xx = tl.where((xx < SAFE_LOW) | (xx > SAFE_HIGH), zero, xx)
            yy = tl.where((yy < SAFE_LOW) | (yy > SAFE_HIGH), zero, yy)
            xy_small = tl.where(bound < SAFE_LOW, xy_up, zero)
            kept = (bound >= SAFE_LOW) & (tl.abs(xy) <= SAFE_HIGH)
            xy_large = tl.where(kept | (bound < SAFE_LOW), zero, xy_down)
            xy = tl.where(kept, xy, zero)
    tl.store(place, xy)
    tl.store(place + stride, xx)
    tl.store(place + 2 * stride, yy)
    if SCALES:
        tl.store(place + 3 * stride, xy_small)
        tl.store(place + 4 * stride, xx_small)
        tl.store(place + 5 * stride, yy_small)
        tl.store(place + 6 * stride, xy_large)
        tl.store(place + 7 * stride, xx_large)
        tl.store(place + 8 * stride, yy_large)


@triton.jit(do_not_specialize=["rows", "addresses", "partials", "chunks"])
def products(rows, addresses, partials, chunks, TYPES: tl.constexpr, BYTES: tl.constexpr, UNROLL: tl.constexpr):
    """Writes a partial for each pair of chunks. A pair of tensors has two addresses, one after the other."""
    chunk = tl.program_id(0)
    pair, offset, count, code = chunk_of(rows, chunk)
    x = tl.load(addresses + 2 * pair) + offset
    y = tl.load(addresses + 2 * pair + 1) + offset
    place = partials + chunk
    stride = tl.full([], 0, tl.int64) + chunks
    SCALES: tl.constexpr = TYPES & 8 != 0
    for CODE in tl.static_range(4):
        if TYPES >> CODE & 1:
            if code == CODE:
                _products(x, y, count, place, stride, ELEMENTS[CODE], SCALES, BYTES, UNROLL)


@triton.jit(do_not_specialize=["partials", "chunks", "found"])
def dot(partials, chunks, found, TYPES: tl.constexpr, LANES: tl.constexpr):
    """Σxy, √Σx², √Σy² and the cosine, in one program."""
    stride = tl.full([], 0, tl.int64) + chunks
    xy = add_up(partials, 0, chunks, LANES)
    xx = add_up(partials + stride, 0, chunks, LANES)
    yy = add_up(partials + 2 * stride, 0, chunks, LANES)
    zero = tl.full([], 0.0, tl.float64)
    xy_small = zero
    xy_large = zero
    x_norm = tl.sqrt(xx)
    y_norm = tl.sqrt(yy)
    if TYPES & 8:
        xy_small = add_up(partials + 3 * stride, 0, chunks, LANES)
        xy_large = add_up(partials + 6 * stride, 0, chunks, LANES)
        x_norm = root_of(xx, add_up(partials + 4 * stride, 0, chunks, LANES), add_up(partials + 7 * stride, 0, chunks, LANES))
        y_norm = root_of(yy, add_up(partials + 5 * stride, 0, chunks, LANES), add_up(partials + 8 * stride, 0, chunks, LANES))
    # The norms are divided at the scale of each sum, so that no intermediate result overflows. The cosine is NaN where a norm is 0.
    large = tl.where(xy_large == 0.0, 0.0, xy_large / (x_norm * DOWN) / (y_norm * DOWN))
    small = tl.where(xy_small == 0.0, 0.0, xy_small / (x_norm * UP) / (y_norm * UP))
    cosine = large + xy / x_norm / y_norm + small
    tl.store(found, xy_large * UP * UP + (xy + xy_small * DOWN * DOWN))
    tl.store(found + 1, x_norm)
    tl.store(found + 2, y_norm)
    tl.store(found + 3, tl.where((x_norm > 0.0) & (y_norm > 0.0), cosine, float("nan")))
