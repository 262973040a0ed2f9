"""Prints a digest of many results, as JSON. A script: which instruction set is used is decided once per process."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import normclip
from normclip.optim import ClippedAdamW, ClippedSGD
from support.tensors import DTYPES, EXPONENTS, LAYOUTS, NO_DOUBLES, REAL_DTYPES, WRITABLE_LAYOUTS, Recipe, raw

SIZES = (0, 1, 15, 31, 32, 33, 100, 1023, 1025, 65_535, 65_537, 140_000)
# Other orders may differ by rounding.
ORDERS = (0.0, 1.0, 2.0, 3.0, math.inf, -math.inf)


def recipes() -> Iterator[Recipe]:
    """Tensors of all kinds, over all magnitudes of each element type and over ordinary ones."""
    for dtype in DTYPES:
        for seed, size in enumerate(SIZES):
            for exponents in (EXPONENTS[dtype], (-8, 8)):
                yield Recipe(dtype, size, library="torch", exponents=exponents, zeros=0.01, seed=seed)
        for layout in LAYOUTS:
            library = "numpy" if layout == "reversed" else "torch"
            if (dtype, library) != ("bfloat16", "numpy"):
                yield Recipe(dtype, 70_000, layout, library)
        for special in (math.nan, math.inf):
            yield Recipe(dtype, 70_000, library="torch", specials=((special, 0.7),))


def changes(recipe: Recipe) -> Iterator[Callable[[Any], None]]:
    """What is done to a tensor in place."""
    if recipe.layout in WRITABLE_LAYOUTS:
        for factor in (0.3, 1e-42, 1e39):
            yield partial(normclip.scale_, factor=factor)
        # By NaN where one of the elements is.
        yield partial(normclip.clip_, rule=0.3)
        if recipe.dtype in REAL_DTYPES:
            yield partial(normclip.clamp_, limit=0.3)


def patterns() -> Iterator[tuple[str, torch.Tensor]]:
    """All 65 536 bit patterns of the half types, and as many of the others, NaN of all signs, payloads and kinds among them."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in ("float16", "bfloat16"):
        yield dtype, halves.view(getattr(torch, dtype))
    yield "float32", ((halves.to(torch.int32) << 16) + 1).view(torch.float32)
    yield "float64", ((halves.to(torch.int64) << 48) + 1).view(torch.float64)


def changed(tensor: Any, change: Callable[[Any], None]) -> str:
    """A digest of a tensor after a change."""
    change(tensor)
    return hashlib.sha256(raw(tensor)).hexdigest()


def stepped(dtype: str) -> list[str]:
    """Digests of parameters and states after steps with all that a step can have."""
    parameters = [torch.nn.Parameter(Recipe(dtype, size, library="torch", exponents=(-8, 8), seed=size).make()) for size in SIZES]
    optimizer = ClippedSGD(parameters, 0.1, 1.0, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step in range(3):
        for parameter, size in zip(parameters, SIZES, strict=True):
            parameter.grad = Recipe(dtype, size, library="torch", exponents=(-8, 8), seed=step).make()
        optimizer.step()
    adamw = ClippedAdamW(parameters, 0.1, rule=1.0, amsgrad=True, descent_limit=1.0, update_rms_limit=0.5)
    for _ in range(2):
        adamw.step()
    tensors = [tensor for parameter in parameters for each in (optimizer, adamw) for tensor in each.state[parameter].values()]
    tensors += parameters
    return [hashlib.sha256(raw(tensor)).hexdigest() for tensor in tensors]


def main() -> None:
    """All results by what they are results of, so that a difference has a name."""
    results = {}
    for recipe in recipes():
        tensors = [recipe.make(), NO_DOUBLES]
        norms = [normclip.total_norm(tensors, order).item().hex() for order in ORDERS]
        results[str(recipe)] = norms + [changed(recipe.make(), change) for change in changes(recipe)]
    for dtype, tensor in patterns():
        results[f"patterns of {dtype}"] = [changed(tensor.clone(), change) for change in changes(Recipe())] + [
            hashlib.sha256(normclip.Moments.of(tensor).to_array()).hexdigest(),
            hashlib.sha256(struct.pack("4d", *normclip.dot_stats(tensor, tensor.flip(0)))).hexdigest(),
        ]
    results |= {f"steps of {dtype}": stepped(dtype) for dtype in REAL_DTYPES}
    print(json.dumps({"isa": normclip._core.isa(), "results": results}))  # noqa: T201


if __name__ == "__main__":
    main()
