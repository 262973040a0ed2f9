"""A wrong answer stops the benchmark before anything is timed."""

import dataclasses
import json
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import normclip
from normclip.bench.gradients import Gradients
from normclip.bench.measure import Row, WrongAnswerError, measure
from normclip.bench.timing import Budget
from normclip.bench.workloads import BELOW, L2, SCALING, Operation

BUDGET = Budget(seconds=0.0, min_rounds=1)


def gradients() -> Gradients:
    """A few values with a norm of their own."""
    return Gradients([torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])])


@pytest.mark.parametrize("operation", [BELOW, SCALING, L2])
def test_gradients_end_as_they_began(operation: Operation) -> None:
    ours = gradients()
    row = measure("three values", ours, operation, BUDGET)
    assert all(map(torch.equal, ours.tensors, ours.pristine))
    assert (row.tensors, row.elements, row.dtype) == (2, 3, "float32")
    assert row.bytes == (36 if operation.scales else 12)
    assert row.torch_error == row.normclip_error == row.float64_error == 0.0


def test_wrong_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_ppm_off(tensors: Iterable[Tensor], norm_type: float) -> Tensor:
        return torch.tensor(13.0 * (1 + 2e-6))

    monkeypatch.setattr(normclip, "get_total_norm", two_ppm_off)
    with pytest.raises(WrongAnswerError, match="three values, L2 norm: normclip's norm is off by 2"):
        measure("three values", gradients(), L2, BUDGET)


@pytest.mark.parametrize("operation", [BELOW, SCALING])
def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch, operation: Operation) -> None:
    def scales_wrongly(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(0.501)
        return torch.tensor(13.0)

    monkeypatch.setattr(normclip, "clip_grad_norm_", scales_wrongly)
    with pytest.raises(WrongAnswerError, match="wrong values"):
        measure("three values", gradients(), operation, BUDGET)


def test_calls_in_training_follow_torch_and_others_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", _logged(log, "torch", torch.nn.utils.clip_grad_norm_))
    monkeypatch.setattr(normclip, "clip_grad_norm_", _logged(log, "normclip", normclip.clip_grad_norm_))
    ours = Gradients([torch.tensor([3.0, 4.0])], work=lambda: log.append("work"))
    row = measure("two values", ours, SCALING, Budget(seconds=0.0, min_rounds=2, sample_ns=1))
    assert log[:2] == ["torch", "normclip"]  # the check of the results
    training = ["work", "torch", "work", "normclip", "work", "normclip", "work", "torch"]
    alternation = ["torch", "normclip", "normclip", "torch"]
    assert log[2:] == training * 2 + alternation * 2  # two rounds to warm up, two that count
    assert (row.in_training.rounds, row.back_to_back.rounds) == (2, 2)
    assert Row.from_dict(json.loads(json.dumps(dataclasses.asdict(row)))) == row


def _logged(log: list[str], name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def logged(*arguments: object) -> Tensor:
        log.append(name)
        return call(*arguments)

    return logged
