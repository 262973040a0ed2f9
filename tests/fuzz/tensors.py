"""Random tensors: every library, element type, layout and magnitude."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fuzz.draw import Draw
from support.tensors import DTYPES, EXPONENTS, REAL_DTYPES, as_array, raw

SPECIALS = (np.nan, np.inf, -np.inf, 0.0, -0.0)


@dataclass
class Lot:
    """A tensor, and the memory that it is in. The rest of the memory is NaN, so whoever reads it is found out."""

    memory: Any
    tensor: Any
    dtype: str

    def __post_init__(self) -> None:
        self.before = raw(self.memory)
        self._elements = self.tensor.copy() if isinstance(self.tensor, np.ndarray) else self.tensor.clone()

    @property
    def untouched(self) -> bool:
        return raw(self.memory) == self.before

    def restore(self) -> None:
        """Put the old elements back, and nothing else."""
        self.tensor[...] = self._elements

    def array(self) -> np.ndarray:
        """The elements as they are now, in the order of their indices."""
        return as_array(self.tensor)


def elements(draw: Draw, dtype: str, size: int, *, finite: bool = False, moderate: bool = False) -> np.ndarray:
    """Values of an element type in one dimension; of bfloat16 as float32."""
    values = _reals(draw, dtype, size, moderate)
    if dtype.startswith("complex"):
        values = values + 1j * _reals(draw, dtype, size, moderate)
    if size and draw.chance(0.2):
        values[draw.rng.random(size) < draw.pick([0.1, 0.5, 1.0])] = draw.pick([0.0, -0.0])
    with np.errstate(all="ignore"):
        if size and not finite and draw.chance(0.12):
            for _ in range(draw.integer(1, 3)):
                values[draw.integer(0, size - 1)] = draw.pick(SPECIALS)
        if dtype == "bfloat16":
            return torch.from_numpy(values).to(torch.bfloat16).float().numpy()
        return values.astype(dtype)


def _reals(draw: Draw, dtype: str, size: int, moderate: bool) -> np.ndarray:
    low, high = EXPONENTS[dtype]
    if moderate:
        low, high = max(low, -20), min(high, 12)
    kind = draw.random()
    if kind < 0.3:
        return draw.rng.standard_normal(size)
    if kind < 0.75:  # a band of magnitudes
        low, high = sorted((draw.integer(low, high), draw.integer(low, high)))
    elif kind < 0.9:  # at one end of the range: subnormal numbers, or what overflows when it is squared
        low, high = (low, low + 12) if draw.chance(0.5) else (high - 2, high)
    signs = draw.rng.choice([-1.0, 1.0], size)
    if draw.chance(0.15):
        return np.full(size, min(np.ldexp(draw.uniform(1.0, 2.0), draw.integer(low, high)), _largest(dtype))) * signs
    sizes = np.ldexp(draw.rng.uniform(1.0, 2.0, size), draw.rng.integers(low, high, size, endpoint=True))
    return np.minimum(sizes, _largest(dtype)) * signs


def _largest(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).max) / (2.0 if dtype == "complex128" else 1.0)


def shape_of(draw: Draw, size: int) -> tuple[int, ...]:
    """Up to three dimensions that hold as many elements."""
    if size and draw.chance(0.5):
        return (size,)
    rows = next(rows for rows in [*draw.shuffled([1, 2, 3, 4, 5, 7]), 1] if size % rows == 0)
    return draw.pick([(rows, size // rows), (size // rows, 1, rows), (1, rows, size // rows), *([()] if size == 1 else [])])


def place(draw: Draw, values: np.ndarray, dtype: str, shape: tuple[int, ...], library: str) -> Lot:
    """Values in memory of some layout: any order of dimensions, gaps, and in NumPy negative strides and odd addresses."""

    def new(shape: tuple[int, ...]) -> Any:
        if library == "torch":
            return torch.full(shape, torch.nan, dtype=getattr(torch, dtype))
        return np.full(shape, np.nan, dtype)

    values = values.reshape(shape)
    if draw.chance(0.5):
        memory = view = new(shape)
    else:
        order = draw.shuffled(range(len(shape)))
        cuts = []
        for dimension in order:
            step = draw.pick([1, 1, 2, 3])
            start = draw.integer(0, 2)
            cuts.append((start, step, shape[dimension]))
        memory = new(tuple(start + step * length + 1 for start, step, length in cuts))
        view = memory[tuple(slice(start, start + step * length, step) for start, step, length in cuts)]
        if library == "numpy" and draw.chance(0.3):
            view = view[tuple(slice(None, None, draw.pick([1, -1])) for _ in cuts)]
        back = [order.index(dimension) for dimension in range(len(shape))]
        view = view.transpose(back) if library == "numpy" else view.permute(back)
        if library == "numpy" and view.ndim == 0:
            view = memory.reshape(())
    view[...] = torch.from_numpy(values).to(view.dtype) if library == "torch" else values
    if library == "numpy" and view is memory and values.size and draw.chance(0.05):
        memory = bytearray(b"\xff" + view.tobytes() + b"\xff")
        view = np.ndarray(shape, dtype, buffer=memory, offset=1)
    return Lot(memory, view, dtype)


def lot(draw: Draw, dtype: str, library: str, *, size: int | None = None, finite: bool = False, moderate: bool = False) -> Lot:
    """A random tensor."""
    size = draw.size() if size is None else size
    shape = shape_of(draw, size)
    return place(draw, elements(draw, dtype, size, finite=finite, moderate=moderate), dtype, shape, library)


def lots(draw: Draw, *, real: bool = False, library: str | None = None, finite: bool = False) -> list[Lot]:
    """A list of random tensors: of one library or mixed, of one element type or mixed."""
    dtypes = REAL_DTYPES if real else DTYPES
    dtype, mixed = draw.pick(dtypes), draw.chance(0.3)
    library = library or draw.pick(["numpy", "torch", "mixed"])
    made = []
    for _ in range(draw.pick([0, 1, 1, 1, 2, 2, 3, 5])):
        kind = draw.pick(dtypes) if mixed else dtype
        where = draw.pick(["numpy", "torch"]) if library == "mixed" else library
        made.append(lot(draw, kind, "torch" if kind == "bfloat16" else where, finite=finite))
    return made


def given(draw: Draw, made: list[Lot]) -> list[Any]:
    """The tensors as a user may pass them: some of them twice, which must change nothing."""
    tensors = [each.tensor for each in made]
    if tensors and draw.chance(0.1):
        tensors = draw.shuffled(tensors + [draw.pick(tensors) for _ in range(draw.integer(1, 3))])
    return tensors


def parameters(draw: Draw, made: list[Lot]) -> list[Any]:
    """Parameters whose gradients these tensors are; some more have none."""
    items = []
    for each in made:
        parameter = torch.nn.Parameter(torch.empty_like(each.tensor))
        parameter.grad = each.tensor
        items.append(parameter)
        if draw.chance(0.2):
            items.append(torch.nn.Parameter(torch.empty(2)))
    return items


def spread(draw: Draw, tensor: Any) -> Any:
    """The tensor, perhaps expanded with strides of 0: only to be read."""
    if not draw.chance(0.05):
        return tensor
    copies = draw.integer(1, 3)
    return np.broadcast_to(tensor, (copies, *tensor.shape)) if isinstance(tensor, np.ndarray) else tensor.expand(copies, *tensor.shape)
