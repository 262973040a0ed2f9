"""`lightning.Trainer` on a small model: clipping by normclip, and monitoring."""

import csv
import json
import pickle
import types
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import normclip
from normclip import patch
from normclip.integrations.lightning import GradMonitorCallback
from normclip.monitor import Figures, GradMonitor, json_lines
from normclip.monitor.trackers import among_others
from support.frameworks import LIGHTNINGS_WARNINGS
from support.training import assert_trains_alike, batches, reads_of, small_model

pytestmark = pytest.mark.filterwarnings(*LIGHTNINGS_WARNINGS)

STEPS = 4


class Module(pl.LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.net = small_model()
        self.count = optimizers

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        made = [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.count)]
        return made if self.count > 1 else made[0]


def fit(module: pl.LightningModule, folder: Path, *callbacks: pl.Callback, accumulation: int = 1, **settings: Any) -> pl.LightningModule:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulation,
        **{**quiet, **settings},
    )
    trainer.fit(module, DataLoader(batches(STEPS * accumulation), batch_size=None))
    return module


def monitored(module: nn.Module) -> tuple[GradMonitor, dict[int, Figures]]:
    told: dict[int, Figures] = {}
    return GradMonitor(module, lambda figures, step: told.__setitem__(step, figures)), told


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("algorithm", "name"), [("norm", "clip_grad_norm_"), ("value", "clip_grad_value_")])
def test_same_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, algorithm: str, name: str, accumulation: int) -> None:
    def train() -> nn.Module:
        return fit(Module(), tmp_path, accumulation=accumulation, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)

    assert_trains_alike(monkeypatch, train, calls=STEPS, name=name)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_monitor_clips(tmp_path: Path, accumulation: int) -> None:
    """From one read, without Lightning's clipping, and with the same result."""
    expected = fit(Module(), tmp_path, accumulation=accumulation, gradient_clip_val=0.5)
    module = Module()
    monitor, told = monitored(module)
    fit(module, tmp_path, GradMonitorCallback(monitor, rule=0.5), accumulation=accumulation)
    assert list(told) == list(range(STEPS))
    assert all(figures["clip/threshold"] == 0.5 < figures["norm"] for figures in told.values())
    for ours, torchs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


class Recorded(Module):
    """Writes down each step's number and the norm of the gradients of its optimizer, before anything clips them."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[tuple[int, float]] = []

    def record(self, parameters: Iterable[torch.Tensor] | None = None, later: int = 0) -> None:
        grads = [p.grad.double().flatten() / self.scale for p in parameters or self.parameters() if p.grad is not None]
        self.expected.append((self.trainer.global_step + later, torch.linalg.vector_norm(torch.cat(grads)).item()))


class Automatic(Recorded):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.record()


class Itself(Automatic):
    """Clips as an optimizer's owner may."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        if "lightning" in self.way:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if "torch" in self.way:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        if "value" in self.way:
            torch.nn.utils.clip_grad_value_(self.parameters(), 0.01)
        if "normclip" in self.way:
            normclip.clip_grad_norm_(self.parameters(), 0.5)
        if "parts" in self.way:
            for layer in (self.net[0], self.net[2]):
                torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.25)
        if "monitor" in self.way:
            self.trainer.callbacks[0].monitor.clip_(0.5)
        if "monitor twice" in self.way:
            self.trainer.callbacks[0].monitor.clip_grad_norm_(self.parameters(), 0.25)


class Early(Automatic):
    """Clips before the hook of the callback."""

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    def on_after_backward(self) -> None:
        self.record()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


