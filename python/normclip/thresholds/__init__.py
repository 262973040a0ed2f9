r"""Thresholds that follow training: limits that depend on the norms of earlier steps, or on the weights.

:class:`AutoClip`, :class:`ZClip` and :class:`AdaGN` are rules of the norm of all gradients. Every function that takes one of
:mod:`normclip.rules` takes them, and :class:`normclip.rules.Least` combines several, or one and a fixed limit. Each call with such a
rule records its norm as that of a training step, so use one rule object for one series of norms. :class:`AdaGC`, :class:`AGC` and
:class:`AdaClip` are no rules: they clip each tensor, each unit of a layer, or elements, by a ``clip_`` method of their own.

All have ``state_dict()`` and ``load_state_dict()``, of plain numbers, lists and dicts, and continue with the same bits after a restart. A
norm of NaN makes the gradients NaN and an infinite norm makes finite elements 0, as in all of normclip, unless there is no limit yet;
neither norm is recorded.

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
from normclip.thresholds.policy import Adaptive, Policy, Threshold
from normclip.thresholds.stablespam import AdaClip, AdaGN
from normclip.thresholds.zclip import ZClip

__all__ = ["AGC", "AdaClip", "AdaGC", "AdaGN", "Adaptive", "AutoClip", "Policy", "Threshold", "ZClip"]
