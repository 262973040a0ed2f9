"""Logs the gradients of a model while it trains: norms, signs, zeros, non-finite elements, and what clipping does to them.

:class:`GradMonitor` makes a dictionary of figures for every step, from the read that clips, and passes it to sinks: to files of JSON lines,
which :func:`plot` draws, TensorBoard, Weights & Biases, MLflow, or any function that can be called as ``sink(figures, step=step)``. The
callbacks of ``normclip.integrations`` pass figures to the loggers of Lightning's and Transformers' Trainers.

Figures, where a layer is the name of a parameter, or of a module for monitors with a ``depth``:

=================================  ======================================================================================================
``norm``, ``norm/<layer>``         L2 norm before clipping
``sign_cosine``, ``…/<layer>``     cosine between the gradient and its signs (see :class:`normclip.Stats`)
``zeros``, ``zeros/<layer>``       number of elements equal to 0
``nonfinite``, ``…/<layer>``       number of elements that are NaN or infinite
``clip/norm``                      the norm that was clipped, which may be of another order than 2
``clip/coefficient``, ``…/<g>``    what all gradients, or those of each group with a limit, were multiplied by
``clip/threshold``, ``…/<g>``      the limit in this step: of a number, a rule with a ``max_norm``, or a threshold that follows training
``clip/fraction``                  share of the last 100 logged steps in which a coefficient was below 1 or NaN
=================================  ======================================================================================================
"""

from normclip.monitor.monitor import GradMonitor
from normclip.monitor.plot import plot
from normclip.monitor.sinks import Figures, Sink, json_lines, tensorboard
from normclip.monitor.trackers import mlflow_run, wandb_run

__all__ = ["Figures", "GradMonitor", "Sink", "json_lines", "mlflow_run", "plot", "tensorboard", "wandb_run"]
