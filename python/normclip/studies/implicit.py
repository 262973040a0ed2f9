r"""Which flow gradient descent follows: to order h the gradient flow of L, to order h² that of :math:`L + \tfrac h4 \|g\|^2`.

Barrett and Dherin 2021 (arXiv 2009.11162): the step h acts as a regularizer. The study compares gradient descent with three flows after the
same time, for steps that are halved each time. The order of a flow is the power of h with which its distance from gradient descent falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from normclip import theory
from normclip.studies import plot
from normclip.studies.report import Claim, Findings, Options, Table, judge, number, spread

TITLE = "the flows that gradient descent follows"

FLOW, MODIFIED, NEXT = "flow", "modified flow", "next-order flow"
_FLOWS = {FLOW: (1, plot.RED, "o-"), MODIFIED: (2, plot.BLUE, "s-"), NEXT: (3, plot.GREEN, "^-")}
_TIME = 1.0
_STEP = 0.1
"""The step for the parabola."""


def parabola(x: Tensor) -> Tensor:
    """x²/2."""
    return x.square().sum() / 2.0


def product(x: Tensor) -> Tensor:
    """(0.6 − xy)²/2, whose minima are a curve; the penalty determines where on it gradient descent ends."""
    return (0.6 - x[0] * x[1]).square() / 2.0


@dataclass(frozen=True)
class Distance:
    """The distance between the end of gradient descent and the end of each flow."""

    step: float
    to: dict[str, float]
    """By the name of the flow."""


@dataclass(frozen=True)
class Implicit(Findings):
    """The result of :func:`run`."""

    parabola_end: float
    """Where gradient descent on the parabola ends."""
    parabola: Distance
    product: tuple[Distance, ...]
    """For steps that are halved each time, the longest first."""

    def setting(self) -> str:
        """What was run."""
        return f"(0.6 − xy)²/2 from (2.8, 0.4), and x²/2 from 1 with steps of {_STEP:g}; time {_TIME:g}, float64."

    def orders(self, flow: str) -> list[float]:
        """The order between each step and the next: log₂ of the ratio of the distances, as the step is halved."""
        pairs = zip(self.product, self.product[1:], strict=False)
        return [math.log(long.to[flow] / short.to[flow]) / math.log(long.step / short.step) for long, short in pairs]

    def claims(self) -> list[Claim]:
        """The claims, judged."""
        found = [
            self._order("Gradient descent leaves the path of steepest descent at order h", FLOW),
            self._order("It follows the flow of L + (h/4)·n² to order h²", MODIFIED),
            self._order("With two more terms the flow is right to order h³", NEXT),
        ]
        nearer = [distance.to[FLOW] / distance.to[MODIFIED] for distance in self.product]
        found.append(
            judge(
                "The penalty (h/4)·n² brings the flow nearer at every step size",
                "nearer, the more so the smaller h",
                f"{spread(nearer)} times nearer",
                holds=min(nearer) > 1.0 and nearer == sorted(nearer),
                partly=max(nearer) > 1.0,
                criterion="nearer for every h, by a factor that rises as h falls; partly: for some h",
            )
        )
        exact, measured = by_hand(_STEP), [self.parabola.to[flow] for flow in _FLOWS]
        errors = [abs(ours / theirs - 1.0) for ours, theirs in zip(measured, exact, strict=True)]
        found.append(
            judge(
                "Distances on x²/2 are those that a calculation by hand gives",
                ", ".join(f"{value:.4e}" for value in exact),
                ", ".join(f"{value:.4e}" for value in measured),
                holds=max(errors) <= 1e-6,
                partly=max(errors) <= 1e-2,
                criterion="all within 1e-6, relative; partly: within 1e-2",
            )
        )
        return found

    def _order(self, claim: str, flow: str) -> Claim:
        predicted, measured = _FLOWS[flow][0], self.orders(flow)[-1]
        return judge(
            claim,
            f"order {predicted}",
            f"order {measured:.2f}",
            holds=abs(measured - predicted) <= 0.1,
            partly=abs(measured - predicted) <= 0.5,
            criterion="the order between the two smallest steps is within 0.1; partly: within 0.5",
        )

    def tables(self) -> list[Table]:
        """One row for each step, with the order from the step before."""
        rows: list[tuple[str, ...]] = []
        for position, distance in enumerate(self.product):
            orders = ["" if position == 0 else f"{self.orders(flow)[position - 1]:.2f}" for flow in _FLOWS]
            cells = [cell for flow, order in zip(_FLOWS, orders, strict=True) for cell in (f"{distance.to[flow]:.3e}", order)]
            rows.append((number(distance.step, 4), *cells))
        heading = [name for flow in _FLOWS for name in (flow, "order")]
        return [Table("Distance of gradient descent on (0.6 − xy)²/2", ("h", *heading), tuple(rows))]

    def draw(self, figure: Figure) -> None:
        """Plot the distance over the step, with a line for each flow."""
        figure.set_size_inches(6.4, 4.4)
        axes = figure.subplots()
        steps = [distance.step for distance in self.product]
        for flow, (order, color, line) in _FLOWS.items():
            ends = [distance.to[flow] for distance in self.product]
            axes.loglog(steps, ends, line, color=color, label=f"{flow}: order {self.orders(flow)[-1]:.2f} (theory {order})")
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.minorticks_off()
        plot.label(axes, "Gradient descent and three flows", "step h", f"distance after time {_TIME:g}")
        axes.legend(loc="lower right")


def run(options: Options) -> Implicit:
    """Compute gradient descent and the flows. Uses no random numbers."""
    steps = [0.05, 0.025, 0.0125, 0.00625]
    one, corner = torch.ones(1, dtype=torch.float64), torch.tensor([2.8, 0.4], dtype=torch.float64)
    cases = [(parabola, one, _STEP), *[(product, corner, step) for step in steps]]
    distances = []
    for index, (loss, start, step) in enumerate(cases):
        options.progress(index, len(cases), f"step {step:g}")
        distances.append(distance(loss, start, step, substeps=50 if options.quick else 200))
    options.progress(len(cases), len(cases), "done")
    return Implicit(descend(parabola, one, _STEP).item(), distances[0], tuple(distances[1:]))


def by_hand(step: float) -> list[float]:
    """The exact distances on x²/2 from x = 1, where the flows are x' = −λx with λ = 1, 1 + h/2 and 1 + h/2 + h²/3."""
    end = (1.0 - step) ** round(_TIME / step)
    rates = [1.0, 1.0 + step / 2.0, 1.0 + step / 2.0 + step**2 / 3.0]
    return [abs(end - math.exp(-_TIME * rate)) for rate in rates]


