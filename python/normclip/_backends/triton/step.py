"""The kernel of optimizer steps: moves chunks of parameters and their states by their gradients, or measures what that would do.

The formulas are those of adamw.rs and sgd.rs in rust/core/src/kernels, and give the same bits: numbers of a step are rounded to float32, or
stay float64 for elements of float64, every operation is rounded there, and what is stored is rounded once. SGD of float32 elements alone
differs: Rust computes it in float64, and this in float32, in which a GPU is as fast as its memory. So it is off by at most 8 · 2^-24 of the
sum of its terms. Before 3.6, Triton takes subnormal float32 numbers for 0 in quotients and roots. Kernels must be compiled without fusing
multiplications and additions, or bits differ.
"""

import triton
import triton.language as tl

from normclip._backends.triton.elements import ELEMENTS, VECTOR, chunk_of

# The formulas.
SGD = tl.constexpr(0)
ADAMW = tl.constexpr(1)

# How many numbers a step of each has, in float64. SGD: sign, η, μ, 1 - τ, λ, whether Nesterov's. AdamW: sign, η, β1, β2, 1 - β1, 1 - β2, ε,
# λ. The sign is that of the gradient: -1 to maximize.
NUMBERS = tl.constexpr((6, 8))


@triton.jit
def _complement(beta, t):
    """1 - β^t: see `complement` in rust/core/src/kernels/adamw.rs."""
    found = tl.zeros_like(beta)
    power = 1.0 - beta
    while t > 0:
        found = tl.where(t & 1 == 1, found + power * (1.0 - found), found)
        power += power * (1.0 - power)
        t = t >> 1
    return found


@triton.jit
def _sgd_numbers(numbers, coefficient, pace, WIDE: tl.constexpr):
    c = (tl.load(numbers) * coefficient).to(WIDE)
    lr = (pace * tl.load(numbers + 1)).to(WIDE)
    momentum = tl.load(numbers + 2).to(WIDE)
    share = tl.load(numbers + 3).to(WIDE)
    decay = tl.load(numbers + 4).to(WIDE)
    return c, lr, momentum, share, decay, tl.load(numbers + 5) != 0.0


@triton.jit
def _adamw_numbers(numbers, coefficient, pace, t, WIDE: tl.constexpr):
    c = (tl.load(numbers) * coefficient).to(WIDE)
    lr = pace * tl.load(numbers + 1)
    kept = (1.0 - lr * tl.load(numbers + 7)).to(WIDE)
    beta1 = tl.load(numbers + 2)
    beta2 = tl.load(numbers + 3)
    share1 = tl.load(numbers + 4).to(WIDE)
    share2 = tl.load(numbers + 5).to(WIDE)
    eps = tl.load(numbers + 6).to(WIDE)
    scale = (1.0 / _complement(beta1, t)).to(WIDE)
    root = (1.0 / tl.sqrt(_complement(beta2, t))).to(WIDE)
    return c, lr.to(WIDE), beta1.to(WIDE), beta2.to(WIDE), share1, share2, eps, kept, scale, root


@triton.jit
def _sgd(x, g, v, numbers, STATES: tl.constexpr):
    """The direction, the new parameter, and its buffer."""
    c, lr, momentum, share, decay, nesterov = numbers
    d = c * g
    d = tl.where(decay != 0.0, d + decay * x, d)
    u = d
    if STATES == 1:
        v = momentum * v + share * d
        u = tl.where(nesterov, d + momentum * v, v)
    return u, x - lr * u, v


@triton.jit
def _adamw(x, g, m, v, largest, numbers, STATES: tl.constexpr):
    """The direction, the new parameter, its averages, and its largest average of squares."""
    c, lr, beta1, beta2, share1, share2, eps, kept, scale, root = numbers
    g = c * g
    m = beta1 * m + share1 * g
    v = beta2 * v + share2 * g * g
    top = v
    if STATES == 3:
        largest = tl.where((v > largest) | (v != v), v, largest)
        top = largest
    # Triton's own float32 quotients and roots are not rounded to nearest.
    if x.dtype == tl.float64:
        u = m * scale / (tl.sqrt(top) * root + eps)
    else:
        u = tl.div_rn(m * scale, tl.sqrt_rn(top) * root + eps)
    return u, kept * x - lr * u, m, v, largest


