"""Optimizers that clip, step by step against their formulas in a wider float, and their checkpoints."""

import copy
import inspect
import io
import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from fuzz import oracles
from fuzz.draw import Draw
from fuzz.registry import check, expect, expect_refusal, swallow
from fuzz.tensors import Lot, elements, lot, place
from normclip import optim
from normclip.rules import Hard, Soft
from support.oracle import TOLERANCE
from support.tensors import REAL_DTYPES, raw


def _settings(draw: Draw) -> dict[str, Any]:
    momentum = draw.pick([0.0, 0.0, 0.5, 0.9, 1.0])
    settings: dict[str, Any] = {
        "lr": draw.pick([0.0, 0.1, 1.0, draw.magnitude(-6, 2)]),
        "momentum": momentum,
        "nesterov": momentum > 0.0 and draw.chance(0.3),
        "weight_decay": draw.pick([0.0, 0.0, 1e-4, 0.5]),
    }
    known = inspect.signature(optim.ClippedSGD).parameters
    if "maximize" in known and draw.chance(0.3):
        settings["maximize"] = True
    if "dampening" in known and not settings["nesterov"] and draw.chance(0.3):
        settings["dampening"] = draw.pick([0.1, 0.9, 1.0])
    return settings


def _model(draw: Draw) -> list[Lot]:
    dtype = draw.pick(REAL_DTYPES)
    return [lot(draw, dtype, "torch", finite=True, moderate=True) for _ in range(draw.pick([1, 1, 2, 3]))]


def _gradients(draw: Draw, made: list[Lot], items: list[torch.nn.Parameter]) -> None:
    for each, item in zip(made, items, strict=True):
        values = elements(draw, each.dtype, each.tensor.numel(), finite=True, moderate=True)
        item.grad = place(draw, values, each.dtype, tuple(each.tensor.shape), "torch").tensor if draw.chance(0.9) else None


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().astype(np.longdouble)


