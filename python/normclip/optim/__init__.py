"""Optimizers whose steps clip: the gradients are read for their norm and for the update, and never written."""

from normclip._arguments import import_torch

import_torch()

from normclip.optim.sgd import ClippedSGD  # noqa: E402 (only now: all of it needs torch)

__all__ = ["ClippedSGD"]