class Manual(Recorded):
    """Steps when it has accumulated two batches, each of them clipped or only the sum."""

    def __init__(self, way: str, accumulation: int = 1, always: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.way, self.accumulation, self.always = way, accumulation, always

    def clip(self, optimizer: Any) -> None:
        if self.way == "lightning":
            self.clip_gradients(optimizer, 0.5, "norm")
        elif self.way == "lightning by value":
            self.clip_gradients(optimizer, 0.01, "value")
        elif self.way == "torch":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        elif self.way == "torch, in two steps":
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), 0.5, norm)
        elif self.way == "twice":
            torch.nn.utils.clip_grad_value_(self.parameters(), 0.1)
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        elif self.way == "in parts":
            for layer in (self.net[0], self.net[2]):
                torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.25)
        elif self.way == "with noise":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            for parameter in self.parameters():
                parameter.grad.add_(0.1)
        elif self.way == "monitor":
            self.trainer.callbacks[0].monitor.clip_(0.5)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch))
        steps = index % self.accumulation == self.accumulation - 1
        if steps:
            self.record()
        if steps or self.always:
            self.clip(optimizer)
        if steps:
            optimizer.step()
            optimizer.zero_grad()


class Alternating(Recorded):
    """Two optimizers, one a layer, whose gradients are taken, clipped and stepped with in an order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.order = order

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        optimizers = self.optimizers()
        layers = [list(self.net[0].parameters()), list(self.net[2].parameters())]

        def backward(*wanted: int) -> None:
            inputs = [parameter for index in wanted for parameter in layers[index]] if len(wanted) < 2 else None
            self.manual_backward(super(Alternating, self).training_step(batch), inputs=inputs)

        def clip(index: int) -> None:
            torch.nn.utils.clip_grad_norm_(layers[index], 0.5)

        def step(index: int) -> None:
            optimizers[index].step()
            optimizers[index].zero_grad()

        if self.order == "in turns":
            for index in (0, 1):
                backward(index)
                self.record(layers[index])
                clip(index)
                step(index)
        elif self.order == "together":
            backward(0, 1)
            self.record(layers[0])
            self.record(layers[1], later=1)
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            step(0)
            step(1)
        elif self.order == "interleaved":
            backward(0)
            self.record(layers[0])
            clip(0)
            backward(1)
            self.record(layers[1], later=1)
            clip(1)
            step(0)
            step(1)
        elif self.order == "one clipped":
            backward(0, 1)
            self.record(layers[0])
            clip(0)
            step(0)
            self.record(layers[1])
            step(1)


class Scaled(Manual):
    """Whose gradients are multiplied by the scale until the optimizer steps."""

    scale = 2.0**8


def half_precision() -> Any:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=Scaled.scale))


WAYS: dict[str, tuple[Callable[[], Recorded], dict[str, Any]]] = {
    "no clipping": (Automatic, {}),
    "by norm": (Automatic, {"gradient_clip_val": 0.5}),
    "by norm, accumulated": (Automatic, {"gradient_clip_val": 0.5, "accumulation": 3}),
    "by value": (Automatic, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "by norm in half precision": (Automatic, {"gradient_clip_val": 0.5, "plugins": half_precision}),
    "early": (Early, {}),
    "early and by norm": (Early, {"gradient_clip_val": 0.25}),
    **{
        f"itself: {way}": (partial(Itself, way), {})
        for way in ("not at all", "torch", "value, torch", "normclip", "parts", "monitor", "monitor twice")
    },
    "itself: lightning": (partial(Itself, "lightning"), {"gradient_clip_val": 0.5}),
    "itself: lightning, torch": (partial(Itself, "lightning, torch"), {"gradient_clip_val": 5.0}),
    **{
        f"manual: {way}": (partial(Manual, way), {})
        for way in (
            *(
                "not at all",
                "lightning",
                "lightning by value",
                "torch",
                "torch, in two steps",
                "twice",
                "in parts",
                "with noise",
                "monitor",
            ),
        )
    },
    "itself: monitor, accumulated": (partial(Itself, "monitor"), {"accumulation": 3}),
    "manual, accumulated": (partial(Manual, "torch", accumulation=2), {}),
    "manual, each batch clipped": (partial(Manual, "torch", accumulation=2, always=True), {}),
    "manual, in half precision": (partial(Scaled, "not at all"), {"plugins": half_precision}),
    **{f"alternating: {order}": (partial(Alternating, order), {}) for order in ("in turns", "together", "interleaved", "one clipped")},
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_each_step_is_logged_once_before_clipping(tmp_path: Path, way: str, patched: bool) -> None:
    make, settings = WAYS[way]
    module, told = make(), []
    monitor = GradMonitor(module, lambda figures, step: told.append((step, figures["norm"])))
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    with normclip.patch_torch(monitor) if patched else nullcontext():
        fit(module, tmp_path, GradMonitorCallback(monitor), **settings)
    assert [step for step, _ in module.expected] == list(range(len(module.expected)))
    assert told == [(step, pytest.approx(norm, rel=1e-6)) for step, norm in module.expected]
    assert len(told) >= STEPS / 2
    assert not patch._active


def test_lightnings_clipping_and_the_monitor_share_a_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = Module()
    monitor, told = monitored(module)
    reads = reads_of(monkeypatch)
    fit(module, tmp_path, GradMonitorCallback(monitor), gradient_clip_val=0.5)
    assert len(reads) == STEPS
    assert all(figures["clip/threshold"] == 0.5 < figures["norm"] for figures in told.values())
    assert "norm/net.0.weight" in told[0]


@pytest.mark.parametrize("way", ["no clipping", "by norm", "itself: monitor", "rule", "every other step"])
def test_figures_reach_the_loggers_of_the_trainer(tmp_path: Path, way: str) -> None:
    make, settings = WAYS.get(way, (Automatic, {}))
    module = make()
    monitor, told = monitored(module)
    monitor.every = 2 if way == "every other step" else 1
    callback = GradMonitorCallback(monitor, 0.5 if way == "rule" else None, log=True)
    settings = {"accumulation": 2, "logger": CSVLogger(tmp_path), "log_every_n_steps": 2, **settings}
    trainer = fit(module, tmp_path, callback, **settings).trainer
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    latest = [told[step - step % monitor.every] for step in (1, 3)]
    assert [(int(row["step"]), float(row["gradients/norm/all"])) for row in rows] == [
        (step, pytest.approx(figures["norm"])) for step, figures in zip((1, 3), latest, strict=True)
    ]
    assert rows[0].keys() - {"epoch", "step"} == among_others(told[0]).keys()
    assert trainer.callback_metrics["gradients/norm/net.0.weight"] == pytest.approx(told[max(told)]["norm/net.0.weight"])
    fit(module, tmp_path, callback)
    assert len(monitor.log) == 2, "once, however often it trains"


class File:
    """A sink that other processes have, too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, figures: Figures, step: int) -> None:
        with self.path.open("a") as lines:
            lines.write(json.dumps([step, figures["norm"]]) + "\n")


