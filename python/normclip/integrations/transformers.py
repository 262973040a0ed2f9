"""Transformers: gradients logged, and clipped by any rule, once a step of the optimizer."""

from __future__ import annotations

import weakref
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback

from normclip.integrations._steps import Steps
from normclip.monitor import GradMonitor
from normclip.patch import tells
from normclip.rules import Rule


class GradMonitorCallback(TrainerCallback):
    """Lets a :class:`~normclip.monitor.GradMonitor` log each step of the optimizer, and clip.

    Each step is logged once, with the Trainer's ``global_step``, from gradients that are accumulated and unscaled, and not yet clipped. The
    Trainer (of Transformers 5) clips, or measures where ``max_grad_norm`` is 0, by torch's function before it calls the callback. So
    normclip takes that function's place while the model trains (see :func:`normclip.patch_torch`, which is not needed), and there is one
    read a step. If training raises, normclip stays there until the Trainer is gone or training begins anew.

    Figures go to the sinks of the monitor, in distributed training on the first process alone.

    Args:
        monitor: A monitor of the model, or of a part of it.
        rule: Clip here by this rule of :mod:`normclip.rules`; a number means :class:`normclip.rules.Hard`. Needs ``max_grad_norm=0``, and
            whole gradients or DTensors in every process, as under DDP and FSDP2.

    Raises:
        ValueError: When training starts: ``rule`` is given and the Trainer also clips, or the monitor was given to ``patch_torch``; or the
            gradients are out of reach, as DeepSpeed and FSDP of version 1 keep and clip them themselves.
        RuntimeError: In the first step: the Trainer has clipped in another way than by torch's functions.
    """

    def __init__(self, monitor: GradMonitor, rule: Rule | float | None = None) -> None:
        self.monitor = monitor
        self.rule = rule
        self._steps: Steps | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Check that nobody else clips, and begin to see what is clipped."""
        self._end()
        if self.rule is not None and args.max_grad_norm:
            raise ValueError("both GradMonitorCallback and the Trainer clip: leave out rule, or pass max_grad_norm=0 to TrainingArguments")
        if self.rule is not None and tells(self.monitor):
            raise ValueError("the monitor is told by patch_torch, and by GradMonitorCallback with a rule: choose one")
        if owner := _owner_of_gradients(args, others["model"]):
            raise ValueError(f"{owner} clips by itself, where GradMonitorCallback finds no gradients before it: leave out the callback")
        if not state.is_world_process_zero:
            self.monitor.log = ()
        self.monitor.step = state.global_step
        if self.rule is None:
            present = weakref.proxy(state)
            self._steps = Steps(self.monitor, lambda: present.global_step, lambda: {None: None})
            # The Trainer's state goes with it, and nobody else says that training has raised.
            weakref.finalize(state, self._steps.patch.undo)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Log what was found when the Trainer clipped or measured, or clip and log."""
        if self.rule is not None:
            self.monitor.step = state.global_step
            self.monitor.clip_(self.rule)
        elif self._steps is not None:
            if args.max_grad_norm > 0 and not self._steps.is_logged and not self._steps.was_clipped():
                raise RuntimeError(
                    "the Trainer has not clipped by torch's functions, so that the norm before clipping is unknown: "
                    "pass max_grad_norm=0 to TrainingArguments, and clip by the rule of GradMonitorCallback"
                )
            self._steps.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leave torch as it was."""
        self._end()

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.patch.undo()
            self._steps = None


def _owner_of_gradients(args: Any, model: Any) -> str | None:
    """Who keeps gradients where torch's functions do not find them."""
    if getattr(args, "deepspeed_plugin", None) is not None:  # by an argument or by Accelerate's settings
        return "DeepSpeed"
    return "FSDP of version 1" if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) else None
