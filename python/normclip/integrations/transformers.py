"""A Transformers callback that logs gradients, and clips them by any rule, once for each optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback

from normclip.integrations._steps import Latest, Steps
from normclip.monitor import GradMonitor
from normclip.patch import logs_to
from normclip.rules import Rule

__all__ = ["GradMonitorCallback"]


class GradMonitorCallback(TrainerCallback):
    """Lets a :class:`~normclip.monitor.GradMonitor` log each optimizer step, and clip.

    Each step is logged once, with the Trainer's ``global_step``, from gradients that are accumulated, unscaled and not yet clipped. Before
    it calls the callback, the Trainer (of Transformers 5) clips by torch's function, or only measures if ``max_grad_norm`` is 0. So
    normclip replaces torch's functions while the model trains (there is no need to call :func:`normclip.patch_torch`), and a step takes one
    read. If training raises, they stay replaced until the Trainer is freed or training starts again.

    In distributed training, only the first process passes figures to the sinks.

    Args:
        monitor: A monitor of the model, or of a part of it.
        rule: Clip here by this rule of :mod:`normclip.rules`; a number means :class:`normclip.rules.Hard`. Needs ``max_grad_norm=0``, and
            whole gradients or DTensors in every process, as under DDP and FSDP2.
        log: The Trainer's method ``log``, to pass it figures whenever the Trainer logs, and so to all that it reports to:
            ``trainer.add_callback(GradMonitorCallback(monitor, log=trainer.log))``. These are the latest figures, named as
            ``gradients/norm/all`` and ``gradients/norm/<layer>``.

    Raises:
        ValueError: When training starts: ``rule`` is given and the Trainer also clips, or the monitor was given to ``patch_torch``; or the
            gradients are out of reach, as DeepSpeed and FSDP of version 1 keep and clip them themselves.
        RuntimeError: In the first step: the Trainer has clipped in another way than by torch's functions.
    """

    def __init__(
        self, monitor: GradMonitor, rule: Rule | float | None = None, *, log: Callable[[dict[str, float]], None] | None = None
    ) -> None:
        self.monitor = monitor
        self.rule = rule
        self._pass_on = log
        self._latest = Latest()
        self._steps: Steps | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Check that the Trainer does not clip too, and replace torch's clipping functions, to notice clipping."""
        self._end()
        if self.rule is not None and args.max_grad_norm:
            raise ValueError("both GradMonitorCallback and the Trainer clip: leave out rule, or pass max_grad_norm=0 to TrainingArguments")
        if self.rule is not None and logs_to(self.monitor):
            raise ValueError("both patch_torch and GradMonitorCallback with a rule log to the monitor: choose one")
        if owner := _owner_of_gradients(args, others["model"]):
            raise ValueError(f"{owner} clips by itself, where GradMonitorCallback finds no gradients before it: leave out the callback")
        sinks = [sink for sink in self.monitor.log if sink is not self._latest] if state.is_world_process_zero else []
        # All processes pass figures to the Trainer, which knows what to do with them.
        self.monitor.log = (*sinks, *([] if self._pass_on is None else [self._latest]))
        present = weakref.proxy(state)
        self._steps = Steps(self.monitor, lambda: present.global_step, None if self.rule is not None else lambda: {None: None})
        # Transformers calls no hook if training raises. The state is freed with the Trainer.
        weakref.finalize(state, self._steps.undo)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Log what was measured when the Trainer clipped, or clip and log."""
        if self.rule is not None:
            self.monitor.clip_(self.rule)
        elif self._steps is not None:
            if args.max_grad_norm > 0 and not self._steps.is_measured and not self._steps.was_clipped():
                raise RuntimeError(
                    "the Trainer has not clipped by torch's functions, so that the norm before clipping is unknown: "
                    "pass max_grad_norm=0 to TrainingArguments, and clip by the rule of GradMonitorCallback"
                )
            self._steps.end()

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Pass figures to the Trainer."""
        if self._pass_on is not None and (figures := self._latest.take()):  # the Trainer calls this method again with these
            self._pass_on(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Put torch's functions back."""
        self._end()

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.undo()
            self._steps = None


def _owner_of_gradients(args: Any, model: Any) -> str | None:
    """The name of the library that keeps the gradients where torch's functions do not find them, or None."""
    if getattr(args, "deepspeed_plugin", None) is not None:  # set by an argument or by Accelerate's settings
        return "DeepSpeed"
    return "FSDP of version 1" if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) else None
