"""Gradients while a model trains, step by step: their norms, signs, zeros and non-finite values, and what clipping does to them.

:class:`GradMonitor` makes of every step a dictionary of figures, from the read that clips, and passes it to sinks: any function of a step
and its figures, :func:`json_lines`, :func:`tensorboard`. :func:`plot` draws what was written.

Figures, where a layer is a parameter by its name:

=================================  =====================================================================================
``norm``, ``norm/<layer>``         L2 norm before clipping
``sign_cosine``, ``…/<layer>``     cosine between the gradient and its signs (see :class:`normclip.Stats`)
``zeros``, ``zeros/<layer>``       number of elements equal to 0
``nonfinite``, ``…/<layer>``       number of elements that are NaN or infinite
``clip/norm``                      the norm that was compared with the threshold, which may be of another order
``clip/coefficient``, ``…/<g>``    what the gradients were multiplied by, or those of each group with a limit
``clip/threshold``, ``…/<g>``      the limit, of rules that have a ``max_norm``; of those that follow training the present one
``clip/fraction``                  share of the last logged steps (100 of them) in which a coefficient was not 1 or more
=================================  =====================================================================================
"""

from normclip.monitor.monitor import GradMonitor
from normclip.monitor.plot import plot
from normclip.monitor.sinks import Figures, Sink, json_lines, tensorboard

__all__ = ["Figures", "GradMonitor", "Sink", "json_lines", "plot", "tensorboard"]
