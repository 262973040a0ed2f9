"""`GradMonitor`: figures against the statistics they come from, what is read when, and the sinks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import normclip
from normclip.monitor import Figures, GradMonitor, json_lines, plot, tensorboard
from normclip.monitor import monitor as monitoring
from normclip.rules import Normalize, Soft
from normclip.thresholds import AutoClip


class Told(list[tuple[int, Figures]]):
    """A sink that keeps all it is told."""

    def __call__(self, step: int, figures: Figures) -> None:
        self.append((step, figures))

    @property
    def last(self) -> Figures:
        return self[-1][1]


def model_with(weight: list[float], bias: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = torch.nn.Linear(len(weight), 1, dtype=dtype)
    model.weight.grad = torch.tensor([weight], dtype=dtype)
    model.bias.grad = torch.tensor([bias], dtype=dtype)
    return model


def test_figures() -> None:
    told = Told()
    model = model_with([3.0, 0.0, -4.0], bias=12.0)
    clipped = GradMonitor(model, told).clip_(6.5)
    assert told.last == {
        "norm": 13.0,
        "norm/weight": 5.0,
        "norm/bias": 12.0,
        "sign_cosine": pytest.approx(19.0 / (math.sqrt(3.0) * 13.0)),
        "sign_cosine/weight": pytest.approx(7.0 / (math.sqrt(2.0) * 5.0)),
        "sign_cosine/bias": 1.0,
        "zeros": 1.0,
        "zeros/weight": 1.0,
        "zeros/bias": 0.0,
        "nonfinite": 0.0,
        "nonfinite/weight": 0.0,
        "nonfinite/bias": 0.0,
        "clip/norm": 13.0,
        "clip/coefficient": 0.5,
        "clip/threshold": 6.5,
        "clip/fraction": 1.0,
    }
    assert {type(value) for value in told.last.values()} == {float}
    assert clipped.coefficient == 0.5
    assert model.bias.grad.item() == 6.0


def test_layers_may_be_left_out() -> None:
    told = Told()
    GradMonitor(model_with([3.0, 4.0]), told, layers=False).observe()
    assert set(told.last) == {"norm", "sign_cosine", "zeros", "nonfinite"}


def test_nonfinite() -> None:
    told = Told()
    monitor = GradMonitor(model_with([math.nan, math.inf], bias=1.0), told)
    assert monitor.clip_(1.0, nonfinite="skip").skipped
    assert (told.last["nonfinite"], told.last["nonfinite/weight"], told.last["nonfinite/bias"]) == (2.0, 2.0, 0.0)
    assert math.isnan(told.last["norm"])
    assert told.last["clip/fraction"] == 0.0
    with pytest.raises(RuntimeError, match="not finite"):
        monitor.clip_(1.0, nonfinite="raise")
    assert (len(told), monitor.step) == (1, 1)
    monitor.clip_(1.0)
    assert told.last["clip/fraction"] == 0.5, "a coefficient of NaN counts"


def test_share_of_clipped_steps_is_of_the_last_hundred() -> None:
    told = Told()
    model = model_with([3.0, 4.0])
    monitor = GradMonitor(model, told)
    for limit in (1.0, 100.0, 100.0, 100.0):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        monitor.clip_(limit)
    assert [figures["clip/fraction"] for _, figures in told] == [1.0, 0.5, pytest.approx(1 / 3), 0.25]
    for _ in range(100):
        monitor.clip_(100.0)
    assert told.last["clip/fraction"] == 0.0


def test_limits_by_group() -> None:
    told = Told()
    model = model_with([3.0, 4.0], bias=2.0)
    GradMonitor(model, told).clip_(limits={"matrices": 1.0, "rest": Soft(2.0)}, groups={"matrices": ["weight"]})
    assert {name: value for name, value in told.last.items() if name.startswith("clip/")} == {
        "clip/norm": pytest.approx(math.sqrt(29.0)),
        "clip/coefficient/matrices": pytest.approx(0.2),
        "clip/threshold/matrices": 1.0,
        "clip/coefficient/rest": 0.5,
        "clip/threshold/rest": 2.0,
        "clip/fraction": 1.0,
    }


def test_groups_without_gradients() -> None:
    told = Told()
    model = model_with([3.0, 4.0])
    monitor = GradMonitor(model, told)
    limits, groups = {"matrices": 1.0, "biases": 2.0}, {"matrices": ["weight"], "biases": ["bias"]}
    for parameter in (model.bias, model.weight):
        parameter.grad = None
        monitor.clip_(limits=limits, groups=groups)
    assert [(figures["clip/coefficient/matrices"], figures["clip/coefficient/biases"]) for _, figures in told] == [(0.2, 1.0), (1.0, 1.0)]
    assert [(figures["clip/threshold/biases"], figures["clip/fraction"]) for _, figures in told] == [(2.0, 1.0), (2.0, 0.5)]


def test_rules_without_a_threshold() -> None:
    told = Told()
    GradMonitor(model_with([3.0, 4.0]), told).clip_(Normalize(10.0), norm_type=math.inf)
    assert (told.last["clip/norm"], told.last["clip/coefficient"], told.last["clip/fraction"]) == (4.0, 2.5, 0.0)
    assert "clip/threshold" not in told.last


def test_thresholds_that_follow_training_are_told_as_they_are_now() -> None:
    told, rule = Told(), AutoClip(percentile=50)
    for gradient in ([3.0, 4.0], [6.0, 8.0]):
        GradMonitor(model_with(gradient), told).clip_(rule)
    assert [figures["clip/threshold"] for _, figures in told] == [5.0, 7.5]


def test_every() -> None:
    told = Told()
    model = model_with([3.0, 4.0])
    monitor = GradMonitor(model, told, every=3)
    for _ in range(7):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert (monitor.clip_(1.0).stats.per_tensor is None) == (monitor.step % 3 != 1)
        assert model.weight.grad.norm().item() == pytest.approx(1.0), "clipped in any case"
    assert [step for step, _ in told] == [0, 3, 6]
    monitor.step = 30
    monitor.observe()
    assert told[-1][0] == 30
    with pytest.raises(ValueError, match="positive"):
        GradMonitor(model, told, every=0)


def test_sinks_change_nothing_but_who_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As other ranks take part in what is measured for one."""
    reads: list[Any] = []
    monkeypatch.setattr(monitoring, "grad_stats", lambda *given, **how: reads.append(how) or normclip.grad_stats(*given, **how))
    for sinks in ((), Told()):
        monitor = GradMonitor(model_with([3.0, 4.0]), sinks, every=2)
        monitor.observe()
        monitor.observe()
        monitor.clip_grad_norm_(monitor.model.parameters(), 1.0)
        assert monitor.clip_(1.0).stats.per_tensor is None
        assert monitor.clip_(1.0).stats.per_tensor is not None
        assert monitor.step == 5
    assert len(reads) == 4
    assert reads[:2] == reads[2:]


