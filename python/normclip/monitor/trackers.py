"""Sinks for places where others log, too: runs of Weights & Biases and of MLflow."""

from __future__ import annotations

import re
import time
from typing import Any

from normclip.monitor.sinks import Figures

__all__ = ["among_others", "mlflow_run", "wandb_run"]


def among_others(figures: Figures) -> Figures:
    """The figures by names for a place that they share: under "gradients/", those of all gradients as "norm/all".

    A name is never the beginning of another, since MLflow and others keep a file or folder for each.
    """
    return {f"gradients/{name}" if "/" in name else f"gradients/{name}/all": figure for name, figure in figures.items()}


class wandb_run:  # noqa: N801 (called as a function)
    """A sink that logs to a run of Weights & Biases.

    A figure is named as ``gradients/norm/all`` or ``gradients/norm/<layer>``. W&B draws these over ``gradients/step``, the monitor's step.
    They are logged at that step of the run, or at the run's current step if that is later, as W&B refuses figures of earlier steps.

    Args:
        run: What ``wandb.init`` returns.

    Raises:
        TypeError: ``run`` is no run.

    Example:
        >>> def monitor_of(model):  # with Weights & Biases
        ...     import wandb
        ...     return GradMonitor(model, wandb_run(wandb.init(project="…")), depth=2)
    """

    def __init__(self, run: Any) -> None:
        if not (callable(getattr(run, "log", None)) and callable(getattr(run, "define_metric", None))):
            raise TypeError(f"run is {run!r:.200}: pass what wandb.init returns")
        self.run = run
        run.define_metric("gradients/step", hidden=True)
        run.define_metric("gradients/*", step_metric="gradients/step")

    def __call__(self, figures: Figures, step: int) -> None:
        """Log the figures."""
        self.run.log({**among_others(figures), "gradients/step": step}, step=max(step, self.run.step))

    def __repr__(self) -> str:
        return f"wandb_run({self.run!r})"


class mlflow_run:  # noqa: N801 (called as a function)
    """A sink that logs to a run of MLflow, from any thread or process.

    A figure is named as ``gradients/norm/all`` or ``gradients/norm/<layer>``, with ``_`` for characters that MLflow does not allow.

    Args:
        run: What ``mlflow.start_run`` or ``mlflow.active_run`` returns, or the id of a run.

    Raises:
        ImportError: MLflow is not installed.
        TypeError: ``run`` is no run, or there is no active run.

    Example:
        >>> def monitor_of(model):  # with MLflow
        ...     import mlflow
        ...     return GradMonitor(model, mlflow_run(mlflow.start_run()), depth=2)
    """

    _MOST = 1000  # metrics that MLflow takes at once

    def __init__(self, run: Any) -> None:
        import mlflow

        run_id: str | None = run if isinstance(run, str) else getattr(getattr(run, "info", None), "run_id", None)
        if run_id is None:
            raise TypeError(f"run is {run!r:.200}: pass what mlflow.start_run returns, or the id of a run")
        self.run_id: str = run_id
        self.tracking_uri: str = mlflow.get_tracking_uri()

    def __call__(self, figures: Figures, step: int) -> None:
        """Log the figures."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        names = {re.sub(r"[^\w\-. :/]", "_", name): figure for name, figure in among_others(figures).items()}
        metrics = [Metric(name, figure, now, step) for name, figure in names.items()]
        client = MlflowClient(self.tracking_uri)
        for start in range(0, len(metrics), self._MOST):
            client.log_batch(self.run_id, metrics[start : start + self._MOST])

    def __repr__(self) -> str:
        return f"mlflow_run({self.run_id!r})"
