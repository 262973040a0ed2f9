"""Logs one record for each optimizer step, of its gradients before clipping, whenever and however often they are clipped.

torch's clipping functions call :meth:`Steps.before`, which measures; the hook of a callback calls :meth:`Steps.end`, which logs. Meanwhile
the framework counts the steps, so that further records of the same step, such as by calls of the monitor's methods, are not logged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from normclip._names import named
from normclip.monitor import Figures, GradMonitor
from normclip.monitor.trackers import among_others
from normclip.patch import ClipsByNorm, Patch
from normclip.statistics import Stats


class Steps:
    """Lets a monitor log each optimizer step once, while a model trains.

    The figures are those of the gradients of the optimizer's parameters before the first clipping since its last step. A later clipping
    call is taken to belong to that clipping if nothing else has changed the gradients in between: they may be clipped in parts, or in
    several ways. Without clipping, the figures are those of the gradients in the optimizer step. Clipping is noticed if it is by torch's
    functions, which are replaced until :meth:`undo`.

    Args:
        monitor: The monitor, whose steps are numbered by ``step`` until :meth:`undo`. It then logs calls of torch's functions only through
            this object, even if it was also passed to :func:`normclip.patch_torch`.
        step: Returns the number of the present step.
        optimizers: Returns the optimizers with the parameters of each; None stands for all parameters of the monitor. Without this
            function clipping is not noticed.
    """

    def __init__(
        self,
        monitor: GradMonitor,
        step: Callable[[], int],
        optimizers: Callable[[], Mapping[Hashable, Iterable[Any] | None]] | None = None,
    ) -> None:
        self.monitor = monitor
        self._step = step
        self._optimizers = optimizers or dict
        # For each optimizer, the measurement of its gradients before clipping: since its last step, and in the present clipping call.
        self._clipped: dict[Hashable, _Measured] = {}
        self._clipping: dict[Hashable, _Measured] = {}
        self._awaiting = False
        # What is to be logged of a step when it is over, unless the user's own call of the monitor has logged the step by then.
        self._held: tuple[int, _Measured] | None = None
        self._patch = None if optimizers is None else Patch(watcher=self).__enter__()
        monitor.step = step()
        monitor._present = step

    def undo(self) -> None:
        """Put torch's functions back, and let the monitor count by itself. A second call does nothing."""
        if self.monitor._present is self._step:
            self.monitor._present = None
        if self._patch is not None:
            self._patch.undo()

    def before(self, parameters: Sequence[Any], share: bool) -> ClipsByNorm | None:
        """Measure the gradients of each optimizer that has one of these parameters.

        If ``share``, and the parameters are exactly those of one optimizer, returns a function that clips and measures by one read.
        """
        self._clipping = {}
        if self.is_measured:
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
        """Keep the measurements until the optimizer steps."""
        for measured in self._clipping.values():
            measured.keep_marks()
        self._clipped.update(self._clipping)
        if self._awaiting:
            for optimizer in self._clipping:
                self.end(optimizer)

    @property
    def is_measured(self) -> bool:
        """Whether the record of the present step is there: logged, by this object or by the user's own call of the monitor, or held."""
        return self._held is not None or self.monitor.step > self._step()

    def was_clipped(self, optimizer: Hashable = None) -> bool:
        """Whether the present gradients of an optimizer were measured before they were clipped."""
        measured = self._clipped.get(optimizer)
        return measured is not None and measured.left_tensors()

    def clips_all(self, optimizer: Hashable) -> bool:
        """Whether all parameters of this optimizer belong to the monitor, so that clipping them can measure them."""
        parameters = self._optimizers()[optimizer]
        measured = {id(parameter) for _, parameter in self._monitored().get(optimizer, [])}
        return parameters is None or measured == {id(parameter) for parameter in parameters}

    def end_when_clipped(self) -> None:
        """Log the present step in the next clipping call, from the same read."""
        self._awaiting = True

    def end(self, optimizer: Hashable = None) -> None:
        """Log the present step, of this optimizer, unless it has been logged or the monitor has no parameter of the optimizer."""
        self.hold(optimizer)
        self.release()

    def hold(self, optimizer: Hashable = None) -> None:
        """As :meth:`end`, but log at the next :meth:`release`, as the gradients may still be clipped, also by the monitor."""
        self._awaiting = False
        pairs, measured = self._monitored().get(optimizer), self._clipped.pop(optimizer, None)
        if not pairs or self.is_measured:
            return
        if measured is None or not measured.left_tensors():
            measured = _Measured(self.monitor, pairs, self._step())
            measured.observe()
        self._held = self._step(), measured

    def release(self) -> None:
        """Log what is held, unless the user's own call of the monitor has logged that step."""
        held, self._held = self._held, None
        if held is not None and self.monitor.step <= held[0]:
            self.monitor._log(held[0], *held[1].found)

    def _monitored(self) -> dict[Hashable, list[tuple[str, Any]]]:
        """For each optimizer, the parameters that belong to the monitor, with their names."""
        pairs, monitored = named(self.monitor.model), {}
        for optimizer, parameters in self._optimizers().items():
            identities = None if parameters is None else {id(parameter) for parameter in parameters}
            monitored[optimizer] = [pair for pair in pairs if identities is None or id(pair[1]) in identities]
        return monitored


class Latest:
    """A sink that keeps figures until a framework logs, by names for that place; figures of several steps as far as they differ by name."""

    def __init__(self) -> None:
        self._figures: Figures = {}

    def __call__(self, figures: Figures, step: int) -> None:
        """Keep the figures."""
        self._figures |= among_others(figures)

    def take(self) -> Figures:
        """The figures, which are not kept any longer."""
        figures, self._figures = self._figures, {}
        return figures


class _Measured(GradMonitor):
    """A monitor that measures, or clips and measures, and keeps the figures instead of logging them."""

    found: tuple[Stats | None, Figures]
    _marks: list[tuple[weakref.ref[Any] | None, int]]

    def __init__(self, monitor: GradMonitor, pairs: list[tuple[str, Any]], step: int) -> None:
        super().__init__(pairs, (), every=monitor.every, layers=monitor.layers, depth=monitor.depth)
        self.step = step

    def keep_marks(self) -> None:
        """Remember the gradient tensors and their version counters."""
        self._marks = [(None, 0) if grad is None else (weakref.ref(grad), grad._version) for grad in self._grads()]

    def left_tensors(self) -> bool:
        """Whether the gradients are still the same tensors. After ``zero_grad`` and ``backward`` they are usually new ones."""
        return all(grad is (mark and mark()) for grad, (mark, _) in zip(self._grads(), self._marks, strict=True))

    def left_unchanged(self) -> bool:
        """Whether the gradients are the same tensors and have not been written."""
        return self.left_tensors() and all(
            grad is None or grad._version == version for grad, (_, version) in zip(self._grads(), self._marks, strict=True)
        )

    def _grads(self) -> list[Any]:
        return [parameter.grad for _, parameter in self.model]

    def _end_step(self, stats: Stats | None, clip: Figures) -> None:
        self.found = stats, clip