class Written(pl.Callback):
    """What a module has recorded, a file a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, module: Any) -> None:
        (self.folder / f"expected{trainer.global_rank}").write_text(json.dumps(module.expected))


class Watched(pl.Callback):
    """Wants a metric in every process, as `ModelCheckpoint(monitor=…)` does."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        assert trainer.callback_metrics["gradients/norm/all"] > 0.0


@pytest.mark.parametrize("way", ["by norm", "itself: value, torch", "manual: lightning", "alternating: together"])
def test_two_devices(tmp_path: Path, way: str) -> None:
    make, settings = WAYS[way]
    module = make()
    monitor = GradMonitor(module, File(tmp_path / "told"))
    callbacks = [GradMonitorCallback(monitor, log=True), Written(tmp_path), Watched()]
    fit(module, tmp_path, *callbacks, **settings, strategy="ddp_fork", devices=2, log_every_n_steps=1)
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    expected = json.loads((tmp_path / "expected0").read_text())
    assert expected == json.loads((tmp_path / "expected1").read_text())
    assert told == [[step, pytest.approx(norm, rel=1e-6)] for step, norm in expected]
    assert [step for step, _ in told] == list(range(len(told)))
    assert len(told) >= STEPS / 2


def test_an_optimizer_without_monitored_parameters_is_not_logged(tmp_path: Path) -> None:
    module = Alternating("in turns")
    monitor, told = monitored(module.net[2])
    fit(module, tmp_path, GradMonitorCallback(monitor))
    assert {step: figures["norm"] for step, figures in told.items()} == pytest.approx(dict(module.expected[1::2]), rel=1e-6)


