"""`GradMonitor`: figures against the statistics they come from, what is read when, and who is told."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import normclip
from normclip._names import module_of
from normclip.monitor import Figures, GradMonitor, json_lines, tensorboard
from normclip.monitor import monitor as monitoring
from normclip.rules import Normalize, Soft
from normclip.thresholds import AutoClip
from support.training import model_with


class Told(list[tuple[int, Figures]]):
    """A sink that keeps all it is told."""

    def __call__(self, figures: Figures, step: int) -> None:
        self.append((step, figures))

    @property
    def last(self) -> Figures:
        return self[-1][1]


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
    for function in (monitoring.grad_stats, monitoring.measure):

        def recorded(*given: Any, function: Any = function, **how: Any) -> Any:
            reads.append(how)
            return function(*given, **how)

        monkeypatch.setattr(monitoring, function.__name__, recorded)
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


def blocks() -> torch.nn.Module:
    """With names like GPT-2's: two blocks, one of them without a gradient of a bias, and parameters beside them."""
    torch.manual_seed(3)
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.ones(1))
    model.transformer = torch.nn.Module()
    model.transformer.wte = torch.nn.Embedding(3, 2)
    model.transformer.h = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)) for _ in range(2))
    for name, parameter in model.named_parameters():
        if name != "transformer.h.1.0.bias":
            parameter.grad = torch.randn_like(parameter).mul_(torch.arange(parameter.numel()).view_as(parameter) % 3 < 2)
    return model


@pytest.mark.parametrize(
    ("depth", "modules"),
    [
        (1, ["scale", "transformer"]),
        (2, ["scale", "transformer.wte", "transformer.h.0", "transformer.h.1"]),
        (9, ["scale", "transformer.wte", "transformer.h.0.0", "transformer.h.0.1", "transformer.h.1.0", "transformer.h.1.1"]),
    ],
)
@pytest.mark.parametrize("way", ["clip_", "clip_ by groups", "clip_grad_norm_", "observe"])
def test_modules_to_a_depth(way: str, depth: int, modules: list[str]) -> None:
    model, told = blocks(), Told()
    named = dict(model.named_parameters())
    expected = {
        module: normclip.stats([p.grad for name, p in named.items() if p.grad is not None and f"{name}.".startswith(f"{module}.")])
        for module in modules
    }
    monitor = GradMonitor(model, told, depth=depth)
    if way == "clip_":
        clipped = monitor.clip_(1.0)
        assert list(clipped.stats.per_tensor.names) == modules
    elif way == "clip_ by groups":
        groups = {"weights": ["*weight"]}
        clipped, others = monitor.clip_(limits={"weights": 1.0}, groups=groups), blocks()
        alike = normclip.clip_grads_(others, limits={"weights": 1.0}, groups=groups)
        assert (dict(clipped.coefficients), dict(clipped.stats.groups)) == (dict(alike.coefficients), dict(alike.stats.groups))
    elif way == "clip_grad_norm_":
        monitor.clip_grad_norm_(model.parameters(), 1.0)
    else:
        monitor.observe()
    assert [name for name in told.last if name.startswith("norm/")] == [f"norm/{module}" for module in modules]
    for module, stats in expected.items():
        assert told.last[f"norm/{module}"] == stats.l2
        assert told.last[f"sign_cosine/{module}"] == stats.sign_cosine
        assert told.last[f"zeros/{module}"] == stats.zeros
        assert told.last[f"nonfinite/{module}"] == 0.0


def test_layers_of_the_largest_norms() -> None:
    told, model = Told(), blocks()
    monitor = GradMonitor(model, told, depth=2, top=2)
    monitor.observe()
    norms = {name: p.l2 for name, p in normclip.grad_stats(model, groups=lambda name: module_of(name, 2)).groups.items()}
    largest = sorted(norms, key=lambda name: -norms[name])[:2]
    assert {name for name in told.last if "/" in name} == {
        f"{f}/{m}" for f in ("norm", "sign_cosine", "zeros", "nonfinite") for m in largest
    }
    model.scale.grad[0], model.transformer.wte.weight.grad[0, 0] = math.nan, math.inf
    GradMonitor(model, told, top=1).observe()
    assert [name for name in told.last if name.startswith("norm/")] == ["norm/scale"]


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"top": 0}, {"depth": 1, "layers": False}, {"top": 1, "layers": False}], ids=str)
def test_depth_and_top_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is (0: pass 1 or more|about layers: leave out layers=False)"):
        GradMonitor(model_with([1.0]), (), **wrong)


