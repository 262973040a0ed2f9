"""Decimal arithmetic of 50 digits and any exponent, so that intermediate results of a formula lose no digits and never overflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

_CONTEXT = Context(prec=50, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])


@contextmanager
def wide(*numbers: float) -> Iterator[tuple[Decimal, ...]]:
    """A context manager that yields floats as Decimals and sets the precision of computing with them.

    ``float`` rounds a result at the end, to ``inf`` if it is too large. A quotient by 0 is infinite.

    Args:
        *numbers: Finite floats, which are converted exactly.
    """
    with localcontext(_CONTEXT):
        yield tuple(map(Decimal, numbers))
