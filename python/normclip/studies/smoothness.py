r"""Whether the loss of an LSTM is (L0, L1)-smooth along its training, and whether clipping then allows higher learning rates.

Zhang et al. 2020 (arXiv 1905.11881), figures 1 and 2: on logarithmic axes, local smoothness rises with the norm of the gradient along a
line of slope up to 1. Where it does, clipping can use learning rates at which plain gradient descent diverges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normclip.rules import Hard, Rule, Soft
from normclip.studies import plot
from normclip.studies.models import CharLSTM, loss_of, seeded
from normclip.studies.report import Claim, Findings, Options, Table, judge, number, spread
from normclip.studies.text import manual
from normclip.studies.training import Batch, Step, Ticker, Trained, clipped_step, side_by_side, train
from normclip.theory import SmoothnessProbe, fit_l0_l1

TITLE = "local smoothness of an LSTM against the norm of its gradient, and the rates that clipping allows"

NONE, HARD, SOFT = "no clipping", "clipped", "soft clipping"
LIMIT = 0.25
_RULES: dict[str, Rule] = {NONE: Hard(math.inf), HARD: Hard(LIMIT), SOFT: Soft(LIMIT)}
_LOOKS = {NONE: (plot.RED, "o-"), HARD: (plot.BLUE, "s-"), SOFT: (plot.GREEN, "^-")}
_QUANTILE = 0.99  # the share of points that the fit has to bound, so that single noisy points do not determine it
_CLEAR = 0.02  # differences of the loss, in nats, up to which losses count as equal


@dataclass(frozen=True)
class Setting:
    """The size of the study."""

    rates: dict[str, tuple[float, ...]]
    """The learning rates for each rule."""
    steps: int
    width: int
    batch: int
    length: int
    probed: dict[str, float]
    """The runs along which local smoothness is measured: a learning rate by rule."""
    every: int
    """The number of steps from one measurement to the next."""


_RATES = {NONE: (1.0, 2.0, 4.0, 8.0, 15.0, 30.0), HARD: (2.0, 8.0, 15.0, 30.0), SOFT: (15.0, 30.0)}
FULL = Setting(_RATES, 1200, 128, 32, 48, {HARD: 30.0, NONE: 4.0}, 8)
QUICK = Setting({NONE: (2.0, 15.0), HARD: (2.0, 15.0), SOFT: (15.0,)}, 20, 32, 8, 16, {HARD: 15.0, NONE: 2.0}, 2)


@dataclass(frozen=True)
class Run:
    """A training run."""

    rule: str
    rate: float
    final: float
    """The final loss; infinite if it became NaN or infinite."""
    clipped: float
    """The share of steps with a coefficient below 1."""


@dataclass(frozen=True)
class Path:
    """Local smoothness along a run, and the fit to it."""

    rule: str
    rate: float
    steps: tuple[int, ...]
    norms: tuple[float, ...]
    smoothness: tuple[float, ...]
    correlation: float
    slope: float
    L0: float
    L1: float


@dataclass(frozen=True)
class Smoothness(Findings):
    """The result of :func:`run`."""

    size: Setting
    hopeless: float
    """The loss of a random guess, ln of the number of characters. Runs with a higher final loss have diverged."""
    runs: tuple[Run, ...]
    paths: tuple[Path, ...]

    def setting(self) -> str:
        """What was run."""
        size = self.size
        return (
            f"LSTM of 2×{size.width}, characters of Python's manual, batches of {size.batch}×{size.length}, {size.steps} steps of SGD; "
            f"limit {LIMIT:g}; smoothness every {size.every} steps. Loss: the last tenth of training."
        )

    def loss(self, rule: str, rate: float) -> float:
        """The final loss of a run; infinite if it diverged."""
        final = next(run.final for run in self.runs if (run.rule, run.rate) == (rule, rate))
        return final if final <= self.hopeless else math.inf

    def best(self, rule: str) -> tuple[float, float]:
        """The least loss and its rate."""
        return min((self.loss(rule, rate), rate) for rate in self.size.rates[rule])

    def largest(self, rule: str) -> float:
        """The largest rate that did not diverge; 0 if all did."""
        return max((rate for rate in self.size.rates[rule] if self.loss(rule, rate) < math.inf), default=0.0)

    def claims(self) -> list[Claim]:
        """The claims, judged."""
        clipped, plain = (next(path for path in self.paths if path.rule == rule) for rule in (HARD, NONE))
        return [
            self._correlation("Along clipped training, smoothness rises with the norm of the gradient", clipped),
            self._correlation("So it does without clipping", plain),
            self._slope(clipped),
            self._bound(clipped),
            *self._rates(),
        ]

    def _correlation(self, claim: str, path: Path) -> Claim:
        return judge(
            claim,
            "log-log correlation well above 0",
            f"{number(path.correlation, 2)} over {len(path.norms)} points at rate {path.rate:g}",
            holds=path.correlation >= 0.7,
            partly=path.correlation >= 0.3,
            criterion="correlation at least 0.7; partly: 0.3",
        )

    def _slope(self, path: Path) -> Claim:
        return judge(
            "The rise is that of L0 + L1·n",
            "log-log slope between 0 and 1",
            number(path.slope, 2),
            holds=0.2 <= path.slope <= 1.05,
            partly=0.0 < path.slope <= 1.5,
            criterion="slope in [0.2, 1.05]; partly: in (0, 1.5]",
        )

    def _bound(self, path: Path) -> Claim:
        ordered = sorted(path.smoothness)
        constant = ordered[max(0, math.ceil(_QUANTILE * len(ordered)) - 1)]
        gain = constant / (path.L0 + path.L1 * sum(path.norms) / len(path.norms))
        return judge(
            "L0 + L1·n bounds smoothness more tightly than a constant L",
            "the mean bound is lower than L",
            f"{number(gain, 3)} times lower, with L0 = {number(path.L0)}, L1 = {number(path.L1)}",
            holds=path.L1 > 0.0 and gain >= 1.5,
            partly=path.L1 > 0.0 and gain > 1.0,
            criterion=f"at least 1.5 times lower, both bounds above {_QUANTILE:.0%} of the points; partly: lower",
        )

    def _rates(self) -> list[Claim]:
        plain, plain_rate = self.best(NONE)
        hard, hard_rate = self.best(HARD)
        soft, soft_rate = self.best(SOFT)
        rates = [rate for rate in self.size.rates[HARD] if rate in self.size.rates[NONE]]
        worse = [rate for rate in rates if _by(self.loss(NONE, rate), self.loss(HARD, rate)) < -_CLEAR]
        return [
            judge(
                "Clipping trains at rates at which gradient descent diverges",
                "a higher best rate, and a higher largest one",
                f"best {hard_rate:g} against {plain_rate:g}, largest {self.largest(HARD):g} against {self.largest(NONE):g}",
                holds=hard_rate >= 2.0 * plain_rate and self.largest(HARD) > self.largest(NONE),
                partly=hard_rate > plain_rate or self.largest(HARD) > self.largest(NONE),
                criterion="best rate at least twice as high and a higher largest rate; partly: either is higher",
            ),
            judge(
                "At its best rate clipping learns faster",
                "lower loss after the same steps",
                f"{hard:.2f} against {plain:.2f}",
                holds=_by(plain, hard) >= 0.05,
                partly=_by(plain, hard) >= _CLEAR,
                criterion="loss lower by 0.05; partly: by 0.02",
            ),
            judge(
                "Soft clipping does what clipping does",
                "the same loss, within a factor of 2 in the rate",
                f"{soft:.2f} at {soft_rate:g} against {hard:.2f} at {hard_rate:g}",
                holds=abs(soft - hard) <= 0.03 and 0.5 <= soft_rate / hard_rate <= 2.0,
                partly=abs(soft - hard) <= 0.1,
                criterion="best losses within 0.03, best rates within a factor of 2; partly: losses within 0.1",
            ),
            judge(
                "Clipping does no harm at any rate",
                "no higher loss",
                f"higher at {', '.join(f'{rate:g}' for rate in worse)}, where steps become too short" if worse else "nowhere higher",
                holds=not worse,
                criterion="no rate with a loss higher by 0.02",
            ),
        ]

    def tables(self) -> list[Table]:
        """The losses by rate, and the fits to local smoothness."""
        rules = list(_RULES)
        rows = tuple((f"{rate:g}", *(self._cell(rule, rate) for rule in rules)) for rate in self._all_rates())
        fits = tuple(
            (
                f"{path.rule}, rate {path.rate:g}",
                f"{len(path.norms)}",
                *map(number, (path.correlation, path.slope, path.L0, path.L1)),
                spread(path.norms, 2),
            )
            for path in self.paths
        )
        return [
            Table("Final loss, and share of clipped steps", ("rate", *rules), rows),
            Table("Local smoothness", ("run", "points", "correlation", "slope", "L0", "L1", "norms"), fits),
        ]

    def _all_rates(self) -> list[float]:
        return sorted({rate for rates in self.size.rates.values() for rate in rates})

    def _cell(self, rule: str, rate: float) -> str:
        if rate not in self.size.rates[rule]:
            return ""
        found = next(run for run in self.runs if (run.rule, run.rate) == (rule, rate))
        loss = "diverges" if math.isinf(self.loss(rule, rate)) else f"{found.final:.2f}"
        return f"{loss} ({found.clipped:.0%})" if rule == HARD else loss

    def draw(self, figure: Figure) -> None:
        """Plot smoothness over norm for each path, and loss over rate."""
        figure.set_size_inches(12.0, 4.2)
        *scatters, losses = figure.subplots(1, len(self.paths) + 1)
        for axes, path in zip(scatters, self.paths, strict=True):
            _scatter(figure, axes, path)
        for rule, (color, line) in _LOOKS.items():
            points = [(rate, self.loss(rule, rate)) for rate in self.size.rates[rule] if self.loss(rule, rate) < math.inf]
            losses.semilogx([rate for rate, _ in points], [loss for _, loss in points], line, color=color, label=rule)
        losses.set_xticks(self._all_rates(), [f"{rate:g}" for rate in self._all_rates()])
        losses.minorticks_off()
        plot.label(losses, f"Loss after {self.size.steps} steps", "learning rate", "loss, nats per character")
        losses.legend()


def _by(plain: float, clipped: float) -> float:
    """By how much clipping lowers a loss; 0 if both are infinite."""
    return 0.0 if plain == clipped else plain - clipped


def _scatter(figure: Figure, axes: Axes, path: Path) -> None:
    points = axes.scatter(path.norms, path.smoothness, c=path.steps, s=9, cmap="cividis", linewidths=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = min(path.norms), max(path.norms)
    xs = [low * (high / low) ** (index / 40) for index in range(41)]
    axes.plot(
        xs, [path.L0 + path.L1 * x for x in xs], color=plot.RED, label=f"{_QUANTILE:.0%} lie below {number(path.L0)} + {number(path.L1)}·n"
    )
    plot.label(axes, f"{path.rule}, rate {path.rate:g}: r = {number(path.correlation, 2)}", "norm of the gradient n", "local smoothness L̂")
    plot.plain_ticks(axes.xaxis, axes.yaxis)
    axes.legend(loc="upper left")
    figure.colorbar(points, ax=axes, label="step", pad=0.02)


def run(options: Options) -> Smoothness:
    """Train by every rule at every rate, and measure smoothness along two of the runs."""
    size = QUICK if options.quick else FULL
    cases = [(rule, rate) for rule in _RULES for rate in size.rates[rule]]
    ticker = Ticker(size.steps * len(cases), options.progress)
    jobs = [partial(_train, size, rule, rate, options.seed, ticker.counter(f"{rule}, rate {rate:g}")) for rule, rate in cases]
    found = side_by_side(jobs)
    runs = tuple(Run(rule, rate, trained.final, trained.clipped) for (rule, rate), (trained, _) in zip(cases, found, strict=True))
    paths = tuple(path for _, path in found if path is not None)
    return Smoothness(size, math.log(len(manual().characters)), runs, paths)


def _train(size: Setting, rule: str, rate: float, seed: int, tick: Callable[[int], None]) -> tuple[Trained, Path | None]:
    corpus = manual()
    model = seeded(lambda: CharLSTM(len(corpus.characters), size.width), seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    step = clipped_step(model, optimizer, _RULES[rule])
    probe = SmoothnessProbe(model) if size.probed.get(rule) == rate else None
    if probe is not None:
        step = _probed(step, probe, size.every)
    batches = corpus.batches(size=size.batch, length=size.length, seed=seed)
    trained = train(model, batches, step, steps=size.steps, tick=tick)
    return trained, None if probe is None else path_of(rule, rate, size.every, probe.norms, probe.smoothness)


def _probed(step: Step, probe: SmoothnessProbe, every: int) -> Step:
    """The same step, with smoothness measured in every ``every``-th one, on the batch of the step."""

    def probed(index: int, batch: Batch) -> tuple[float, float]:
        if index % every:
            return step(index, batch)
        with probe.step(lambda: loss_of(probe.model, batch)):
            return step(index, batch)

    return probed


def path_of(rule: str, rate: float, every: int, norms: Sequence[float], smoothness: Sequence[float]) -> Path:
    """The finite points of a probe, and the fit to them."""
    points = [(index * every, n, L) for index, (n, L) in enumerate(zip(norms, smoothness, strict=True)) if math.isfinite(n * L)]
    kept = tuple(n for _, n, _ in points), tuple(L for _, _, L in points)
    fit = fit_l0_l1(kept[1], kept[0], quantile=_QUANTILE)
    return Path(rule, rate, tuple(step for step, _, _ in points), *kept, fit.correlation, fit.slope, fit.L0, fit.L1)
