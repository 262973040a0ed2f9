"""What writes: clipping, scaling, clamping and zeroing."""

import math
from typing import Any

import numpy as np
import torch

import normclip
from fuzz import oracles
from fuzz.draw import Draw
from fuzz.registry import check, expect, then_nudge
from fuzz.tensors import Lot, given, lots, parameters
from support.oracle import TOLERANCE


def _limit(draw: Draw, norm: float) -> float:
    kind = draw.random()
    if kind < 0.1 or not math.isfinite(norm):
        return draw.pick([0.0, 1.0, math.inf])
    if kind < 0.2:
        return draw.magnitude()
    return norm * draw.pick([draw.random(), draw.random(), 1.0, 1.5, draw.magnitude(-20, 2)])


def _befores(made: list[Lot]) -> list[np.ndarray]:
    return [each.array().copy() for each in made]


def _expect_clipped(what: str, made: list[Lot], before: list[np.ndarray], bounds: tuple[float, float]) -> None:
    for index, (each, values) in enumerate(zip(made, before, strict=True)):
        wrong = oracles.wrongly_clipped(each, values, bounds)
        expect(not wrong, f"{what}: tensor {index}: {wrong}")


@check("clipping", weight=20, plants={"clip_": then_nudge})
def clip(draw: Draw) -> None:
    made = lots(draw)
    order = draw.order()
    before, norm = _befores(made), oracles.norm(made, order)
    limit = _limit(draw, norm)
    found = draw.call(normclip.clip_, given(draw, made), limit, order)
    expect(oracles.near_norm(found, norm, draw.mode), f"the norm of order {order!r} of {before!r} is {found!r}, not {norm!r}")
    _expect_clipped(f"clip_({limit!r}, {order!r})", made, before, oracles.coefficients(limit, norm))


@check("clipping", weight=20, plants={"clip_grad_norm_": then_nudge, "clip_grads_with_norm_": then_nudge})
def clip_gradients(draw: Draw) -> None:
    made = lots(draw, library="torch")
    items = parameters(draw, made)
    order = draw.order()
    before, norm = _befores(made), oracles.norm(made, order)
    limit, by_rule = _limit(draw, norm), draw.chance(0.2)
    epsilon = 0.0 if by_rule else 1e-6
    items = items + draw.shuffled(items)[:1] if draw.chance(0.1) else items
    if draw.chance(0.2):
        known = norm if math.isfinite(norm) else draw.pick([norm, torch.tensor(norm)])
        draw.call(normclip.clip_grads_with_norm_, items, limit, known)
        epsilon = 1e-6
    else:
        settings: dict[str, Any] = {"rule": normclip.rules.Hard(limit)} if by_rule else {"max_norm": limit}
        found = draw.call(normclip.clip_grad_norm_, items, norm_type=order, **settings)
        expect(oracles.near_norm(found, norm, draw.mode), f"the norm of order {order!r} of {before!r} is {found!r}, not {norm!r}")
    _expect_clipped(f"clip to {limit!r}, order {order!r}", made, before, oracles.coefficients(limit, norm, epsilon))


@check("scaling", weight=15, plants={"scale_": then_nudge})
def scale(draw: Draw) -> None:
    made = lots(draw)
    factor = draw.pick([0.0, 1.0, 0.5, draw.uniform(-2, 2), draw.magnitude(), -draw.magnitude(-50, 50), 2.0 ** draw.integer(-160, 140)])
    before = _befores(made)
    draw.call(normclip.scale_, given(draw, made), factor)
    for each, values in zip(made, before, strict=True):
        expected = values if factor == 1.0 else oracles.scaled(values, each.dtype, factor)
        expect(oracles.same(each.array(), expected), f"{values!r} ({each.dtype}) times {factor!r} is {each.array()!r}, not {expected!r}")
        expect(factor != 1.0 or each.untouched, "a factor of 1 has written")
        expect(not oracles.wrongly_placed(each), "memory around it was written")