def test_sinks_may_keep_and_change_what_they_get() -> None:
    told = Told()
    GradMonitor(model_with([3.0, 4.0]), [lambda figures, step: figures.clear(), told]).observe()
    assert told.last["norm"] == 5.0


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
    foreign = torch.nn.Parameter(torch.zeros(2))
    foreign.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"parameters\[2\] does not belong to the monitor's model"):
        monitor.clip_grad_norm_([*model.parameters(), foreign], 1.0)
    model.bias.grad = torch.tensor(2.0).expand(1, 1)[0]
    model.weight.grad = torch.tensor(4.0).expand(1, 2)
    with pytest.raises(ValueError, match=r"parameters\[0\].grad .*expand"):
        monitor.clip_grad_norm_(model.parameters(), 1.0)
    assert (told, monitor.step, model.bias.grad.item()) == ([], 0, 2.0)
    assert monitor.clip_grad_norm_(model.parameters(), math.inf).item() == 6.0, "where nothing is written"


def test_as_torchs_function_with_one_parameter() -> None:
    told = Told()
    model = model_with([3.0, 4.0])
    assert GradMonitor(model, told).clip_grad_norm_(model.weight, 1.0).item() == 5.0
    assert told.last["norm/weight"] == 5.0


def test_no_gradients() -> None:
    told = Told()
    model = torch.nn.Linear(2, 1)
    monitor = GradMonitor(model, told)
    assert monitor.clip_grad_norm_(model.parameters(), 1.0).item() == 0.0
    assert (told.last["norm"], told.last["clip/coefficient"]) == (0.0, 1.0)


def test_monitors_are_pickled(tmp_path: Path) -> None:
    model = model_with([3.0, 4.0])
    monitor = GradMonitor(model, [json_lines(tmp_path / "gradients.jsonl"), tensorboard(tmp_path / "runs")], every=2)
    for limit in (2.0, 10.0):
        monitor.model.weight.grad = torch.tensor([[3.0, 4.0]])
        monitor.clip_(limit)
        monitor.observe()
        monitor = pickle.loads(pickle.dumps(monitor))  # without gradients, as torch pickles parameters
    assert monitor.step == 4
    rows = [json.loads(line) for line in (tmp_path / "gradients.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["norm"], row["clip/fraction"]) for row in rows] == [(0, 5.0, 1.0), (2, 5.0, 0.5)]
    assert len(list((tmp_path / "runs").iterdir())) == 2


class Failing:
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, figures: Figures, step: int) -> None:
        self.calls += 1
        raise self.error(f"in step {step}")

    def __repr__(self) -> str:
        return f"Failing({self.error.__name__})"


def test_sinks_that_raise() -> None:
    model, told, failing = model_with([3.0, 4.0]), Told(), [Failing(OSError), Failing(ValueError)]
    monitor = GradMonitor(model, [failing[0], told, failing[1]])
    with pytest.warns(RuntimeWarning) as caught:
        assert monitor.clip_(1.0).norm == 5.0
    starts = [str(warning.message).partition(", has failed")[0] for warning in caught]
    assert starts == ["log[0], Failing(OSError)", "log[2], Failing(ValueError)"]
    assert all("in step 0" in str(warning.message) and warning.filename == __file__ for warning in caught)
    for _ in range(2):
        monitor.observe()  # without more warnings, which would be errors
    assert monitor.clip_grad_norm_(model.parameters(), 10.0).item() == pytest.approx(1.0)
    assert [step for step, _ in told] == [0, 1, 2, 3]
    assert [sink.calls for sink in failing] == [4, 4]


def test_sinks_that_raise_for_those_who_want_it() -> None:
    model, told = model_with([3.0, 4.0]), Told()
    monitor = GradMonitor(model, [Failing(OSError), told], on_error="raise")
    for step in range(2):
        with pytest.raises(OSError, match=f"in step {step}"):
            monitor.clip_(1.0)
    assert (monitor.step, len(told)) == (2, 2)
    assert model.weight.grad.norm().item() == pytest.approx(1.0), "clipped all the same"
    with pytest.raises(ValueError, match="choose 'warn' or 'raise'"):
        GradMonitor(model, (), on_error="ignore")  # type: ignore[arg-type]


def test_sinks_that_interrupt() -> None:
    monitor = GradMonitor(model_with([3.0, 4.0]), Failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        monitor.observe()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("x.jsonl", r"log is the path 'x.jsonl': pass a sink, json_lines\('x.jsonl'\) or tensorboard\('x.jsonl'\)"),
        ([Told(), Path("runs")], r"log\[1\] is the path 'runs'"),
        (json_lines, "log is <class .*json_lines'>: pass a function"),
        (lambda step, figures, more: None, r"log is <function .*: pass a function that can be called as sink\(figures, step=step\)"),
        ([Told(), lambda step, figures: None], r"log\[1\] is <function .*can be called as sink\(figures, step=step\)"),
        (lambda figures: None, "can be called as"),
        (print, "can be called as"),
        (Told().append, "can be called as"),
        ([None], r"log\[0\] is None: pass a function"),
        (None, "log is None: pass a function"),
    ],
)
def test_what_is_no_sink(log: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GradMonitor(model_with([3.0, 4.0]), log)