def test_what_the_monitor_clips_in_a_hook_is_what_is_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = Itself("monitor")
    monitor, told = monitored(module)
    monitor.every = 2
    reads = reads_of(monkeypatch)
    fit(module, tmp_path, GradMonitorCallback(monitor))
    assert {step: figures["clip/threshold"] for step, figures in told.items()} == {0: 0.5, 2: 0.5}
    assert len(reads) == 2, "before the hook, as it might not call the monitor; only in steps that are logged"
    monitor.observe()
    assert monitor.step == STEPS + 1, "after training it counts by itself"


def test_a_step_that_fails_is_logged(tmp_path: Path) -> None:
    class Failing(Automatic):
        def configure_gradient_clipping(self, *given: Any, **others: Any) -> None:
            raise ZeroDivisionError

    module = Failing()
    monitor, told = monitored(module)
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, GradMonitorCallback(monitor))
    assert [(step, figures["norm"]) for step, figures in told.items()] == [(0, pytest.approx(module.expected[0][1], rel=1e-6))]


def test_a_monitor_is_pickled_while_training(tmp_path: Path) -> None:
    class Pickling(pl.Callback):
        def on_train_batch_end(self, *given: Any, **others: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(monitor)))

    module, copies = Module(), []
    monitor = GradMonitor(module, json_lines(tmp_path / "gradients.jsonl"))
    fit(module, tmp_path, GradMonitorCallback(monitor), Pickling())
    assert [copy.step for copy in copies] == [1, 2, 3, 4]
    copies[1].observe()
    assert copies[1].step == 3


@pytest.mark.parametrize(("way", "rule"), [("not at all", None), ("not at all", 0.5), ("monitor", None)])
def test_a_step_of_several_closures_is_logged_once(tmp_path: Path, way: str, rule: float | None) -> None:
    class ByClosures(Itself):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module = ByClosures(way)
    monitor = GradMonitor(module, lambda figures, step: told.append((step, figures["norm"])))
    told: list[tuple[int, float]] = []
    fit(module, tmp_path, GradMonitorCallback(monitor, rule))
    assert len(module.expected) > STEPS
    assert [step for step, _ in told] == list(range(STEPS))
    if rule is None:  # else the module's hook sees gradients that the callback has clipped
        assert dict(told) == pytest.approx(dict(reversed(module.expected)), rel=1e-6)


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_gradients_out_of_reach_are_refused(strategy: type) -> None:
    trainer = types.SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(ValueError, match=f"under {strategy.__name__} parameters do not have"):
        GradMonitorCallback(monitored(Module())[0]).on_fit_start(trainer, None)


def test_torch_is_itself_after_an_error(tmp_path: Path) -> None:
    class Failing(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, GradMonitorCallback(monitored(module)[0]))
    assert not patch._active


def test_monitor_of_a_part_observes(tmp_path: Path) -> None:
    module = Module()
    monitor, told = monitored(module.net[0])
    with normclip.patch_torch(monitor):
        fit(module, tmp_path, GradMonitorCallback(monitor), gradient_clip_val=0.5)
    assert list(told) == list(range(STEPS))
    assert "clip/norm" not in told[0]


def test_rules_that_cannot_work_are_refused(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(ValueError, match="leave out either rule or gradient_clip_val"):
        fit(module, tmp_path, GradMonitorCallback(monitored(module)[0], rule=1.0), gradient_clip_val=0.5)
    several = Module(optimizers=2)
    several.automatic_optimization = False
    with pytest.raises(ValueError, match="several optimizers"):
        fit(several, tmp_path, GradMonitorCallback(monitored(several)[0], rule=1.0))