def distance(loss: theory.flows.Loss, start: Tensor, step: float, substeps: int) -> Distance:
    """The distance between the end of gradient descent and the end of each flow."""
    velocities: dict[str, Callable[[Tensor], Tensor]] = {
        FLOW: partial(theory.gradient_flow, loss),
        MODIFIED: partial(theory.modified_flow, loss, lr=step),
        NEXT: partial(theory.next_order_flow, loss, lr=step),
    }
    end = descend(loss, start, step)
    return Distance(step, {flow: (end - _integrate(velocity, start, substeps)).norm().item() for flow, velocity in velocities.items()})


def descend(loss: theory.flows.Loss, start: Tensor, step: float) -> Tensor:
    """The point that gradient descent reaches after _TIME."""
    x = start
    for _ in range(round(_TIME / step)):
        x = x + step * theory.gradient_flow(loss, x)
    return x


def _integrate(velocity: Callable[[Tensor], Tensor], x: Tensor, substeps: int) -> Tensor:
    """The point that a flow reaches after _TIME, by the classical Runge-Kutta method of order 4."""
    dt = _TIME / substeps
    for _ in range(substeps):
        a = velocity(x)
        b = velocity(x + dt / 2.0 * a)
        c = velocity(x + dt / 2.0 * b)
        d = velocity(x + dt * c)
        x = x + dt / 6.0 * (a + 2.0 * b + 2.0 * c + d)
    return x
