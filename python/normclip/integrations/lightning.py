"""A Lightning callback that logs gradients, and clips them by any rule, once for each optimizer step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from normclip.integrations._steps import Latest, Steps
from normclip.monitor import GradMonitor
from normclip.rules import Rule

__all__ = ["GradMonitorCallback"]


class GradMonitorCallback(pl.Callback):
    """Lets a :class:`~normclip.monitor.GradMonitor` log each optimizer step, and clip.

    Each step is logged once, with Lightning's ``global_step``, from gradients that are accumulated, unscaled and not yet clipped. The
    figures are those of the optimizer's parameters that belong to the monitor; without such parameters, the step is not logged.

    - With ``rule``, the callback clips, from the same read. Leave out ``gradient_clip_val``.
    - With ``gradient_clip_val``, Lightning clips by normclip's functions; clipping by norm and logging share one read.
    - An overridden ``configure_gradient_clipping`` may clip in any way, also by the monitor's methods, as the gradients are read before it
      is called.
    - Under manual optimization, ``clip_gradients`` and torch's clipping functions are noticed, as normclip replaces these functions while
      the model trains (there is no need to call :func:`normclip.patch_torch`). In place of normclip's own functions call the monitor's
      methods ``clip_`` or ``clip_grad_norm_``, which log by themselves. Other ways of clipping are not noticed. If gradients are clipped
      while they are still scaled (16-mixed, before ``scaler.unscale_``), the norm of the scaled gradients is logged.

    In distributed training, only the first process passes figures to the sinks. Every process must hold whole gradients or DTensors, as
    under DDP and FSDP2.

    Args:
        monitor: A monitor of the module, or of a part of it.
        rule: Clip by this rule of :mod:`normclip.rules`; a number means :class:`normclip.rules.Hard`.
        log: Also pass the figures to the module's ``log_dict``, and so to all loggers of the Trainer, in its logging steps
            (``log_every_n_steps``). These have the latest figures, named as ``gradients/norm/all`` and ``gradients/norm/<layer>``.

    Raises:
        ValueError: When training starts: ``rule`` is given, and Lightning also clips or has several optimizers; or the strategy is
            DeepSpeed or FSDP of version 1, whose parameters do not have the model's gradients.
    """

    def __init__(self, monitor: GradMonitor, rule: Rule | float | None = None, *, log: bool = False) -> None:
        self.monitor = monitor
        self.rule = rule
        self._latest = Latest() if log else None
        self._stepped = False
        self._steps: Steps | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that Lightning does not clip too, and that the parameters have the model's gradients."""
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
            raise ValueError(
                f"under {type(trainer.strategy).__name__} parameters do not have the model's gradients: use ModelParallelStrategy"
            )
        if self.rule is not None and trainer.gradient_clip_val:
            raise ValueError("both GradMonitorCallback and the Trainer clip: leave out either rule or gradient_clip_val")
        if self.rule is not None and len(trainer.optimizers) > 1:
            raise ValueError("rule takes the gradients of the whole monitor, and there are several optimizers: clip in the LightningModule")
        sinks = [sink for sink in self.monitor.log if sink is not self._latest] if trainer.is_global_zero else []
        # All processes log to Lightning, since its callbacks may look at any metric in all of them.
        self.monitor.log = (*sinks, *([] if self._latest is None else [self._latest]))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace torch's clipping functions, to notice clipping."""
        self._end()

        def optimizers() -> dict[Any, list[Any]]:
            return {
                optimizer: [parameter for group in optimizer.param_groups for parameter in group["params"]]
                for optimizer in trainer.optimizers
            }

        self._steps = Steps(self.monitor, lambda: trainer.global_step, None if self.rule is not None else optimizers)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Log the step, or clip and log, or have the clipping that follows log it."""
        self._stepped = True
        if self.rule is not None:
            self.monitor.clip_(self.rule)
        elif self._steps is not None:
            if _clips_by_norm(trainer, pl_module) and self._steps.clips_all(optimizer):
                self._steps.end_when_clipped()
            elif pl_module.automatic_optimization:  # configure_gradient_clipping is called next, which may call the monitor
                self._steps.hold(optimizer)
            else:
                self._steps.end(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *given: Any, **others: Any) -> None:
        """Log the step, if that has not been done, and pass figures to Lightning if it logs now."""
        if self._steps is not None:
            self._steps.release()
        if self._latest is not None and self._stepped and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._latest.take())
        self._stepped = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put torch's functions back."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put torch's functions back."""
        self._end()

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.release()
            self._steps.undo()
            self._steps = None


def _clips_by_norm(trainer: Any, module: Any) -> bool:
    """Whether Lightning will certainly call torch's ``clip_grad_norm_`` after the hook, with all parameters of the optimizer."""
    plugin = type(trainer.precision_plugin)
    return bool(
        trainer.gradient_clip_val
        and trainer.gradient_clip_algorithm != "value"
        and module.automatic_optimization
        and not is_overridden("configure_gradient_clipping", module)
        and not is_overridden("clip_gradients", module)
        and plugin.clip_gradients in (Precision.clip_gradients, MixedPrecision.clip_gradients)
        and plugin.clip_grad_by_norm is Precision.clip_grad_by_norm
        and plugin.main_params is Precision.main_params
    )