@triton.jit
def _computed(x, g, a, b, c, at, inside, numbers, FORMULA: tl.constexpr, STATES: tl.constexpr):
    """The gradient and the direction of a tile, and its new values. Of the pointers to states, those beyond STATES are not used."""
    TYPE: tl.constexpr = x.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    wide_x = tl.load(x + at, mask=inside).to(WIDE)
    wide_g = tl.load(g + at, mask=inside).to(WIDE)
    wide_a = wide_x
    wide_b = wide_x
    wide_c = wide_x
    if STATES > 0:
        wide_a = tl.load(a + at, mask=inside).to(WIDE)
    if STATES > 1:
        wide_b = tl.load(b + at, mask=inside).to(WIDE)
    if STATES > 2:
        wide_c = tl.load(c + at, mask=inside).to(WIDE)
    if FORMULA == SGD:
        u, wide_x, wide_a = _sgd(wide_x, wide_g, wide_a, numbers, STATES)
    else:
        u, wide_x, wide_a, wide_b, wide_c = _adamw(wide_x, wide_g, wide_a, wide_b, wide_c, numbers, STATES)
    return wide_g, u, wide_x, wide_a, wide_b, wide_c


@triton.jit
def _move(x, g, a, b, c, at, inside, numbers, FORMULA: tl.constexpr, STATES: tl.constexpr):
    """Moves a tile."""
    TYPE: tl.constexpr = x.dtype.element_ty
    STATE: tl.constexpr = a.dtype.element_ty
    _g, _u, wide_x, wide_a, wide_b, wide_c = _computed(x, g, a, b, c, at, inside, numbers, FORMULA, STATES)
    tl.store(x + at, wide_x.to(TYPE), mask=inside)
    if STATES > 0:
        tl.store(a + at, wide_a.to(STATE), mask=inside)
    if STATES > 1:
        tl.store(b + at, wide_b.to(STATE), mask=inside)
    if STATES > 2:
        tl.store(c + at, wide_c.to(STATE), mask=inside)


@triton.jit
def _measured(x, g, a, b, c, at, inside, numbers, along, squares, FORMULA: tl.constexpr, STATES: tl.constexpr):
    """Adds u·g and u² of a tile to the accumulators, for its direction u and its gradient g in memory. Nothing is written."""
    g, u, _x, _a, _b, _c = _computed(x, g, a, b, c, at, inside, numbers, FORMULA, STATES)
    g = g.to(tl.float64)
    u = u.to(tl.float64)
    if inside is not None:
        g = tl.where(inside, g, 0.0)
        u = tl.where(inside, u, 0.0)
    return along + u * g, squares + u * u