def test_statistics_that_are_known() -> None:
    told = Told()
    model = model_with([3.0, 4.0], bias=1.0)
    monitor = GradMonitor(model, [told])
    monitor.observe(normclip.grad_stats(model, per_tensor=True))
    monitor.observe()
    assert told[0][1] == told[1][1]


def test_named_parameters() -> None:
    told = Told()
    model = model_with([3.0, 4.0])
    monitor = GradMonitor(((f"head.{name}", parameter) for name, parameter in model.named_parameters()), told)
    monitor.observe()
    monitor.observe()
    assert told.last["norm/head.weight"] == 5.0


@pytest.mark.parametrize("order", [1, 2.0, 3.0, "inf"])
@pytest.mark.parametrize("limit", [0.5, 100.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_torchs_function(dtype: torch.dtype, limit: float, order: Any) -> None:
    """The bits of `clip_grad_norm_`, and figures of what it was given."""
    told = Told()
    ours, others = (model_with([3.0, 0.1], bias=-1.0, dtype=dtype) for _ in range(2))
    monitor = GradMonitor(ours, told)
    norm, expected = monitor.clip_grad_norm_(ours.parameters(), limit, order), normclip.clip_grad_norm_(others.parameters(), limit, order)
    torch.testing.assert_close(norm, expected, rtol=0.0, atol=0.0)
    for our, other in zip(ours.parameters(), others.parameters(), strict=True):
        assert torch.equal(our.grad, other.grad)
    assert told.last["norm"] == pytest.approx(math.sqrt(10.01))
    if limit == math.inf:
        assert "clip/norm" not in told.last
    else:
        assert told.last["clip/norm"] == pytest.approx(norm.item())
        assert told.last["clip/coefficient"] == pytest.approx(min(1.0, limit / (norm.item() + 1e-6)))


def test_as_torchs_function_errors_change_nothing() -> None:
    told = Told()
    model = model_with([math.nan, 4.0], bias=2.0)
    monitor = GradMonitor(model, told)
    with pytest.raises(RuntimeError, match=r"parameters\[0\].grad \(1 NaN, 0 inf\)"):
        monitor.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="not negative"):
        monitor.clip_grad_norm_(model.parameters(), -1.0)
    assert (told, monitor.step, model.bias.grad.item()) == ([], 0, 2.0)


def test_no_gradients() -> None:
    told = Told()
    model = torch.nn.Linear(2, 1)
    monitor = GradMonitor(model, told)
    assert monitor.clip_grad_norm_(model.parameters(), 1.0).item() == 0.0
    assert (told.last["norm"], told.last["clip/coefficient"]) == (0.0, 1.0)


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with SummaryWriter(str(tmp_path)) as writer:
        monitor = GradMonitor(model_with([3.0, 4.0]), tensorboard(writer))
        for _ in range(3):
            monitor.clip_(1.0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("norm/weight")] == [(0, 5.0), (1, 1.0), (2, 1.0)]
    assert "clip/threshold" in events.Tags()["scalars"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "gradients.jsonl"
    model = model_with([3.0, 4.0])
    GradMonitor(model, json_lines(path)).clip_(1.0)
    model.weight.grad[0, 0] = math.nan
    resumed = GradMonitor(model, [json_lines(path)])
    resumed.step = 7
    resumed.observe()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines())
    assert (first["step"], first["norm/weight"], first["clip/threshold"]) == (0, 5.0, 1.0)
    assert (second["step"], second["norm"], second["nonfinite"]) == (7, None, 1.0)
    with pytest.raises(OSError, match="nowhere"):
        json_lines(tmp_path / "nowhere" / "gradients.jsonl")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "gradients.jsonl"
    model = model_with([3.0, 4.0])
    monitor = GradMonitor(model, json_lines(path))
    for step in range(5):
        model.weight.grad = torch.tensor([[math.nan if step == 2 else 3.0, 4.0]])
        monitor.clip_(1.0, nonfinite="skip")
    plot(path, tmp_path / f"gradients.{suffix}")
    assert (tmp_path / f"gradients.{suffix}").stat().st_size > 1000


def test_plot_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gradients.jsonl"
    json_lines(path)
    with pytest.raises(ValueError, match="no steps"):
        plot(path, tmp_path / "gradients.svg")
    json_lines(path)(0, {"norm": 0.0})
    plot(path, tmp_path / "gradients.svg")
