"""Optimizers that clip in their step. They read the gradients twice, for the norm and for the update, and never write them."""

from normclip.optim.sgd import ClippedSGD

__all__ = ["ClippedSGD"]