@triton.jit(do_not_specialize=["rows", "addresses", "factors", "coefficient", "taken", "paces", "partials"])
def step(
    rows,
    addresses,
    factors,
    coefficient,
    taken,
    paces,
    partials,
    FORMULA: tl.constexpr,
    STATES: tl.constexpr,
    TYPE: tl.constexpr,
    STATE: tl.constexpr,
    CLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Moves all chunks, one program for each, by gradients times the number at `coefficient`; or none if there is 0 at `taken`.

    The learning rate of a parameter is multiplied by the number at its place in `paces`, if any. With `partials`, nothing moves: Σu·g, Σu²
    and the number of elements of each chunk are written there, in three columns, with g as the gradient of what is minimized.

    TYPE, STATE and CLOCK are numbers of element types: of parameters and gradients, of states, and of what counts the steps of a parameter.
    The addresses of a parameter are its own, its states', its gradient's, and for AdamW its counter's; after these come the number of its
    row in `factors`, which holds NUMBERS, and its place. ALIGNED says that all begin on borders of vectors. Chunks are changed in reverse
    order, as those that a measurement has read last are still in the cache.
    """
    TYPE_OF_X: tl.constexpr = ELEMENTS[TYPE]
    TYPE_OF_A: tl.constexpr = ELEMENTS[STATE]
    SIZE: tl.constexpr = TYPE_OF_X.primitive_bitwidth // 8
    WIDE: tl.constexpr = tl.float64 if TYPE_OF_X == tl.float64 else tl.float32
    # A thread stores 16 bytes of the wider of the two types, so that both are in registers in the same order.
    STATE_SIZE: tl.constexpr = TYPE_OF_A.primitive_bitwidth // 8
    TILE: tl.constexpr = BYTES // (SIZE if SIZE > STATE_SIZE else STATE_SIZE)
    WIDTH: tl.constexpr = 4 + STATES + FORMULA
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    busy = True
    if taken is not None:
        busy = tl.load(taken) != 0.0
    if busy:
        tensor, offset, count, _type = chunk_of(rows, chunk)
        own = addresses + WIDTH * tensor
        first = offset // SIZE
        x = tl.load(own).to(tl.pointer_type(TYPE_OF_X)) + first
        g = tl.load(own + 1 + STATES).to(tl.pointer_type(TYPE_OF_X)) + first
        a = x.to(tl.pointer_type(TYPE_OF_A))
        b = a
        c = a
        if STATES > 0:
            a = tl.load(own + 1).to(tl.pointer_type(TYPE_OF_A)) + first
        if STATES > 1:
            b = tl.load(own + 2).to(tl.pointer_type(TYPE_OF_A)) + first
        if STATES > 2:
            c = tl.load(own + 3).to(tl.pointer_type(TYPE_OF_A)) + first
        numbers = factors + NUMBERS[FORMULA] * tl.load(own + WIDTH - 2)
        pace = tl.full([], 1.0, tl.float64)
        if paces is not None:
            pace = tl.load(paces + tl.load(own + WIDTH - 1))
        if FORMULA == SGD:
            known = _sgd_numbers(numbers, tl.load(coefficient), pace, WIDE)
        else:
            steps = tl.load(tl.load(own + 2 + STATES).to(tl.pointer_type(ELEMENTS[CLOCK]))).to(tl.int64)
            known = _adamw_numbers(numbers, tl.load(coefficient), pace, steps + 1, WIDE)
        if ALIGNED:
            x = tl.multiple_of(x, VECTOR)
            g = tl.multiple_of(g, VECTOR)
            a = tl.multiple_of(a, VECTOR)
            b = tl.multiple_of(b, VECTOR)
            c = tl.multiple_of(c, VECTOR)
        lanes = tl.arange(0, TILE)
        whole = count // TILE * TILE
        if partials is None:
            for start in range(0, whole, TILE):
                _move(x, g, a, b, c, start + lanes, None, known, FORMULA, STATES)
            if whole < count:
                at = whole + lanes
                _move(x, g, a, b, c, at, at < count, known, FORMULA, STATES)
        else:
            along = tl.zeros([TILE], tl.float64)
            squares = tl.zeros([TILE], tl.float64)
            for start in range(0, whole, TILE):
                along, squares = _measured(x, g, a, b, c, start + lanes, None, known, along, squares, FORMULA, STATES)
            if whole < count:
                at = whole + lanes
                along, squares = _measured(x, g, a, b, c, at, at < count, known, along, squares, FORMULA, STATES)
            stride = tl.full([], 0, tl.int64) + tl.num_programs(0)
            place = partials + chunk
            tl.store(place, tl.load(numbers) * tl.sum(along, 0))
            tl.store(place + stride, tl.sum(squares, 0))
            tl.store(place + 2 * stride, count.to(tl.float64))
