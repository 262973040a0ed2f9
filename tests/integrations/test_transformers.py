"""`transformers.Trainer` on a tiny model of random parameters: clipping by normclip, and monitoring."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import normclip
from normclip.integrations.transformers import GradMonitorCallback
from normclip.monitor import Figures, GradMonitor
from normclip.rules import Soft
from support.training import assert_trains_alike

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
    return GradMonitor(model, lambda step, figures: told.__setitem__(step, figures)), told


@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulation: int) -> None:
    def train() -> nn.Module:
        model = tiny_model()
        trainer_of(model, tmp_path, max_grad_norm=0.5, gradient_accumulation_steps=accumulation).train()
        return model

    assert_trains_alike(monkeypatch, train, calls=STEPS)


def test_patch_shares_the_trainers_read_with_the_monitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model()
    monitor, told = monitored(model)
    reads: list[Any] = []
    measure, clip_grad_norm_ = normclip.monitor.monitor.measure, normclip.clip.clip_grad_norm_
    monkeypatch.setattr(normclip.monitor.monitor, "measure", lambda *given, **how: reads.append("stats") or measure(*given, **how))
    monkeypatch.setattr(normclip.clip, "clip_grad_norm_", lambda *given, **how: reads.append("norm") or clip_grad_norm_(*given, **how))
    trainer = trainer_of(model, tmp_path, [GradMonitorCallback(monitor)], max_grad_norm=0.5)
    with normclip.patch_torch(monitor):
        trainer.train()
    assert reads == ["stats"] * STEPS
    assert list(told) == list(range(STEPS))
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [figures["norm"] for figures in told.values()] == pytest.approx(logged)
    assert all(figures["clip/threshold"] == 0.5 < figures["norm"] for figures in told.values())
    assert "norm/transformer.wte.weight" in told[0]


def test_the_monitor_clips_by_a_rule(tmp_path: Path) -> None:
    model = tiny_model()
    monitor, told = monitored(model)
    trainer_of(model, tmp_path, [GradMonitorCallback(monitor, rule=Soft(0.5))], max_grad_norm=0.0).train()
    assert list(told) == list(range(STEPS))
    for figures in told.values():
        assert figures["clip/coefficient"] == pytest.approx(0.5 / (figures["norm"] + 0.5))


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_alone_the_callback_sees_what_the_trainer_has_left(tmp_path: Path, limit: float) -> None:
    model = tiny_model()
    monitor, told = monitored(model)
    trainer = trainer_of(model, tmp_path, [GradMonitorCallback(monitor)], max_grad_norm=limit)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [figures["norm"] for figures in told.values()] == pytest.approx([min(norm, limit or math.inf) for norm in logged], rel=1e-5)


def test_two_that_clip_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    monitor, told = monitored(model)
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        trainer_of(model, tmp_path, [GradMonitorCallback(monitor, rule=1.0)], max_grad_norm=0.5).train()
    with pytest.raises(ValueError, match="choose one"), normclip.patch_torch(monitor):
        trainer_of(model, tmp_path, [GradMonitorCallback(monitor, rule=1.0)], max_grad_norm=0.0).train()
    assert not told
