"""Measures local smoothness along the steps of training, and leaves the model as the step left it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from normclip._core import Moments

if TYPE_CHECKING:
    import torch

__all__ = ["SmoothnessProbe"]


class SmoothnessProbe:
    r"""Measures how fast the gradient changes along each step of training, as the slope of a secant.

    .. math:: \hat L = \max_t \frac{\|\nabla f(x + t d) - \nabla f(x)\|}{\|t d\|}, \qquad d = x_{k+1} - x_k

    All these gradients are computed on the batch of the step, with the random numbers (dropout), buffers and modes that it began with.
    Afterwards the model is exactly as the step left it: parameters, buffers, gradients, modes and torch's random state on the CPU and on
    CUDA, bit for bit. A measurement costs a forward and a backward pass for x and for each fraction, and the memory of six more gradients.

    Args:
        model: The model that is trained. Parameters that do not require a gradient are not part of x.
        fractions: The fractions t of the step, in (0, 1].

    Attributes:
        smoothness: L̂ of each step; NaN for a step of length 0, or if a gradient or the step was not finite.
        norms: The norm of the gradient at x of each step. ``fit_l0_l1(probe.smoothness, probe.norms)`` fits L0 and L1.

    Raises:
        ValueError: ``fractions`` is empty, or a fraction is out of its range.

    References:
        Zhang, He, Sra, Jadbabaie: Why gradient clipping accelerates training, 2020 (arXiv 1905.11881).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batch = torch.tensor([[3.0]])
        >>> probe = SmoothnessProbe(model)
        >>> with probe.step(lambda: model(batch).square().sum() / 2):
        ...     model(batch).square().sum().div(2).backward()
        ...     optimizer.step()
        >>> round(probe.smoothness[0], 4)  # the second derivative is 9
        9.0
    """

    def __init__(self, model: torch.nn.Module, fractions: Sequence[float] = (0.5, 1.0)) -> None:
        self.model: torch.nn.Module = model
        self.fractions: tuple[float, ...] = tuple(map(float, fractions))
        if not self.fractions or not all(0.0 < fraction <= 1.0 for fraction in self.fractions):
            raise ValueError(f"fractions is {fractions}: pass numbers above 0, and at most 1")
        self.smoothness: list[float] = []
        self.norms: list[float] = []

    @contextmanager
    def step(self, loss: Callable[[], torch.Tensor]) -> Iterator[None]:
        """A context manager for one training step: forward, backward, clipping and ``optimizer.step()``, each any number of times.

        If the block raises, nothing is measured.

        Args:
            loss: A function that computes the loss of the step's batch, without calling ``backward()`` or ``zero_grad()``. It is called
                several times when the block ends.

        Raises:
            ValueError: No parameter of the model requires a gradient.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("no parameter of the model needs a gradient: there is nothing that a step could change")
        before, start = _State(self.model), [parameter.detach().clone() for parameter in parameters]
        yield
        after, end = _State(self.model), [parameter.detach().clone() for parameter in parameters]

        def gradient_at(point: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            before.restore()
            _assign(parameters, point)
            return _gradient(loss, parameters)

        try:
            gradient = gradient_at(start)
            # One tensor at a time, as a list would count a tensor once that is the gradient of two parameters.
            norm, smoothness = sum(map(Moments.of, gradient), Moments()).l2, []
            for fraction in self.fractions:
                point = end if fraction == 1.0 else [x + fraction * (y - x) for x, y in zip(start, end, strict=True)]
                distance = _distance(point, start)  # measured, as the rounded points are not exactly this fraction of the step apart
                smoothness.append(_distance(gradient_at(point), gradient) / distance if distance > 0.0 else math.nan)
        finally:
            after.restore()
            _assign(parameters, end)
        self.smoothness.append(max(smoothness) if all(map(math.isfinite, smoothness)) else math.nan)
        self.norms.append(norm)


class _State:
    """All state besides parameters that a forward pass reads or changes: buffers, modes and random state."""

    def __init__(self, model: torch.nn.Module) -> None:
        import torch

        self.modes = [(module, module.training) for module in model.modules()]
        # With the modules that hold the buffers, as a forward pass may replace a buffer by another tensor.
        self.buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self.random = torch.get_rng_state()
        self.random_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        import torch

        for module, mode in self.modes:
            module.training = mode
        for module, _ in self.modes:
            module._buffers.clear()  # buffers that were added since
        for module, name, buffer, value in self.buffers:
            module._buffers[name] = buffer
            if buffer is not None and value is not None:
                _assign([buffer], [value])
        torch.set_rng_state(self.random)
        if self.random_cuda is not None:
            torch.cuda.set_rng_state_all(self.random_cuda)


def _assign(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    import torch

    # Through .data, without raising version counters, as the last of these assignments restores the values that autograd knows.
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
    torch.clear_autocast_cache()  # which holds 16-bit copies of the old values


def _gradient(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of the loss, without writing the parameters' ``grad``."""
    import torch

    with torch.enable_grad():
        return list(torch.autograd.grad(loss(), list(parameters), materialize_grads=True))


def _distance(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> float:
    import torch

    def wide(tensor: torch.Tensor) -> Any:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    return Moments.of([wide(x) - wide(y) for x, y in zip(xs, ys, strict=True)]).l2
