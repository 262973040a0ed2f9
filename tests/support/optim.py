"""Models without a model: parameters with random gradients, for tests of optimizers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normclip
from normclip.rules import Rule
from support.tensors import raw

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], 1).flatten()[::2].view_as(x) if x.dim() == 1 else x.repeat_interleave(2, 1)[:, ::2],
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_momentum = pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)], ids=["plain", "momentum", "nesterov"]
)
by_decay = pytest.mark.parametrize("weight_decay", [0.0, 0.1])


def parameters_of(
    dtype: torch.dtype, layout: str = "contiguous", seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((5, 9), (40, 33))
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(LAYOUTS[layout](torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))) for size in sizes]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Those of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def bits(optimizer: torch.optim.Optimizer) -> list[bytes]:
    """All parameters and states."""
    states = [state for parameter in parameters(optimizer) for state in optimizer.state.get(parameter, {}).values()]
    return [raw(tensor) for tensor in (*parameters(optimizer), *states) if tensor is not None]


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(parameters(optimizer), step)
        optimizer.step()


def clip_and_run(optimizer: torch.optim.Optimizer, steps: range, rule: Rule | float = 1.0) -> None:
    """The same of an optimizer that does not clip."""
    for step in steps:
        set_gradients(parameters(optimizer), step)
        normclip.clip_grad_norm_(parameters(optimizer), rule=rule)
        optimizer.step()
