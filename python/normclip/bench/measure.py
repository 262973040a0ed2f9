"""Measures one row of the report: checks the results of torch and normclip first, and only then times them."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import normclip
from normclip import _core
from normclip.bench.exact import relative_error
from normclip.bench.gradients import Gradients
from normclip.bench.timing import Budget, Call, alternate, median_ratio
from normclip.bench.workloads import Operation

__all__ = ["Row", "Speed", "WrongAnswerError", "measure"]

_TOLERANCE = 1e-6  # relative error of a norm; rounding to float32 alone gives up to 6e-8


class WrongAnswerError(RuntimeError):
    """normclip returned a wrong norm or wrote wrong values."""


@dataclass(frozen=True)
class Speed:
    """The times of one call in one state of the machine."""

    torch_ms: float
    normclip_ms: float
    ratio: float
    """torch's time over normclip's: the median over rounds of the ratio within a round."""
    gb_per_s: float
    """The bytes that a call moves over normclip's median time."""
    read_gb_per_s: float | None
    """The bandwidth of a plain read of the same tensors in the same rounds; None if the call writes."""
    read_share: float | None
    """normclip's bandwidth as a share of that of the plain read."""
    rounds: int


@dataclass(frozen=True)
class Row:
    """The measurements of one operation on one workload, for torch and normclip."""

    workload: str
    tensors: int
    elements: int
    dtype: str
    operation: str
    in_training: Speed
    """Each call directly follows an operation of torch on all threads, as clipping follows a backward pass."""
    back_to_back: Speed
    """Calls of torch, normclip and the plain read follow each other in turn, without pauses."""
    torch_error: float
    """Relative error of the norm that torch returned."""
    normclip_error: float
    """Relative error of the norm that normclip returned, as a 0-dim tensor of float32 or float64."""
    float64_error: float | None
    """Relative error of normclip's norm before rounding to that tensor; None for dtypes that NumPy lacks."""
    bytes: int
    """The bytes that a call moves: one read, two reads and a write if it scales, or the passes of an optimizer step."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Row":
        """The row that :func:`dataclasses.asdict` made these fields of, as they stand in a report's JSON."""
        speeds = {state: Speed(**fields[state]) for state in ("in_training", "back_to_back")}
        return cls(**{**fields, **speeds})


def measure(workload: str, gradients: Gradients, operation: Operation, budget: Budget) -> Row:
    """Check the results of torch and normclip, then time both, in both states.

    Raises:
        WrongAnswerError: normclip's result is wrong. Errors of torch are reported in the row.
    """
    contenders = _contenders(gradients, operation)
    torch_error = _norm_error(contenders["torch"], gradients, operation)
    normclip_error = _norm_error(contenders["normclip"], gradients, operation)
    if not normclip_error <= _TOLERANCE:
        raise WrongAnswerError(f"{workload}, {operation.label}: normclip's norm is off by {normclip_error:.1e}")
    if not gradients.are_pristine_times(_coefficient(gradients, operation)):
        raise WrongAnswerError(f"{workload}, {operation.label}: normclip left wrong values in the gradients")
    gradients.restore()
    if operation.contest is not None and operation.contest.error is not None and not operation.contest.error(gradients) <= 1.0:
        raise WrongAnswerError(f"{workload}, {operation.label}: normclip left wrong values in the parameters")
    float64_error = _float64_error(gradients, operation.order)

    max_calls = budget.max_calls
    if operation.scales:
        max_calls = min(max_calls, max(1, gradients.halvings // len(contenders)))
    elif operation.passes is None:
        lists = (gradients.tensors, gradients.pristine)[: operation.reads]
        yardstick = _core.TensorList([tensor for tensors in lists for tensor in tensors])
        contenders["read"] = lambda _: yardstick.read()
    moved = gradients.nbytes * (operation.passes or (3 if operation.scales else operation.reads))

    def speed(before: Callable[[], object], calls: int) -> Speed:
        limited = dataclasses.replace(budget, max_calls=calls)
        times = alternate(contenders, partial(_arguments, gradients, operation), before=before, budget=limited)
        gradients.restore()
        return _speed(times, moved)

    return Row(
        workload=workload,
        tensors=len(gradients.tensors),
        elements=gradients.elements,
        dtype=str(gradients.tensors[0].dtype).removeprefix("torch."),
        operation=operation.label,
        in_training=speed(gradients.work, 1),  # a second call would follow the first, and not torch's work
        back_to_back=speed(lambda: None, max_calls),
        torch_error=torch_error,
        normclip_error=normclip_error,
        float64_error=float64_error,
        bytes=moved,
    )


def _speed(times: Mapping[str, list[float]], moved: int) -> Speed:
    """The speeds by the nanoseconds of each contender in each round, if a call moves so many bytes."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return Speed(
        torch_ms=medians["torch"] / 1e6,
        normclip_ms=medians["normclip"] / 1e6,
        ratio=median_ratio(times["torch"], times["normclip"]),
        gb_per_s=moved / medians["normclip"],
        read_gb_per_s=moved / medians["read"] if "read" in times else None,
        read_share=median_ratio(times["read"], times["normclip"]) if "read" in times else None,
        rounds=len(times["normclip"]),
    )


def _contenders(gradients: Gradients, operation: Operation) -> dict[str, Call]:
    if operation.contest is not None:
        ours, theirs = operation.contest.normclip, operation.contest.torch
        return {"torch": lambda _: theirs(gradients), "normclip": lambda _: ours(gradients)}
    if operation.limit is None:
        return {
            "torch": partial(torch.nn.utils.get_total_norm, gradients.tensors),
            "normclip": partial(normclip.get_total_norm, gradients.tensors),
        }
    return {
        "torch": partial(torch.nn.utils.clip_grad_norm_, gradients.parameters),
        "normclip": partial(normclip.clip_grad_norm_, gradients.parameters),
    }


def _arguments(gradients: Gradients, operation: Operation, count: int) -> list[float]:
    if operation.limit is None:
        return [operation.order] * count
    if operation.scales:
        return gradients.halving_limits(count)
    return [operation.limit * gradients.exact_norm(operation.order)] * count


def _norm_error(call: Call, gradients: Gradients, operation: Operation) -> float:
    """The relative error of the norm that one call on the original gradients returns."""
    gradients.restore()
    norm = call(_arguments(gradients, operation, 1)[0])
    assert isinstance(norm, (float, Tensor))
    return relative_error(float(norm), gradients.exact_norm(operation.order))


def _coefficient(gradients: Gradients, operation: Operation) -> float:
    """What a call on the original gradients has to multiply them by."""
    if operation.limit is None or not operation.scales:
        return 1.0
    norm = gradients.exact_norm(operation.order)
    return operation.limit * norm / (norm + 1e-6)


def _float64_error(gradients: Gradients, order: float) -> float | None:
    if gradients.tensors[0].dtype == torch.bfloat16:
        return None
    norm = normclip.total_norm([tensor.numpy() for tensor in gradients.tensors], order)
    return relative_error(float(norm), gradients.exact_norm(order))
