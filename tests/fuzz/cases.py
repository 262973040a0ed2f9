"""From a number to a case, in this process."""

from __future__ import annotations

import traceback
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

import normclip
from fuzz.draw import Draw
from fuzz.registry import Check, Mismatch, load

_checks = list(load().values())
_bounds = list(accumulate(check.weight for check in _checks))


@dataclass(frozen=True)
class Failure:
    """A case in which normclip was wrong, hung or crashed."""

    number: int
    check: str
    message: str


def draw_of(seed: int, number: int) -> tuple[Check, Draw]:
    """The check of a case, and the choices that it is to make."""
    draw = Draw(seed, number)
    return _checks[bisect(_bounds, draw.random() * _bounds[-1])], draw


def run_case(check: Check, draw: Draw, number: int) -> Failure | None:
    """Run a case."""
    normclip.set_num_threads(draw.threads)
    try:
        with np.errstate(all="ignore"):  # oracles compute with infinities too
            check.run(draw)
    except (KeyboardInterrupt, SystemExit):
        raise
    except Mismatch as mismatch:
        return Failure(number, check.name, f"[{draw.mode}] {mismatch}")
    except BaseException as error:  # with panics of Rust, which are no Exception
        where = "".join(traceback.format_exception(error)[-3:])
        return Failure(number, check.name, f"[{draw.mode}] unexpected {type(error).__name__}: {where}")
    return None
