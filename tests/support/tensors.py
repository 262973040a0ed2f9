"""Tensors of every library, element type, layout and magnitude, from a recipe that prints well."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

# Exponents of the smallest subnormal and of the largest numbers. complex128 stays where absolute values are neither subnormal nor infinite.
EXPONENTS = {
    "float16": (-24, 15),
    "bfloat16": (-133, 127),
    "float32": (-149, 127),
    "float64": (-1074, 1023),
    "complex64": (-149, 127),
    "complex128": (-1000, 1022),
}
DTYPES = tuple(EXPONENTS)
NUMPY_DTYPES = tuple(name for name in DTYPES if name != "bfloat16")
REAL_DTYPES = tuple(name for name in DTYPES if not name.startswith("complex"))

# Norms of torch tensors are rounded to float32 unless one of the tensors is double: this one adds nothing else.
NO_DOUBLES = torch.empty(0, dtype=torch.float64)

New = Callable[..., Any]
Placed = tuple[Any, Any]
"""All of the memory, and the tensor in it that holds the values. The rest of the memory is NaN, so whoever reads it is found out."""


def _contiguous(new: New, values: Any) -> Placed:
    return _fill(new(len(values)), lambda memory: memory, values)


def _every_third(new: New, values: Any) -> Placed:
    return _fill(new(3 * len(values) + 1), lambda memory: memory[1::3], values)


def _transposed(new: New, values: Any) -> Placed:
    rows = _rows(len(values))
    return _fill(new((len(values) // rows, rows)), lambda memory: memory.T, values)


def _interior(new: New, values: Any) -> Placed:
    rows = _rows(len(values))
    return _fill(new((rows + 2, len(values) // rows + 3)), lambda memory: memory[1:-1, 2:-1], values)


def _lattice(new: New, values: Any) -> Placed:
    rows = _rows(len(values))
    return _fill(new((2 * rows, 3, 2 * (len(values) // rows))), lambda memory: memory[::2, 1:2, ::2], values)


def _reversed(new: New, values: Any) -> Placed:
    return _fill(new((len(values), 2)), lambda memory: memory[::-1, 1], values)


def _expanded(new: New, values: Any) -> Placed:
    memory, view = _contiguous(new, values)
    return memory, (np.broadcast_to(view, (3, len(values))) if isinstance(view, np.ndarray) else view.expand(3, -1))


def _misaligned(new: New, values: Any) -> Placed:
    if len(values) == 0:
        return _contiguous(new, values)  # neither library makes an empty tensor from a buffer
    # Not by assignment to the view: torch crashes when it copies to misaligned complex128.
    memory = bytearray(b"\xff" + raw(values) + b"\xff")
    if isinstance(values, np.ndarray):
        return memory, np.frombuffer(memory, values.dtype, len(values), offset=1)
    return memory, torch.frombuffer(memory, dtype=values.dtype, count=len(values), offset=1)


def _fill(memory: Any, view: Callable[[Any], Any], values: Any) -> Placed:
    placed = view(memory)
    placed[...] = values.reshape(placed.shape)
    return memory, placed


def _rows(size: int) -> int:
    return next(rows for rows in (7, 5, 4, 3, 2, 1) if size % rows == 0)


WRITABLE_LAYOUTS: dict[str, Callable[[New, Any], Placed]] = {
    "contiguous": _contiguous,
    "every third": _every_third,
    "transposed": _transposed,
    "interior": _interior,
    "lattice": _lattice,
    "reversed": _reversed,
    "misaligned": _misaligned,
}
LAYOUTS = {**WRITABLE_LAYOUTS, "expanded": _expanded}


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor. Special values are given with their places, as fractions of the length."""

    dtype: str = "float32"
    size: int = 100
    layout: str = "contiguous"
    library: str = "numpy"
    exponents: tuple[int, int] = (-5, 5)
    zeros: float = 0.0
    specials: tuple[tuple[float, float], ...] = ()
    seed: int = 0

    @lru_cache(maxsize=2)  # noqa: B019 (recipes are small; making the same tensor again is what is slow)
    def values(self) -> Any:
        """The elements in one dimension, to be copied from."""
        rng = np.random.default_rng(self.seed)
        values = self._reals(rng)
        if self.dtype.startswith("complex"):
            values = values + 1j * self._reals(rng)
        values[rng.random(self.size) < self.zeros] = 0.0
        for value, place in self.specials if self.size else ():
            values[int(place * (self.size - 1))] = value
        if self.library == "torch":
            return torch.from_numpy(values).to(getattr(torch, self.dtype))
        return values.astype(self.dtype)

    def _reals(self, rng: np.random.Generator) -> np.ndarray:
        low, high = self.exponents
        sizes = np.ldexp(rng.uniform(1.0, 2.0, self.size), rng.integers(low, high, self.size, endpoint=True))
        largest = torch.finfo(getattr(torch, self.dtype)).max
        return np.minimum(sizes, largest) * rng.choice([-1.0, 1.0], self.size)

    def place(self) -> Placed:
        """The memory around the tensor, and the tensor."""
        values = self.values()
        if self.library == "torch":
            return LAYOUTS[self.layout](lambda shape: torch.full(np.atleast_1d(shape).tolist(), torch.nan, dtype=values.dtype), values)
        return LAYOUTS[self.layout](lambda shape: np.full(shape, np.nan, values.dtype), values)

    def make(self) -> Any:
        """The tensor."""
        return self.place()[1]


@st.composite
def recipes(
    draw: st.DrawFn, *, dtypes: tuple[str, ...] = DTYPES, layouts: tuple[str, ...] = tuple(LAYOUTS), finite: bool = False
) -> Recipe:
    """Recipes for tensors of up to 100 000 elements, mostly short, over all magnitudes of their types."""
    dtype = draw(st.sampled_from(dtypes))
    library = "torch" if dtype == "bfloat16" else draw(st.sampled_from(["numpy", "torch"]))
    # torch has no negative strides.
    layout = draw(st.sampled_from([name for name in layouts if (library, name) != ("torch", "reversed")]))
    exponents = st.integers(*EXPONENTS[dtype])
    special = st.tuples(st.sampled_from([np.nan, np.inf, -np.inf]), st.floats(0.0, 1.0))
    return Recipe(
        dtype=dtype,
        size=draw(st.integers(0, 70) | st.integers(0, 3000) | st.sampled_from([65_535, 65_536, 65_537, 100_000])),
        layout=layout,
        library=library,
        exponents=tuple(sorted((draw(exponents), draw(exponents)))),  # type: ignore[arg-type]
        zeros=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        specials=() if finite else tuple(draw(st.just([]) | st.just([]) | st.lists(special, max_size=2))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def raw(tensor: Any) -> bytes:
    """The bytes of all elements in the order of their indices, or those of plain memory."""
    if isinstance(tensor, bytearray):
        return bytes(tensor)
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy())


def as_array(tensor: Any) -> np.ndarray:
    """The elements of any tensor as a NumPy array, in float32 for the bfloat16 that NumPy lacks. Of sparse ones, the coalesced values."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    return (tensor.to(torch.float32) if tensor.dtype is torch.bfloat16 else tensor).numpy()
