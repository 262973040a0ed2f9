"""One record a step of an optimizer, of its gradients before clipping, whenever and however often they are clipped.

Arrows: torch's clipping functions → :meth:`Steps.before` (measures) → the callback's hook → :meth:`Steps.end` (logs).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from normclip.monitor import Figures, GradMonitor
from normclip.patch import ClipsByNorm, Patch
from normclip.statistics import Stats, named


class Steps:
    """The steps of optimizers while a model trains, each of which a monitor logs once.

    The figures are of the optimizer's own parameters, as they were before the clipping that precedes the step. Clipping once more what a
    clipping has left unchanged belongs to that one: clipping in parts, or in several ways. Where nothing is clipped, the figures are of
    the gradients that the optimizer gets. Clipping is seen where it is by torch's functions, which are replaced until ``patch`` is undone.

    Args:
        monitor: Nobody else tells it of torch's functions, also where it was given to :func:`normclip.patch_torch`.
        step: The number of the present step.
        optimizers: What takes steps, and the parameters of each; None for all of the monitor's.
    """

    def __init__(
        self, monitor: GradMonitor, step: Callable[[], int], optimizers: Callable[[], Mapping[Hashable, Iterable[Any] | None]]
    ) -> None:
        self.monitor = monitor
        self._step = step
        self._optimizers = optimizers
        self._clipped: dict[Hashable, _Measured] = {}  # since the optimizer's last step
        self._clipping: dict[Hashable, _Measured] = {}  # now
        self._awaiting = False
        self.patch = Patch(watcher=self).__enter__()

    def before(self, parameters: Sequence[Any], share: bool) -> ClipsByNorm | None:
        """Measure the gradients of each optimizer that has one of these parameters; or return what does while it clips them."""
        self._clipping = {}
        if self.is_logged:
            return None
        given, clips = {id(parameter) for parameter in parameters}, None
        for optimizer, pairs in self._monitored().items():
            identities = {id(parameter) for _, parameter in pairs}
            if given.isdisjoint(identities):
                continue
            measured = self._clipped.get(optimizer)
            if measured is None or not measured.left_unchanged():
                measured = _Measured(self.monitor, pairs, self._step())
                if share and clips is None and given == identities:
                    clips = measured.clip_grad_norm_
                else:
                    measured.observe()
            self._clipping[optimizer] = measured
        return clips

    def after(self) -> None:
        """Keep what was found until the optimizer steps."""
        for measured in self._clipping.values():
            measured.keep_marks()
        self._clipped.update(self._clipping)
        if self._awaiting:
            for optimizer in self._clipping:
                self.end(optimizer)

    @property
    def is_logged(self) -> bool:
        """Whether the present step is, by this or by the user's own call of the monitor."""
        return self.monitor.step > self._step()

    def was_clipped(self, optimizer: Hashable = None) -> bool:
        """Whether the present gradients of an optimizer were seen before a clipping."""
        measured = self._clipped.get(optimizer)
        return measured is not None and measured.left_tensors()

    def clips_all(self, optimizer: Hashable) -> bool:
        """Whether clipping the parameters of this optimizer is clipping all that is measured of it."""
        parameters = self._optimizers()[optimizer]
        measured = {id(parameter) for _, parameter in self._monitored().get(optimizer, [])}
        return parameters is None or measured == {id(parameter) for parameter in parameters}

    def end_when_clipped(self) -> None:
        """Log the present step when its gradients are clipped, from the same read."""
        self._awaiting = True

    def end(self, optimizer: Hashable = None) -> None:
        """Log the present step, which is one of this optimizer, unless it is logged, or no parameter of it is monitored."""
        self._awaiting = False
        pairs = self._monitored().get(optimizer)
        if not pairs or self.is_logged:
            return
        if self.was_clipped(optimizer):
            measured = self._clipped[optimizer]
        else:
            measured = _Measured(self.monitor, pairs, self._step())
            measured.observe()
        self._clipped.pop(optimizer, None)
        self.monitor.step = self._step()
        self.monitor._end_step(*measured.found)

    def _monitored(self) -> dict[Hashable, list[tuple[str, Any]]]:
        """The parameters of each optimizer that the monitor has, with their names there."""
        pairs, monitored = named(self.monitor.model), {}
        for optimizer, parameters in self._optimizers().items():
            identities = None if parameters is None else {id(parameter) for parameter in parameters}
            monitored[optimizer] = [pair for pair in pairs if identities is None or id(pair[1]) in identities]
        return monitored


class _Measured(GradMonitor):
    """Measures, or clips and measures, in a monitor's place, and keeps what that is to log."""

    found: tuple[Stats | None, Figures]
    _marks: list[tuple[weakref.ref[Any] | None, int]]

    def __init__(self, monitor: GradMonitor, pairs: list[tuple[str, Any]], step: int) -> None:
        super().__init__(pairs, (), every=monitor.every, layers=monitor.layers)
        self.step = step

    def keep_marks(self) -> None:
        """Remember the gradients that there are: which tensors, at which version of their elements."""
        self._marks = [(None, 0) if grad is None else (weakref.ref(grad), grad._version) for grad in self._grads()]

    def left_tensors(self) -> bool:
        """Whether the gradients are the same tensors still, as optimizers that drop them get new ones."""
        return all(grad is (mark and mark()) for grad, (mark, _) in zip(self._grads(), self._marks, strict=True))

    def left_unchanged(self) -> bool:
        """Whether nothing was written to them, or added, either."""
        return self.left_tensors() and all(
            grad is None or grad._version == version for grad, (_, version) in zip(self._grads(), self._marks, strict=True)
        )

    def _grads(self) -> list[Any]:
        return [parameter.grad for _, parameter in self.model]

    def _end_step(self, stats: Stats | None, clip: Figures) -> None:
        self.found = stats, clip