@check("clamping", weight=10, plants={"clamp_": then_nudge, "clip_grad_value_": then_nudge})
def clamp(draw: Draw) -> None:
    of_gradients = draw.chance(0.4)
    made = lots(draw, real=True, library="torch" if of_gradients else None)
    limit = draw.pick([0.0, math.inf, draw.random(), draw.magnitude(), draw.magnitude(-5, 5)])
    before = _befores(made)
    if of_gradients:
        draw.call(normclip.clip_grad_value_, parameters(draw, made), limit)
    else:
        draw.call(normclip.clamp_, given(draw, made), limit)
    for each, values in zip(made, before, strict=True):
        with np.errstate(all="ignore"):
            bound = np.float64(limit) if each.dtype == "float64" else oracles.rounded(np.float32(limit).reshape(1), each.dtype)[0]
        expected = np.where(np.abs(values) > bound, np.copysign(bound, values), values)
        expect(oracles.same(each.array(), expected), f"{values!r} clamped to {limit!r} is {each.array()!r}, not {expected!r}")
        expect(not oracles.wrongly_placed(each), "memory around it was written")


def _nudge_norm(function: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        object.__setattr__(found, "norm", found.norm * (1 + 1e-9))
        return found

    return wrong


@check("clipping", weight=15, plants={"clip_grads_": _nudge_norm})
def clip_and_tell(draw: Draw) -> None:
    """`clip_grads_`: all together or by groups, with every way to treat what is not finite."""
    nonfinite = draw.pick(["propagate", "propagate", "raise", "skip", "zero"])
    made = lots(draw, library="torch", real=nonfinite == "zero")
    items = [(f"{draw.pick('ab')}{place}", item) for place, item in enumerate(parameters(draw, made))]
    names = [name for name, item in items if item.grad is not None]
    order = draw.pick([1.0, 2.0, 2.0, math.inf])
    before = _befores(made)
    unfinished = any(not np.isfinite(values).all() for values in before)
    zeroed = [np.where(np.isfinite(values), values, 0.0).astype(values.dtype) if nonfinite == "zero" else values for values in before]

    norm = oracles.exact_norm(zeroed, order)
    groups = {"a", "b"} & {name[0] for name in names}
    norms = {group: oracles.exact_norm([v for n, v in zip(names, zeroed, strict=True) if n[0] == group], order) for group in groups}
    settings: dict[str, Any] = {"norm_type": order, "nonfinite": nonfinite}
    if draw.chance(0.5) and groups:
        settings |= {"groups": lambda name: name[0], "limits": {g: _limit(draw, norms[g]) for g in sorted(groups) if draw.chance(0.8)}}
    else:
        settings["rule"] = _limit(draw, norm)

    try:
        found = draw.call(normclip.clip_grads_, items, **settings)
    except RuntimeError:
        expect(nonfinite == "raise" and unfinished, "it raised without a reason")
        expect(all(each.untouched for each in made), "it raised and has written")
        return
    expect(not (nonfinite == "raise" and unfinished), "it did not raise")
    expect((found.found_inf, found.skipped) == (unfinished, unfinished and nonfinite == "skip"), f"of {before!r} it tells {found!r}")
    expect(oracles.near(found.norm, norm), f"the norm of order {order!r} of {before!r} is {found.norm!r}, not {norm!r}")
    for name, each, old, values in zip(names, made, before, zeroed, strict=True):
        if "rule" in settings:
            bounds = oracles.coefficients(settings["rule"], norm)
            told = found.coefficient
        else:
            bounds = oracles.coefficients(settings["limits"].get(name[0], math.inf), norms[name[0]])
            told = found.coefficients[name[0]]
        bounds = (1.0, 1.0) if found.skipped else bounds
        close = bounds[0] * (1 - TOLERANCE) <= told <= bounds[1] * (1 + TOLERANCE) or (math.isnan(told) and math.isnan(bounds[0]))
        expect(close, f"the coefficient is {told!r}, not from {bounds!r}")
        low, high = (oracles.scaled(values, each.dtype, bound) for bound in bounds)
        expect(oracles.between(each.array(), low, high), f"{old!r} became {each.array()!r}, not from {low!r} to {high!r}; {settings!r}")
        expect(not oracles.wrongly_placed(each), "memory around it was written")
