r"""Thresholds that follow training: policies that remember earlier norms, and limits that are relative to weights.

:class:`AutoClip` and :class:`ZClip` are rules of the norm of all gradients. Every function that takes one of :mod:`normclip.rules` takes
them, with the norm that it has computed anyway. Each such call is a step of training to them, so use one object for one norm.
:class:`AdaGC` and :class:`AGC` clip each tensor, or each unit of a layer, by themselves, and have a ``clip_`` of their own.

All have ``state_dict()`` and ``load_state_dict()``, of plain numbers, lists and dicts, and go on bit for bit where they were saved. Where
there is a limit, a norm of NaN makes the gradients NaN and an infinite one makes finite elements 0, as in all of normclip; neither is
remembered.

    >>> import numpy as np
    >>> from normclip import clip_
    >>> rule = AutoClip(percentile=50)
    >>> gradients = [np.array([norm]) for norm in (1.0, 4.0, 2.0)]
    >>> [clip_(gradient, rule) for gradient in gradients]
    [1.0, 4.0, 2.0]
    >>> [float(gradient[0]) for gradient in gradients]  # the medians so far: 1, 2.5 and 2
    [1.0, 2.5, 2.0]
"""

from normclip.thresholds.adagc import AdaGC
from normclip.thresholds.agc import AGC
from normclip.thresholds.autoclip import AutoClip
from normclip.thresholds.policy import Policy, Threshold
from normclip.thresholds.zclip import ZClip

__all__ = ["AGC", "AdaGC", "AutoClip", "Policy", "Threshold", "ZClip"]
