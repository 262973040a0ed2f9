"""Optimizers that clip in their step. They read the gradients twice, for the norm and for the update, and never write them."""

from normclip._arguments import import_torch

import_torch()

from normclip.optim.adamw import ClippedAdamW  # noqa: E402 (only now: all of it needs torch)
from normclip.optim.limited import limited  # noqa: E402
from normclip.optim.sgd import ClippedSGD  # noqa: E402

__all__ = ["ClippedAdamW", "ClippedSGD", "limited"]
