"""Rules and thresholds: formulas in a wider float, the ends of the range, and states that are loaded."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import normclip
from fuzz import oracles
from fuzz.draw import Draw
from fuzz.registry import check, expect, expect_refusal
from fuzz.tensors import lots
from normclip import rules, thresholds

Formula = Callable[[Any], Any]


def _rule(draw: Draw) -> tuple[rules.Rule, Formula]:
    """A rule, and its formula for norms above 0 in the widest float."""
    a, b, c = (np.longdouble(draw.magnitude(-6, 6)) for _ in range(3))
    x, y, z = float(a), float(b), float(c)
    zero = draw.chance(0.2)
    a, b, c = np.longdouble(x), np.longdouble(0.0 if zero else y), np.longdouble(z)
    y = float(b)

    def exactly(n: Any) -> Any:
        growth = b * n
        ratio = growth / (a + growth)
        return (np.log1p(ratio) / ratio if ratio > 1e-12 else 1 - ratio / 2) / (c * (a + growth))

    return draw.pick(
        [
            (rules.Hard(x), lambda n: min(np.longdouble(1.0), a / n)),
            (rules.Soft(x), lambda n: a / (n + a)),
            (rules.Normalize(x, y), lambda n: a / (n + b)),
            (rules.Smoothness(x, y, z), lambda n: 1 / (c * (a + b * n))),
            (rules.Smoothness(x, y, z, exact=True), exactly),
            (rules.DescentLimit(x), lambda n: min(np.longdouble(1.0), a / n / n)),
            (rules.Least(rules.Soft(x), rules.DescentLimit(z)), lambda n: min(a / (n + a), c / n / n)),
        ]
    )


def _off(multiplier: Any) -> Any:
    return lambda self, norm: multiplier(self, norm) * (1 + 1e-9)


@check("rules", weight=6, plants={"rules.Formula.multiplier": _off})
def multipliers(draw: Draw) -> None:
    rule, formula = _rule(draw)
    norm = draw.magnitude(-30, 30)
    found, exact = rule.multiplier(norm), formula(np.longdouble(norm))
    expect(oracles.near(found, exact), f"{rule!r} multiplies a norm of {norm!r} by {found!r}, not {exact!r}")
    norm = draw.pick([0.0, math.ulp(0.0), 1e308, math.inf])
    found = rule.multiplier(norm)
    expect(found >= 0.0 and found < math.inf, f"{rule!r} multiplies a norm of {norm!r} by {found!r}")
    expect(found == 1.0 or norm != 0.0, f"{rule!r} multiplies zeros by {found!r}")
    if not isinstance(rule, rules.DescentLimit):
        expect(math.isnan(rule.multiplier(math.nan)), f"{rule!r} swallows NaN")


@check("rules", weight=5, plants={"rules.Formula.multiplier": _off})
def clip_by_rule(draw: Draw) -> None:
    rule, formula = _rule(draw)
    made = lots(draw, finite=True)
    before, norm = [each.array().copy() for each in made], oracles.norm(made)
    draw.call(normclip.clip_, [each.tensor for each in made], rule)
    if not 0.0 < norm < math.inf or not 1e-30 < norm < 1e30:
        return
    exact = formula(np.longdouble(norm))
    bounds = (float(exact * (1 - 1e-11)), float(exact * (1 + 1e-11)))
    for each, values in zip(made, before, strict=True):
        low, high = (oracles.scaled(values, each.dtype, bound) for bound in bounds)
        within = oracles.between(each.array(), low, high) or (abs(exact - 1) < 1e-11 and each.untouched)
        expect(within, f"{values!r} by {rule!r} became {each.array()!r}, not from {low!r} to {high!r}")


STATES: dict[str, tuple[Callable[[], Any], list[tuple[str, Any]]]] = {
    "AutoClip": (
        lambda: thresholds.AutoClip(50.0, window=4),
        [("history", ["a"]), ("history", [math.nan]), ("history", [2.0] * 5), ("history", [-1.0]), ("history", None), ("history", "12")],
    ),
    "ZClip": (
        lambda: thresholds.ZClip(warmup=2),
        [
            ("mean", math.nan),
            ("mean", -1.0),
            ("mean", "1"),
            ("deviation", -1.0),
            ("deviation", math.inf),
            ("first", ["a"]),
            ("first", [-1.0]),
        ],
    ),
    "AdaGN": (thresholds.AdaGN, [("steps", -1), ("mean", math.nan), ("root", math.inf), ("root", None)]),
    "AdaGC": (
        lambda: thresholds.AdaGC(warmup=1),
        [
            ("steps", -1),
            ("steps", 1.5),
            ("steps", "1"),
            ("norms", {"a": math.nan}),
            ("norms", {"a": -1.0}),
            ("norms", [1.0]),
            ("norms", {1: "x"}),
        ],
    ),
}


def _bad_load(load: Any) -> Any:
    def wrong(self: Any, state: Any) -> None:
        """One that loads anything, and halves it."""
        for name, value in state.items():
            setattr(self, f"_{name}", 0.0 if isinstance(value, float) else value)

    return wrong


@check("thresholds", weight=4, plants={"thresholds.Policy.load_state_dict": _bad_load})
def states(draw: Draw) -> None:
    """What was saved can be loaded and goes on alike; what was tampered with is refused, and nothing has changed."""
    kind = draw.pick(list(STATES))
    make, tampered = STATES[kind]
    policy = make()
    if kind != "AdaGC":
        for _ in range(draw.integer(0, 6)):
            draw.call(policy.multiplier, draw.magnitude(-3, 3))
    saved, norm = copy.deepcopy(policy.state_dict()), draw.magnitude(-3, 3)
    if draw.chance(0.3):
        other = make()
        other.load_state_dict(copy.deepcopy(saved))
        expect(other.state_dict() == saved, f"{kind} loads {saved!r} as {other.state_dict()!r}")
        if kind != "AdaGC":
            expect(other.multiplier(norm) == policy.multiplier(norm), f"{kind} does not go on alike from {saved!r}")
        return
    name, value = draw.pick([*tampered, ("another", 1)])
    expect_refusal(f"{kind} with {name} = {value!r}", lambda: policy.load_state_dict(saved | {name: value}))
    expect(policy.state_dict() == saved, f"{kind} refused {name} = {value!r}, and has changed")
