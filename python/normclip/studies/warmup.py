r"""Whether a limit on the predicted descent makes warm-up unnecessary.

A step with update u and learning rate η is predicted to lower the loss by :math:`\eta\, u \cdot g`. Early in training the true descent is
smaller, which is one reason to warm up the rate. Instead, the rate can be multiplied by :math:`\min(1, T / (u \cdot g))` (Su:
kexue.fm/archives/10657). For SGD, whose update is the gradient, that is a clip rule. Adam's update is known only when the step is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from normclip import dot, grad_stats
from normclip.rules import DescentLimit, Hard
from normclip.studies import plot
from normclip.studies.models import CharLSTM, Transformer, seeded
from normclip.studies.report import Claim, Findings, Options, Table, judge, number
from normclip.studies.text import manual
from normclip.studies.training import Batch, Step, Ticker, clipped_step, side_by_side, train

TITLE = "a limit on the predicted descent against warm-up"

SGD, ADAM = "SGD", "Adam"
NEITHER, WARMUP, LIMIT = "neither", "warm-up", "limit"
_CLEAR = 0.02  # differences of the loss, in nats, up to which losses count as equal
_COLORS = {NEITHER: plot.RED, WARMUP: plot.ORANGE}
_LIMIT_COLORS = (plot.SKY, plot.BLUE, plot.GREEN, plot.PURPLE)


class Shape(NamedTuple):
    """Sizes of a model and its batches."""

    width: int
    batch: int
    length: int


@dataclass(frozen=True)
class Setting:
    """The size of the study."""

    rates: dict[str, float]
    limits: dict[str, tuple[float, ...]]
    """The limits T for each optimizer, from the smallest, each 4 times the one before."""
    shapes: dict[str, Shape]
    steps: int
    warmup: int
    """The number of steps over which warm-up raises the rate from 0."""


_RATES = {SGD: 15.0, ADAM: 0.03}
FULL = Setting(
    _RATES, {SGD: (1 / 64, 1 / 16, 1 / 4), ADAM: (1.0, 4.0, 16.0)}, {SGD: Shape(128, 32, 48), ADAM: Shape(64, 16, 64)}, 1200, 200
)
QUICK = Setting(_RATES, {SGD: (1 / 16,), ADAM: (4.0,)}, {SGD: Shape(32, 8, 16), ADAM: Shape(32, 4, 16)}, 20, 5)


@dataclass(frozen=True)
class Run:
    """A training run."""

    optimizer: str
    plan: str
    limit: float | None
    """T for the plan "limit", else None."""
    final: float
    """The final loss; infinite if it became NaN or infinite."""
    early: float
    """The share of steps that the limit shortened, among the first ``Setting.warmup`` steps."""
    late: float
    """The share of steps that the limit shortened, among the later steps."""
    least: float
    """The smallest factor that the rate was multiplied by."""
    losses: tuple[float, ...]
    """The mean loss of each sixtieth of training."""
    factors: tuple[float, ...]
    """The mean factor of each sixtieth of training."""

    @property
    def name(self) -> str:
        """The plan with its limit."""
        return self.plan if self.limit is None else f"limit {self.limit:g}"


@dataclass(frozen=True)
class Warmup(Findings):
    """The result of :func:`run`."""

    size: Setting
    hopeless: float
    """The loss of a random guess. Runs with a higher final loss have diverged."""
    runs: tuple[Run, ...]

    def setting(self) -> str:
        """What was run."""
        (lstm, a, b), (transformer, c, d) = self.size.shapes[SGD], self.size.shapes[ADAM]
        return (
            f"SGD at {self.size.rates[SGD]:g} on an LSTM of 2×{lstm}, batches of {a}×{b}; Adam at {self.size.rates[ADAM]:g} on a pre-LN "
            f"transformer of 2×{transformer}, batches of {c}×{d}. Characters of Python's manual, {self.size.steps} steps, warm-up over "
            f"{self.size.warmup}. Loss: the last tenth of training."
        )

    def of(self, optimizer: str, plan: str) -> list[Run]:
        """The runs of an optimizer and a plan: one for each T for the plan "limit", else one."""
        return [run for run in self.runs if (run.optimizer, run.plan) == (optimizer, plan)]

    def loss(self, run: Run) -> float:
        """The final loss; infinite if the run diverged."""
        return run.final if run.final <= self.hopeless else math.inf

    def claims(self) -> list[Claim]:
        """The claims, judged."""
        return [claim for optimizer in (SGD, ADAM) for claim in self._claims(optimizer)]

    def _claims(self, optimizer: str) -> list[Claim]:
        neither, warmed = (self.loss(self.of(optimizer, plan)[0]) for plan in (NEITHER, WARMUP))
        limited = self.of(optimizer, LIMIT)
        losses = [self.loss(run) for run in limited]
        best = min(limited, key=self.loss)
        least = min(losses)
        good = [loss <= min(warmed + _CLEAR, least + 0.05) for loss in losses]
        helps = least <= neither - _CLEAR and least < math.inf
        return [
            judge(
                f"{optimizer}: warm-up helps at this rate",
                "lower loss than with neither",
                f"{_loss(warmed)}, with neither {_loss(neither)}",
                holds=warmed <= neither - 0.05 and warmed < math.inf,
                partly=warmed <= neither - _CLEAR and warmed < math.inf,
                criterion="lower by 0.05; partly: by 0.02",
            ),
            judge(
                f"{optimizer}: a limit on the descent makes it unnecessary",
                "no higher loss than with warm-up",
                f"{_loss(least)} at the best T = {best.limit:g}, with warm-up {_loss(warmed)}; {best.late:.0%} of later steps limited",
                holds=helps and least <= warmed + _CLEAR and best.late <= 0.5,
                partly=helps,
                criterion="loss at the best T lower by 0.02 than with neither, not higher by 0.02 than with warm-up, and at most half of "
                "the later steps limited: more is a lower rate; partly: loss lower than with neither",
            ),
            judge(
                f"{optimizer}: the limit need not be tuned",
                "T may be off by a factor of 4",
                f"as good for {sum(good)} of {len(good)} T: {', '.join(map(_loss, losses))}",
                holds=all(good) and least < math.inf,
                partly=any(good) and least < math.inf,
                criterion="every T as good as warm-up, and within 0.05 of the best T; partly: some",
            ),
            judge(
                f"{optimizer}: it acts where warm-up would, and seldom later",
                "many early steps limited, few later",
                f"{best.early:.0%} early, {best.late:.0%} later at T = {best.limit:g}",
                holds=best.late <= 0.1 and best.early >= max(0.1, 2.0 * best.late),
                partly=best.late <= 0.5 and best.early > best.late,
                criterion="at the best T at most 10% later, and at least 10% and twice as many early; partly: at most 50%, and more early",
            ),
        ]

    def tables(self) -> list[Table]:
        """One row for each run."""
        rows = tuple(
            (f"{run.optimizer}, {run.name}", _loss(self.loss(run)), f"{run.early:.0%}", f"{run.late:.0%}", number(run.least, 2))
            for run in self.runs
        )
        return [Table("Final loss, and share of steps that were limited", ("run", "loss", "early", "later", "least factor"), rows)]

    def draw(self, figure: Figure) -> None:
        """Plot losses and rate factors over training, with a column for each optimizer."""
        figure.set_size_inches(12.0, 6.4)
        panels = figure.subplots(2, 2, sharex=True, height_ratios=(3, 2))
        for column, optimizer in enumerate((SGD, ADAM)):
            loss, factor = panels[0][column], panels[1][column]
            self._draw(loss, factor, [run for run in self.runs if run.optimizer == optimizer])
            plot.label(loss, f"{optimizer}, rate {self.size.rates[optimizer]:g}", "", "loss, nats per character")
            plot.label(factor, "", "step", "rate multiplied by")
            loss.set_ylim(0.95 * min(min(run.losses) for run in self.runs if run.optimizer == optimizer), self.hopeless)
            loss.legend(ncols=2, loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
            factor.set_yscale("log")
            plot.plain_ticks(factor.yaxis)

    def _draw(self, loss: Axes, factor: Axes, runs: Sequence[Run]) -> None:
        colors = iter(_LIMIT_COLORS)
        for run in runs:
            color = _COLORS.get(run.plan) or next(colors)
            steps = [(index + 0.5) * _window(self.size) for index in range(len(run.losses))]
            loss.plot(steps, run.losses, color=color, label=f"{run.name}: {_loss(self.loss(run))}")
            if run.plan != NEITHER:
                factor.plot(steps, run.factors, color=color)


def _loss(loss: float) -> str:
    return f"{loss:.2f}" if math.isfinite(loss) else "diverges"


def _window(size: Setting) -> int:
    return max(1, size.steps // 60)


def _means(series: Sequence[float], window: int) -> tuple[float, ...]:
    return tuple(fmean(series[start : start + window]) for start in range(0, len(series), window))


def run(options: Options) -> Warmup:
    """Train with neither, with warm-up and with limits, by both optimizers."""
    size = QUICK if options.quick else FULL
    cases: list[tuple[str, str, float | None]] = []
    for optimizer in (SGD, ADAM):
        cases += [(optimizer, NEITHER, None), (optimizer, WARMUP, None)]
        cases += [(optimizer, LIMIT, limit) for limit in size.limits[optimizer]]
    ticker = Ticker(size.steps * len(cases), options.progress)
    jobs = [partial(_train, size, *case, options.seed, ticker.counter(f"{case[0]}, {case[1]}")) for case in cases]
    return Warmup(size, math.log(len(manual().characters)), tuple(side_by_side(jobs)))


def _train(size: Setting, optimizer: str, plan: str, limit: float | None, seed: int, tick: Callable[[int], None]) -> Run:
    corpus = manual()
    characters, (width, batch, length) = len(corpus.characters), size.shapes[optimizer]
    # Each model is trained by the optimizer that is usual for it, at a rate that is too high without warm-up.
    model = seeded(lambda: CharLSTM(characters, width) if optimizer == SGD else Transformer(characters, width, length), seed)
    algorithm = {SGD: torch.optim.SGD, ADAM: torch.optim.Adam}[optimizer]
    stepper = algorithm(model.parameters(), lr=size.rates[optimizer])
    step: Step
    if limit is not None and optimizer == SGD:
        step = clipped_step(model, stepper, DescentLimit(limit))  # u = g, so the rule computes u·g from the norm
    elif limit is not None:
        step = limited_step(model, stepper, DescentLimit(limit))
    else:
        step = clipped_step(model, stepper, Hard(math.inf))
        if plan == WARMUP:
            step = _warmed(step, stepper, size.warmup)
    batches = corpus.batches(size=batch, length=length, seed=seed)
    trained = train(model, batches, step, steps=size.steps, tick=tick)
    factors, window = trained.coefficients, _window(size)
    early, late = (_share(part) for part in (factors[: size.warmup], factors[size.warmup :]))
    if plan == WARMUP:
        early = late = 0.0  # warm-up shortened these steps, not a limit
    return Run(optimizer, plan, limit, trained.final, early, late, min(factors), _means(trained.losses, window), _means(factors, window))


def _share(factors: Sequence[float]) -> float:
    return sum(factor < 1.0 for factor in factors) / max(1, len(factors))


def _warmed(step: Step, optimizer: torch.optim.Optimizer, warmup: int) -> Step:
    """The same step, with a learning rate that rises linearly over the warm-up steps."""
    rates = [group["lr"] for group in optimizer.param_groups]

    def warmed(index: int, batch: Batch) -> tuple[float, float]:
        factor = min(1.0, (index + 1) / warmup)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        norm, coefficient = step(index, batch)
        return norm, coefficient * factor

    return warmed


def limited_step(model: nn.Module, optimizer: torch.optim.Optimizer, rule: DescentLimit) -> Step:
    """A training step that lets the optimizer step, and then shortens the step if u·g exceeds the limit."""
    parameters = list(model.parameters())
    rate = optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def step(index: int, batch: Batch) -> tuple[float, float]:
        before = [parameter.clone() for parameter in parameters]
        optimizer.step()
        moved = [old - new for old, new in zip(before, parameters, strict=True)]  # η·u
        descent = dot(moved, [parameter.grad for parameter in parameters if parameter.grad is not None]) / rate
        coefficient = rule.coefficient(descent)
        if coefficient < 1.0:
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old.lerp(parameter, coefficient))
        return grad_stats(parameters).l2, coefficient

    return step
