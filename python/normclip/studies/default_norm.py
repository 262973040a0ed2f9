r"""Why 1 is the usual limit: norm and sign-cosine of the gradient of transformers of growing width.

Adam's update is nearly the sign of the gradient, so a step lowers the loss by about

.. math:: \eta\, \|g\|_1 = \eta \sqrt N\, n \cos(\operatorname{sign} g, g)

If the norm n and the cosine do not depend on the number of parameters N, learning rates should scale as :math:`1/\sqrt N`, and one limit
suits all sizes (Su: kexue.fm/archives/10657). For Gaussian components the cosine is :math:`\sqrt{2/\pi}`.

The norm depends on the initial weights. The study uses GPT-2's initialization, as models that are clipped to 1 usually have a similar one.
With torch's default initialization, whose weights are larger, n is about half as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normclip import grad_stats
from normclip._look import INK
from normclip.studies import plot
from normclip.studies.models import Transformer, seeded, small_weights
from normclip.studies.report import Claim, Findings, Options, Table, judge, number, power, spread
from normclip.studies.text import manual
from normclip.studies.training import Batch, Ticker, Trained, side_by_side, train

TITLE = "norm and signs of the gradient of transformers of growing width"

_GAUSSIAN = math.sqrt(2.0 / math.pi)
_COLORS = (plot.SKY, plot.BLUE, plot.GREEN, plot.ORANGE, plot.RED)


@dataclass(frozen=True)
class Setting:
    """The size of the study."""

    rates: dict[int, tuple[float, ...]]
    """The learning rates for each width, the narrowest width first."""
    steps: int
    batch: int
    length: int


_RATES = (0.00025, 0.00035, 0.0005, 0.0007, 0.001, 0.0014, 0.002, 0.0028, 0.004, 0.0056, 0.008)
FULL = Setting({32: _RATES[6:], 64: _RATES[4:9], 128: _RATES[2:8], 256: _RATES[:5]}, 250, 16, 64)
QUICK = Setting({32: _RATES[7:10], 64: _RATES[5:8]}, 20, 4, 16)


@dataclass(frozen=True)
class Model:
    """One width, trained at every learning rate. Norms, sums and cosines are those of the run with the best rate, by step."""

    width: int
    elements: int
    """N, the number of parameters."""
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """The final loss for each rate; infinite if the loss became NaN or infinite."""
    best_rate: float
    """The vertex of the parabola through the losses at the best rate and its neighbours, over the logarithm of the rate."""
    norms: tuple[float, ...]
    sums: tuple[float, ...]
    """‖g‖₁."""
    cosines: tuple[float, ...]
    """cos(sign g, g)."""

    def late(self, series: Sequence[float]) -> list[float]:
        """The second half of a series, when the initial fall of the loss is over."""
        return list(series[len(series) // 2 :])

    def quantile(self, share: float) -> float:
        """A quantile of the norm in the second half of training."""
        return float(np.quantile(self.late(self.norms), share))

    @property
    def above(self) -> float:
        """The share of steps with a norm above 1, in the second half of training."""
        late = self.late(self.norms)
        return sum(norm > 1.0 for norm in late) / len(late)

    @property
    def cosine(self) -> float:
        """The median cosine in the second half of training."""
        return float(np.median(self.late(self.cosines)))


@dataclass(frozen=True)
class DefaultNorm(Findings):
    """The result of :func:`run`."""

    size: Setting
    models: tuple[Model, ...]

    def setting(self) -> str:
        """What was run."""
        size = self.size
        return (
            "Pre-LN transformers of 2 layers with GPT-2's first weights, characters of Python's manual, batches of "
            f"{size.batch}×{size.length}, {size.steps} steps of Adam, no clipping, no warm-up. Gradients: at each width's best rate, "
            "second half of training."
        )

    def exponent(self, figures: Sequence[float]) -> float:
        """The exponent a of a least-squares fit of figures ∝ N^a, for one figure of each model."""
        elements = [model.elements for model in self.models]
        return float(np.polyfit(np.log(elements), np.log(figures), 1)[0])

    def claims(self) -> list[Claim]:
        """The claims, judged."""
        medians = [model.quantile(0.5) for model in self.models]
        above = [model.above for model in self.models]
        cosines = [model.cosine for model in self.models]
        growth = self.exponent(medians)
        sums = self.exponent([float(np.median(model.late(model.sums))) for model in self.models])
        best = self.exponent([model.best_rate for model in self.models])
        near = [0.5 <= median <= 2.0 for median in medians]
        return [
            judge(
                "The norm of the gradient is about 1 at every size",
                "median near 1",
                f"median {spread(medians, 3)}",
                holds=all(near),
                partly=any(near),
                criterion="every median in [0.5, 2]; partly: some",
            ),
            judge(
                "It does not depend on the size",
                "∝ N⁰",
                f"∝ {power('N', growth)}",
                holds=abs(growth) <= 0.1,
                partly=abs(growth) <= 0.25,
                criterion="exponent within 0.1 of 0; partly: 0.25",
            ),
            judge(
                "A norm above 1 is an outlier",
                "few steps above 1",
                f"{min(above):.0%} to {max(above):.0%} of steps",
                holds=max(above) <= 0.1,
                partly=min(above) <= 0.25,
                criterion="at most 10% at every width; partly: at most 25% at some",
            ),
            judge(
                "The sign-cosine is that of a Gaussian",
                f"{_GAUSSIAN:.3f} at every size",
                f"{spread(cosines)}",
                holds=all(abs(cosine - _GAUSSIAN) <= 0.1 for cosine in cosines),
                partly=max(cosines) <= 1.5 * min(cosines),
                criterion="within 0.1 at every width; partly: within a factor of 1.5 of each other",
            ),
            judge(
                "‖g‖₁ grows with the root of the size",
                "∝ N⁰·⁵",
                f"∝ {power('N', sums)}",
                holds=abs(sums - 0.5) <= 0.05,
                partly=abs(sums - 0.5) <= 0.15,
                criterion="exponent within 0.05; partly: 0.15",
            ),
            judge(
                "Adam's best rate falls with the root of the size",
                "∝ N⁻⁰·⁵",
                f"∝ {power('N', best)}",
                holds=abs(best + 0.5) <= 0.1,
                partly=best <= -0.1,
                criterion="exponent within 0.1 of −0.5; partly: at most −0.1",
            ),
        ]

    def tables(self) -> list[Table]:
        """One row a width."""
        gradients = tuple(
            (
                f"{model.width}",
                number(model.elements),
                number(model.norms[0]),
                *(number(model.quantile(share)) for share in (0.5, 0.9, 0.99)),
                f"{model.above:.0%}",
                number(model.cosine),
                number(float(np.median(model.late(model.sums)))),
            )
            for model in self.models
        )
        rates = sorted({rate for model in self.models for rate in model.rates})
        losses = tuple(
            (
                f"{model.width}",
                *(_cell(dict(zip(model.rates, model.losses, strict=True)).get(rate)) for rate in rates),
                number(model.best_rate, 2),
            )
            for model in self.models
        )
        return [
            Table("Gradients", ("width", "N", "first norm", "median", "90%", "99%", "above 1", "sign-cosine", "‖g‖₁"), gradients),
            Table("Final loss by rate", ("width", *(f"{rate:g}" for rate in rates), "best rate"), losses),
        ]

    def draw(self, figure: Figure) -> None:
        """Norms over training, losses over rates, best rates over sizes."""
        figure.set_size_inches(12.0, 4.2)
        norms, losses, best = figure.subplots(1, 3)
        for model, color in zip(self.models, _COLORS, strict=False):
            norms.semilogy(range(1, len(model.norms) + 1), model.norms, color=color, linewidth=1.0, label=f"width {model.width}")
            losses.semilogx(model.rates, model.losses, "o-", color=color, label=f"width {model.width}")
            best.loglog([model.elements], [model.best_rate], "o", color=color, markersize=7)
        norms.axhline(1.0, color=INK, linewidth=1.0, linestyle="--")
        plot.label(norms, "Norm over training", "step", "norm of the gradient n")
        plot.plain_ticks(norms.yaxis, losses.xaxis)
        plot.label(losses, f"Loss after {self.size.steps} steps", "Adam's rate", "loss, nats per character")
        losses.legend()
        self._lines(best)

    def _lines(self, axes: Axes) -> None:
        elements = np.array([float(model.elements) for model in self.models])
        rates = np.array([model.best_rate for model in self.models])
        middle_n, middle = np.exp(np.log(elements).mean()), np.exp(np.log(rates).mean())
        measured = self.exponent(list(rates))
        for exponent, name, line in ((-0.5, "theory: N⁻⁰·⁵", "--"), (measured, f"measured: {power('N', measured)}", "-")):
            axes.loglog(elements, middle * (elements / middle_n) ** exponent, line, color=INK, linewidth=1.0, label=name)
        plot.label(axes, "Best rate", "number of parameters N", "Adam's best rate")
        plot.plain_ticks(axes.yaxis)
        axes.legend()


def run(options: Options) -> DefaultNorm:
    """Train every width at every rate."""
    size = QUICK if options.quick else FULL
    # The widest models take longest, so they start first: else one CPU would still run one when the others are done.
    cases = [(width, rate) for width, rates in reversed(size.rates.items()) for rate in rates]
    ticker = Ticker(size.steps * len(cases), options.progress)
    jobs = [partial(_train, size, width, rate, options.seed, ticker.counter(f"width {width}, rate {rate:g}")) for width, rate in cases]
    courses = dict(zip(cases, side_by_side(jobs), strict=True))
    return DefaultNorm(size, tuple(_model(width, rates, [courses[width, rate] for rate in rates]) for width, rates in size.rates.items()))


@dataclass(frozen=True)
class _Course:
    elements: int
    trained: Trained
    sums: tuple[float, ...]
    cosines: tuple[float, ...]


def _train(size: Setting, width: int, rate: float, seed: int, tick: Callable[[int], None]) -> _Course:
    corpus = manual()
    model = seeded(lambda: small_weights(Transformer(len(corpus.characters), width, size.length)), seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    sums: list[float] = []
    cosines: list[float] = []

    def step(index: int, batch: Batch) -> tuple[float, float]:
        found = grad_stats(model)
        sums.append(found.l1)
        cosines.append(found.sign_cosine)
        optimizer.step()
        return found.l2, 1.0

    batches = corpus.batches(size=size.batch, length=size.length, seed=seed)
    trained = train(model, batches, step, steps=size.steps, tick=tick)
    return _Course(sum(parameter.numel() for parameter in model.parameters()), trained, tuple(sums), tuple(cosines))


def _model(width: int, rates: tuple[float, ...], courses: Sequence[_Course]) -> Model:
    losses = tuple(course.trained.final for course in courses)
    best = courses[losses.index(min(losses))]
    return Model(width, best.elements, rates, losses, vertex(rates, losses), best.trained.norms, best.sums, best.cosines)


def _cell(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "diverges"


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at the vertex of the parabola through the least loss and its neighbours; the best rate itself if a neighbour is missing."""
    index = losses.index(min(losses))
    if index in (0, len(rates) - 1) or not math.isfinite(losses[index + 1]) or not math.isfinite(losses[index - 1]):
        return rates[index]
    a, b, _ = np.polyfit(np.log(rates[index - 1 : index + 2]), losses[index - 1 : index + 2], 2)
    return float(np.exp(-b / (2.0 * a))) if a > 0.0 else rates[index]
