"""What only reads: norms, statistics, moments and inner products."""

import math
from typing import Any

import numpy as np
import torch

import normclip
from fuzz import oracles
from fuzz.draw import Draw
from fuzz.registry import check, expect, expect_refusal, off_by_1e9
from fuzz.tensors import elements, given, lots, parameters, place, shape_of, spread
from support.oracle import TOLERANCE
from support.tensors import DTYPES, REAL_DTYPES


@check("norms", weight=20, plants={"total_norm": off_by_1e9})
def total_norm(draw: Draw) -> None:
    made = lots(draw)
    arrays = [spread(draw, each.tensor) for each in made]
    # The same memory twice counts once, and expanded tensors count each of their elements.
    tensors = given(draw, made) if all(array is each.tensor for array, each in zip(arrays, made, strict=True)) else arrays
    order = draw.order()
    found = draw.call(normclip.total_norm, tensors, order)
    exact = oracles.exact_norm(arrays, order)
    expect(oracles.near_norm(found, exact, draw.mode), f"total_norm({tensors!r}, {order!r}) is {found!r}, not {exact!r}")
    if any(isinstance(tensor, torch.Tensor) for tensor in tensors):
        double = any(str(tensor.dtype).endswith(("float64", "complex128")) for tensor in tensors)
        expect(found.dtype is (torch.float64 if double else torch.float32), f"its type is {found.dtype}")
    else:
        expect(type(found) is float, f"its type is {type(found)}")
    expect(all(each.untouched for each in made), "total_norm has written")
    if draw.chance(0.1):
        normclip.set_num_threads(normclip.get_num_threads() % 3 + 1)
        again = draw.call(normclip.total_norm, tensors, order)
        expect(np.array_equal(again, found, equal_nan=True), f"with other threads it is {again!r}, not {found!r}")


@check("norms", weight=4, plants={"get_total_norm": off_by_1e9})
def get_total_norm(draw: Draw) -> None:
    made = lots(draw, library="torch")
    order = draw.order()
    raising = draw.chance(0.3)
    exact = oracles.norm(made, order)

    def call() -> Any:
        return draw.call(normclip.get_total_norm, given(draw, made), "inf" if order == math.inf else order, error_if_nonfinite=raising)

    if raising and not math.isfinite(exact):
        try:
            call()
        except RuntimeError:
            return
        expect(False, f"a norm of {exact!r} was no error")
    found = call()
    expect(oracles.near_norm(found, exact, draw.mode), f"get_total_norm is {found!r}, not {exact!r}")


@check("statistics", weight=10, plants={"stats": lambda stats: _other_figures(stats), "grad_stats": lambda stats: _other_figures(stats)})
def stats(draw: Draw) -> None:
    of_gradients = draw.chance(0.3)
    made = lots(draw, library="torch" if of_gradients else None)
    orders = [draw.order() for _ in range(draw.pick([0, 0, 1]))]
    groups = draw.pick([None, None, lambda name: f"group {int(name) % 2}"])
    each = draw.chance(0.5)
    settings: dict[str, Any] = {"per_tensor": each, "norms": orders, "groups": groups}
    if of_gradients:
        items = parameters(draw, made)
        found = draw.call(normclip.grad_stats, items, **settings)
        names = [str(place) for place, item in enumerate(items) if item.grad is not None]
        named = [str(place) for place in range(len(items))]  # groups are of parameters, whichever have gradients
    else:
        found = draw.call(normclip.stats, [lot.tensor for lot in made], **settings)
        names = named = [str(place) for place in range(len(made))]
    arrays = [lot.array() for lot in made]
    _expect_figures("stats", found, arrays)
    for order, value in found.norms.items():
        exact = oracles.norm(made, order)
        expect(oracles.near(value, exact), f"the norm of order {order!r} is {value!r}, not {exact!r}")
    if groups is not None:
        expect(set(found.groups) == {groups(name) for name in named}, f"the groups are {list(found.groups)}")
        for group, moments in found.groups.items():
            _expect_figures(group, moments, [array for name, array in zip(names, arrays, strict=True) if groups(name) == group])
    if each:
        expect(found.per_tensor.names == tuple(names), f"the names are {found.per_tensor.names}")
        for index, array in enumerate(arrays):
            row = type("Row", (), {name: getattr(found.per_tensor, name)[index] for name in oracles.FIGURES})
            _expect_figures(f"tensor {index}", row, [array])
    expect(all(lot.untouched for lot in made), "stats has written")


