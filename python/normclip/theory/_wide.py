"""Arithmetic on floats in which nothing overflows, underflows or cancels before the result is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

_CONTEXT = Context(prec=50, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])


@contextmanager
def wide(*numbers: float) -> Iterator[tuple[Decimal, ...]]:
    """Numbers of 50 digits and any exponent, to compute with meanwhile. ``float`` rounds a result: what is too large for one is ``inf``.

    Args:
        *numbers: Finite floats, taken as they are. A quotient by 0 is infinite.
    """
    with localcontext(_CONTEXT):
        yield tuple(map(Decimal, numbers))