def _larger_step(step: Any) -> Any:
    def wrong(self: Any, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad * 2.0
                    parameter.data += 1.0
        return step(self, closure)

    return wrong


@check("optimizers", weight=8, plants={"optim.ClippedSGD.step": _larger_step})
def steps(draw: Draw) -> None:
    made, settings = _model(draw), _settings(draw)
    items = [torch.nn.Parameter(each.tensor) for each in made]
    rule = draw.pick([math.inf, 1.0, draw.magnitude(-8, 8), Soft(draw.magnitude(-3, 3))])
    optimizer = optim.ClippedSGD(items, rule=rule, **settings)
    for _ in range(draw.integer(1, 3)):
        _gradients(draw, made, items)
        before = [_wide(item) for item in items]
        buffers = [optimizer.state[item].get("momentum_buffer") if item in optimizer.state else None for item in items]
        buffers = [None if buffer is None else _wide(buffer) for buffer in buffers]
        gradients = [None if item.grad is None else (_wide(item.grad), raw(item.grad)) for item in items]
        draw.call(optimizer.step)
        norm = oracles.exact_norm([gradient[0] for gradient in gradients if gradient is not None])
        expect(oracles.near(float(optimizer.last_norm), norm), f"the norm is {optimizer.last_norm!r}, not {norm!r}")
        exact = 1.0 if norm == 0.0 else (rule if isinstance(rule, Soft) else Hard(rule)).multiplier(norm)
        coefficient = float(optimizer.last_coefficient)
        expect(oracles.near(coefficient, exact, 4 * TOLERANCE), f"the coefficient is {coefficient!r}, not {exact!r}")
        for item, x, v, gradient in zip(items, before, buffers, gradients, strict=True):
            if gradient is None:
                expect(np.array_equal(_wide(item), x, equal_nan=True), "a parameter without a gradient has moved")
                continue
            expect(raw(item.grad) == gradient[1], "a gradient was written")
            d = (-1.0 if settings.get("maximize") else 1.0) * coefficient * gradient[0]
            sizes = np.abs(d)  # of its terms, which may cancel
            if settings["weight_decay"]:  # a term whose factor is 0 is left out, as by torch
                d, sizes = d + settings["weight_decay"] * x, sizes + settings["weight_decay"] * np.abs(x)
            damped = d if v is None else (1.0 - settings.get("dampening", 0.0)) * d
            v = settings["momentum"] * (0.0 if v is None else v) + damped
            direction = d + settings["momentum"] * v if settings["nesterov"] else v if settings["momentum"] else d
            terms = np.abs(x) + settings["lr"] * (np.abs(direction) + 2 * sizes)
            _expect_rounded(item, x - settings["lr"] * direction, terms)
            if settings["momentum"]:
                _expect_rounded(optimizer.state[item]["momentum_buffer"], v, np.abs(v) + 3 * sizes + np.abs(x))
    for each in made:
        each.tensor[...] = torch.nan
        expect(each.memory.isnan().all(), "memory around a parameter was written")


@check("optimizers", weight=8, plants={"optim.ClippedAdamW.step": _larger_step})
def adamw_steps(draw: Draw) -> None:
    made = _model(draw)
    items = [torch.nn.Parameter(each.tensor) for each in made]
    rule = draw.pick([math.inf, 1.0, draw.magnitude(-8, 8), Soft(draw.magnitude(-3, 3))])
    lr, eps, decay = draw.pick([0.0, 0.1, draw.magnitude(-6, 0)]), draw.pick([1e-8, 1e-3, 1.0]), draw.pick([0.0, 0.01, 0.5])
    betas = draw.pick([0.0, 0.5, 0.9]), draw.pick([0.0, 0.95, 0.999])
    amsgrad, maximize, wide = draw.chance(0.3), draw.chance(0.3), draw.chance(0.3)
    optimizer = optim.ClippedAdamW(
        items, lr, betas, eps, decay, amsgrad, rule=rule, maximize=maximize, state_dtype=torch.float32 if wide else None
    )
    steps = [0] * len(items)
    for _ in range(draw.integer(1, 3)):
        _gradients(draw, made, items)
        before = [_wide(item) for item in items]
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        kept = [[_wide(optimizer.state[item][name]) if name in optimizer.state.get(item, {}) else 0.0 for name in names] for item in items]
        draw.call(optimizer.step)
        sign = -1.0 if maximize else 1.0
        for index, (item, x, (m, v, largest)) in enumerate(zip(items, before, kept, strict=True)):
            if item.grad is None:
                expect(np.array_equal(_wide(item), x, equal_nan=True), "a parameter without a gradient has moved")
                continue
            steps[index] += 1
            g = sign * float(optimizer.last_coefficient) * _wide(item.grad)
            sizes = betas[0] * np.abs(m) + (1.0 - betas[0]) * np.abs(g)  # of the terms of m, which may cancel
            m = betas[0] * m + (1.0 - betas[0]) * g
            v = betas[1] * v + (1.0 - betas[1]) * g * g
            largest = np.maximum(largest, v)
            first, second = (np.longdouble(float(1 - Fraction(beta) ** steps[index])) for beta in betas)
            below = np.sqrt((largest if amsgrad else v) / second) + eps
            state = optimizer.state[item]
            expect(state["step"].item() == steps[index], f"{state['step']} steps, not {steps[index]}")
            # Squares may underflow, where computed and where stored, by as much as the smallest numbers there.
            tiny = math.sqrt(float(torch.finfo(torch.float64 if item.dtype == torch.float64 else torch.float32).smallest_normal))
            _expect_rounded(state["exp_avg"], m, 4 * sizes, single=True)
            _expect_rounded(state["exp_avg_sq"], v, 4 * v + tiny * tiny * 2**26, single=True)
            terms = (1.0 + lr * decay) * np.abs(x) + lr * 8 * (sizes / first / below) * (1.0 + tiny * 2**13 / below)
            _expect_rounded(item, (1.0 - lr * decay) * x - lr * m / first / below, terms, single=True)
    for each in made:
        each.tensor[...] = torch.nan
        expect(each.memory.isnan().all(), "memory around a parameter was written")


def _expect_rounded(found: torch.Tensor, exact: np.ndarray, terms: np.ndarray, *, single: bool = False) -> None:
    """Off by half a unit in the last place, and what the arithmetic before costs, in units of the largest terms."""
    limits = torch.finfo(found.dtype)
    # In which numbers it is computed: float32 for 16-bit elements, and `single` for all but float64.
    work = 2.0**-24 if found.element_size() == 2 or (single and found.dtype != torch.float64) else 2.0**-53
    bound = 0.5 * limits.eps * np.abs(exact) + 8 * work * (terms + np.abs(exact)) + limits.smallest_normal * limits.eps
    right = (np.abs(_wide(found) - exact) <= bound) | (np.abs(exact) > limits.max * (1 - limits.eps))
    # What has overflowed stays so; whether as an infinity or as NaN depends on terms whose factor is 0, which are left out.
    right |= ~np.isfinite(exact) & ~np.isfinite(_wide(found))
    expect(right.all(), f"a step gives {found.detach()!r}, not {exact!r}")


@check("optimizers", weight=4, plants={"optim.ClippedSGD.load_state_dict": lambda _: lambda self, state: None})
def checkpoints(draw: Draw) -> None:
    """States go from and to torch's SGD, and through a file; then both go on alike."""
    dtype = draw.pick([torch.float32, torch.float64])
    start = [torch.randn(3, generator=torch.Generator().manual_seed(draw.integer(0, 10**6)), dtype=dtype) for _ in range(2)]
    settings = _settings(draw) | {"momentum": 0.9}
    settings["lr"] = 0.1
    sides = [[torch.nn.Parameter(values.clone()) for values in start] for _ in range(2)]
    ours, theirs = optim.ClippedSGD(sides[0], rule=math.inf, **settings), torch.optim.SGD(sides[1], **settings)
    first = draw.pick([ours, theirs])
    gradients = [[torch.from_numpy(draw.rng.standard_normal(3)).to(dtype) for _ in start] for _ in range(3)]

    def run(optimizer: torch.optim.Optimizer, step: int) -> None:
        for item, gradient in zip(optimizer.param_groups[0]["params"], gradients[step], strict=True):
            item.grad = gradient.clone()
        optimizer.step()

    run(first, 0)
    run(first, 1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = theirs if first is ours else ours
    for item, values in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
        item.data.copy_(values.data)
    for group in second.param_groups:
        group |= {"lr": 1.0, "momentum": 0.5, "nesterov": False, "weight_decay": 0.0}
    second.load_state_dict(torch.load(file, weights_only=True))
    run(first, 2)
    run(second, 2)
    eps = torch.finfo(dtype).eps
    for a, b in zip(*(optimizer.param_groups[0]["params"] for optimizer in (ours, theirs)), strict=True):
        expect(torch.allclose(a, b, rtol=16 * eps, atol=64 * eps), f"after a state was exchanged, {a!r} and {b!r}; {settings!r}")


BAD_SETTINGS: list[tuple[str, Any]] = [
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", "0.1"),
    ("momentum", -0.5),
    ("momentum", math.nan),
    ("weight_decay", -1.0),
    ("weight_decay", math.nan),
]


@check("optimizers", weight=4, plants={"optim.ClippedSGD.load_state_dict": swallow})
def hostile_checkpoints(draw: Draw) -> None:
    """States with settings out of range: refused, and nothing has changed."""
    items = [torch.nn.Parameter(torch.ones(3))]
    optimizer = optim.ClippedSGD(items, lr=0.1, rule=1.0, momentum=0.9)
    items[0].grad = torch.ones(3)
    optimizer.step()
    state, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    if draw.chance(0.1):
        bad: Any = {"nesterov": True, "momentum": 0.0}
        state["param_groups"][0] |= bad
    else:
        bad = draw.pick(BAD_SETTINGS)
        state["param_groups"][0][bad[0]] = bad[1]
    expect_refusal(f"a state with {bad!r}", lambda: optimizer.load_state_dict(state))
    after = optimizer.state_dict()
    expect(after["param_groups"] == before["param_groups"], f"a state with {bad!r} was refused, and settings have changed")
    expect(torch.equal(after["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"]), "buffers have changed")
