"""`transformers.Trainer` on a tiny model of random parameters: clipping by normclip, and monitoring."""

import gc
import inspect
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import normclip
from normclip import patch
from normclip.integrations.transformers import GradMonitorCallback
from normclip.monitor import Figures, GradMonitor
from normclip.monitor.trackers import among_others
from normclip.rules import Soft
from support.training import assert_trains_alike, reads_of

STEPS = 4


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    zero = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **zero)
    )


def trainer_of(model: nn.Module, folder: Path, callbacks: list[TrainerCallback] | None = None, **arguments: Any) -> Trainer:
    tokens = torch.randint(64, (32, 8), generator=torch.Generator().manual_seed(0))
    settings = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 0.1, "optim": "sgd", "seed": 0, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False}
    return Trainer(
        model,
        TrainingArguments(folder, **{**settings, **quiet, **arguments}),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=callbacks,
    )


def monitored(model: nn.Module) -> tuple[GradMonitor, dict[int, Figures]]:
    told: dict[int, Figures] = {}
    return GradMonitor(model, lambda figures, step: told.__setitem__(step, figures)), told


@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulation: int) -> None:
    def train() -> nn.Module:
        model = tiny_model()
        trainer_of(model, tmp_path, max_grad_norm=0.5, gradient_accumulation_steps=accumulation).train()
        return model

    assert_trains_alike(monkeypatch, train, calls=STEPS)


class Expected(TrainerCallback):
    """Sums up gradients as backward makes them, and takes their norm when the optimizer steps."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: list[float] = []
        self.grads: dict[int, torch.Tensor] = {}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.keep)

    def keep(self, parameter: torch.Tensor) -> None:
        self.grads[id(parameter)] = parameter.grad.double()  # which holds what was accumulated

    def on_optimizer_step(self, *given: Any, **others: Any) -> None:
        self.norms.append(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in self.grads.values()])).item())


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_each_step_is_logged_once_before_clipping_from_one_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: float, settings: dict[str, Any], patched: bool
) -> None:
    model, told = tiny_model(), []
    monitor = GradMonitor(model, lambda figures, step: told.append((step, figures)))
    expected, reads = Expected(model), reads_of(monkeypatch)
    trainer = trainer_of(model, tmp_path, [GradMonitorCallback(monitor), expected], max_grad_norm=limit, **settings)
    with normclip.patch_torch(monitor) if patched else nullcontext():
        trainer.train()
    assert reads == ["measure"] * STEPS
    assert [step for step, _ in told] == list(range(STEPS))
    assert [figures["norm"] for _, figures in told] == pytest.approx(expected.norms, rel=1e-6)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if limit or logged:  # older Trainers measure nothing where they clip nothing
        assert [figures["norm"] for _, figures in told] == pytest.approx(logged)
    assert all(figures.get("clip/threshold", 0.0) == limit < figures["norm"] for _, figures in told)
    assert "norm/transformer.wte.weight" in told[0][1]
    assert not patch._active


@pytest.mark.parametrize("rule", [None, 0.5])
def test_figures_reach_what_the_trainer_reports_to(tmp_path: Path, rule: float | None) -> None:
    model = tiny_model()
    monitor, told = monitored(model)
    limit = 0.5 if rule is None else 0.0
    settings = {"report_to": "tensorboard", "logging_steps": 2, "logging_dir": str(tmp_path / "runs")}
    if "logging_dir" not in inspect.signature(TrainingArguments).parameters:
        del settings["logging_dir"]
    trainer = trainer_of(model, tmp_path, max_grad_norm=limit, **settings)
    trainer.add_callback(GradMonitorCallback(monitor, rule, log=trainer.log))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "gradients/norm/all" in row]
    assert [(row["step"], row["gradients/norm/all"]) for row in rows] == [(2, told[1]["norm"]), (4, told[3]["norm"])]
    assert set(among_others(told[1])) <= set(rows[0])
    assert told[1].keys() == told[3].keys(), "what the Trainer adds is not among the figures"
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/gradients/norm/transformer.wte.weight")]
    assert found == [(step + 1, pytest.approx(told[step]["norm/transformer.wte.weight"])) for step in (1, 3)]


def test_monitors_of_parts_and_several_of_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    parts, wholes = [monitored(layer) for layer in model.transformer.h], [monitored(model) for _ in range(2)]
    callbacks = [GradMonitorCallback(monitor) for monitor, _ in (*parts, *wholes)]
    with normclip.patch_torch(GradMonitor(model, lambda figures, step: told.append(figures["norm"]))):
        told: list[float] = []
        trainer_of(model, tmp_path, callbacks, max_grad_norm=0.5).train()
    for _, figures in wholes:
        assert [figures[step]["norm"] for step in range(STEPS)] == told
    for layer, (_, figures) in enumerate(parts):
        for step in range(STEPS):
            inside = [norm for name, norm in wholes[0][1][step].items() if name.startswith(f"norm/transformer.h.{layer}.")]
            assert figures[step]["norm"] == pytest.approx(math.hypot(*inside))


@pytest.mark.skipif(not hasattr(Trainer, "_clip_grad_norm"), reason="this Trainer clips in its training loop, where no subclass changes it")
def test_gradients_on_several_meshes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Trainer clips those by torch's other functions."""
    model = tiny_model()
    monitor, told = monitored(model)
    expected = Expected(model)
    monkeypatch.setattr(Trainer, "_has_mixed_mesh_grads", lambda self, model: True)
    trainer_of(model, tmp_path, [GradMonitorCallback(monitor), expected], max_grad_norm=0.5).train()
    assert [figures["norm"] for figures in told.values()] == pytest.approx(expected.norms, rel=1e-6)