def _expect_figures(what: str, found: Any, arrays: list[np.ndarray]) -> None:
    wrong = oracles.wrong_figures(found, oracles.figures(arrays))
    expect(not wrong, f"{what} of {arrays!r}: {', '.join(wrong)}")


def _other_figures(stats: Any) -> Any:
    def wrong(tensors: Any, **settings: Any) -> Any:
        found = stats(tensors, **settings)
        object.__setattr__(found, "rms", found.rms * (1 + 1e-9))
        return found

    return wrong


class _Planted:
    """`Moments` with a bug in the merging of parts."""

    def __init__(self, moments: Any) -> None:
        self.moments = moments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.moments, name)

    def __call__(self) -> Any:
        return self.moments.of(np.ones(1))


@check("moments", weight=10, plants={"Moments": _Planted})
def moments_of_parts(draw: Draw) -> None:
    made = lots(draw)
    tensors, arrays = [lot.tensor for lot in made], [lot.array() for lot in made]
    whole = draw.call(normclip.Moments.of, tensors)
    found = draw.call(lambda: type("Figures", (), {name: getattr(whole, name) for name in oracles.FIGURES}))
    _expect_figures("Moments", found, arrays)

    # Whole tensors in any order of merging: the same bits of every figure.
    parts = [draw.call(normclip.Moments.of, tensor) for tensor in tensors]
    parts = [draw.call(normclip.Moments.from_array, part.to_array()) if draw.chance(0.3) else part for part in parts]
    while len(parts) > 1:
        first = parts.pop(draw.integer(0, len(parts) - 1))
        place = draw.integer(0, len(parts) - 1)
        parts[place] = draw.call(lambda a=first, b=parts[place]: a + b)
    merged = draw.call(sum, parts, normclip.Moments())
    for name in oracles.FIGURES:
        ours, theirs = (draw.call(getattr, moments, name) for moments in (merged, whole))
        expect(np.array_equal(ours, theirs, equal_nan=True), f"{name} of the parts of {arrays!r} is {ours!r}, of the whole {theirs!r}")
    expect(np.array_equal(whole.to_array(), normclip.Moments.from_array(whole.to_array()).to_array(), equal_nan=True), "the array differs")

    # Pieces of tensors: other sums, of the same value.
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays if array.dtype != object]
    pieces = [piece for array in flat for piece in np.split(array, sorted(draw.integer(0, array.size) for _ in range(draw.integer(0, 2))))]
    merged = draw.call(lambda: sum((normclip.Moments.of(piece) for piece in pieces), normclip.Moments()))
    _expect_figures("merged pieces", merged, arrays)


@check("moments", weight=3, plants={"Moments": lambda moments: _Accepting(moments)})
def moments_from_hostile_arrays(draw: Draw) -> None:
    values = elements(draw, "float64", draw.integer(1, 20))
    array = normclip.Moments.of(values).to_array()
    kind = draw.pick(["counts", "negative", "fraction", "huge", "sum", "largest", "NaN", "length", "text", "zero"])
    if kind == "zero":
        # Both zeros are one number, so what holds either is equal and hashes alike; or it is refused.
        other = array.copy()
        places = np.flatnonzero(array == 0.0)
        if not places.size:
            return
        other[draw.pick(places.tolist())] = -0.0
        try:
            a, b = normclip.Moments.from_array(array), normclip.Moments.from_array(other)
        except ValueError:
            return
        expect(a != b or hash(a) == hash(b), f"{array!r} and {other!r} are equal with different hashes")
        return
    hostile: Any = array.copy()
    if kind == "counts":
        hostile[draw.integer(1, 3)] = array[0] + draw.integer(1, 5)
    elif kind == "negative":
        hostile[draw.integer(0, 3)] = -draw.integer(1, 9)
    elif kind == "fraction":
        hostile[draw.integer(0, 3)] += 0.5
    elif kind == "huge":
        hostile[0] = draw.pick([1e300, math.inf, 2.0**80])
    elif kind == "sum":
        hostile[draw.pick([4, 6, 8, 10])] = -draw.magnitude(-10, 10)
    elif kind == "largest":
        hostile[12] = -draw.magnitude(-10, 10)
    elif kind == "NaN":
        hostile[draw.integer(0, 3)] = math.nan
    elif kind == "length":
        hostile = np.resize(hostile, draw.pick([0, 1, 12, 14]))
    else:
        hostile = draw.pick([["a"] * 13, None, "x" * 13, [[1.0] * 13], 13])
    expect_refusal(f"an array with a wrong {kind}, {hostile!r},", lambda: normclip.Moments.from_array(hostile))


