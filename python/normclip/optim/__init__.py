"""Optimizers whose steps clip: the gradients are read for their norm and for the update, and never written."""

from normclip.optim.sgd import ClippedSGD

__all__ = ["ClippedSGD"]