@pytest.mark.skipif(not hasattr(Trainer, "_clip_grad_norm"), reason="this Trainer clips in its training loop, where no subclass changes it")
def test_clipping_out_of_sight_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Other(Trainer):
        def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
            return normclip.clip_grad_norm_(model.parameters(), 0.5)

    model = tiny_model()
    monitor, told = monitored(model)
    trainer = trainer_of(model, tmp_path, [GradMonitorCallback(monitor)], max_grad_norm=0.5)
    trainer.__class__ = Other
    with pytest.raises(RuntimeError, match="norm before clipping is unknown"):
        trainer.train()
    assert not told
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP of version 1"])
def test_gradients_out_of_reach_are_refused(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, [GradMonitorCallback(monitored(model)[0])])
    if name == "DeepSpeed":
        trainer.args.deepspeed_plugin = object()
    else:
        wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(wrapped)
        model.add_module("wrapped", wrapped)
    with pytest.raises(ValueError, match=f"{name} clips by itself"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert not patch._active


def test_torch_is_itself_when_a_trainer_that_failed_is_gone(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if failing and state.global_step == 2:
                raise ZeroDivisionError

    model, failing = tiny_model(), True
    monitor, told = monitored(model)
    trainer = trainer_of(model, tmp_path, [GradMonitorCallback(monitor), Failing()], max_grad_norm=0.5)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    failing = False
    trainer.train()
    assert list(told) == list(range(STEPS)), "it can begin anew"
    assert not patch._active
    failing = True
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    del trainer
    gc.collect()
    assert not patch._active


def test_the_monitor_clips_by_a_rule(tmp_path: Path) -> None:
    model = tiny_model()
    monitor, told = monitored(model)
    trainer_of(model, tmp_path, [GradMonitorCallback(monitor, rule=Soft(0.5))], max_grad_norm=0.0).train()
    assert list(told) == list(range(STEPS))
    for figures in told.values():
        assert figures["clip/coefficient"] == pytest.approx(0.5 / (figures["norm"] + 0.5))


def test_two_that_clip_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    monitor, told = monitored(model)
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        trainer_of(model, tmp_path, [GradMonitorCallback(monitor, rule=1.0)], max_grad_norm=0.5).train()
    with pytest.raises(ValueError, match="choose one"), normclip.patch_torch(monitor):
        trainer_of(model, tmp_path, [GradMonitorCallback(monitor, rule=1.0)], max_grad_norm=0.0).train()
    assert not told