class _Accepting(_Planted):
    def from_array(self, array: Any) -> Any:
        try:
            return self.moments.from_array(array)
        except Exception:
            return self.moments()


@check("dot", weight=25, plants={"dot": off_by_1e9, "dot_stats": off_by_1e9})
def dot(draw: Draw) -> None:
    xs, ys = [], []
    complexes = draw.chance(0.15)
    kinds = [name for name in DTYPES if name not in REAL_DTYPES] if complexes else list(REAL_DTYPES)
    kinds = kinds if draw.chance(0.5) else kinds[-1:]
    libraries = draw.pick([("numpy", "numpy"), ("torch", "torch"), ("numpy", "torch")])
    for _ in range(draw.pick([0, 1, 1, 1, 1, 2, 3])):
        size = draw.size()
        shape = shape_of(draw, size)
        for side, library in zip((xs, ys), draw.shuffled(libraries), strict=True):
            dtype = draw.pick(kinds)
            values = _log_uniform(draw, size) if dtype == "float64" and draw.chance(0.5) else elements(draw, dtype, size)
            side.append(place(draw, values, dtype, shape, "torch" if dtype == "bfloat16" else library))
    exact, bound, norms = _products([lot.array() for lot in xs], [lot.array() for lot in ys])
    described = f"of {[lot.array() for lot in xs]!r} and {[lot.array() for lot in ys]!r}"
    pair = [lot.tensor for lot in xs], [lot.tensor for lot in ys]
    if draw.chance(0.3):
        found, values = draw.call(normclip.dot, *pair), None
    else:
        values = draw.call(normclip.dot_stats, *pair)
        found = values.dot
    # Where Σ|xy| is beyond float64 the product may be infinite, or NaN.
    if bound < np.finfo(np.float64).max:
        slack = TOLERANCE * bound + 1e-300
        expect(oracles.near(found, exact, 0.0, slack), f"dot {described} is {found!r}, not {exact!r}")
    elif not np.isfinite(bound):
        expect(not math.isfinite(found), f"dot {described} is {found!r}, not {exact!r}")
    if values is None:
        return
    for name, norm in zip(("norm_x", "norm_y"), norms, strict=True):
        value = getattr(values, name)
        expect(oracles.near(value, norm), f"{name} {described} is {value!r}, not {norm!r}")
    if all(math.isfinite(float(norm)) and norm > 0 for norm in norms):
        cosine = exact / norms[0] / norms[1]
        # Norms that are subnormal have fewer bits.
        slack = 4 * TOLERANCE + sum(oracles.TINY / norm for norm in norms)
        expect(abs(values.cosine - cosine) <= slack, f"cosine {described} is {values.cosine!r}, not {cosine!r}")
    else:
        fits = all(np.isfinite(norm) and norm > 0 for norm in norms)  # in the wider float: then the cosine may be known
        expect(fits or math.isnan(values.cosine), f"cosine {described} is {values.cosine!r}, not NaN")


def _log_uniform(draw: Draw, size: int) -> np.ndarray:
    return 10.0 ** draw.rng.uniform(-308.0, 308.0, size) * draw.rng.choice([-1.0, 1.0], size)


def _products(xs: list[np.ndarray], ys: list[np.ndarray]) -> tuple[Any, Any, tuple[Any, Any]]:
    """Σxy, Σ|xy|, and the norms."""
    wide = [np.concatenate([_parts(array) for array in side]) if side else np.empty(0, np.longdouble) for side in (xs, ys)]
    with np.errstate(all="ignore"):
        terms = wide[0] * wide[1]
        return terms.sum(), np.abs(terms).sum(), tuple(np.sqrt((side * side).sum()) for side in wide)  # type: ignore[return-value]


def _parts(array: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(array):
        array = np.stack([array.real, array.imag])
    return array.astype(np.longdouble).reshape(-1) if array.ndim else array.astype(np.longdouble).reshape(1)
