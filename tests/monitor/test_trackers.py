"""Runs of Weights & Biases and MLflow, which keep what they are told in local files; where these are not installed, stand-ins."""

import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normclip.monitor import GradMonitor, mlflow_run, wandb_run
from normclip.monitor.trackers import among_others
from support.training import model_with


class Run:
    """As a run of Weights & Biases takes rows: one that comes late is lost."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.step = 0
        self.defined: dict[str, str | None] = {}

    def define_metric(self, name: str, step_metric: str | None = None, **how: Any) -> None:
        self.defined[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        at = self.step if step is None else step
        if at >= self.step:
            self.rows.setdefault(at, {}).update(data)
            self.step = at + (step is None)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("numbered", [False, True])
def test_no_row_is_lost_whatever_else_logs(order: str, numbered: bool) -> None:
    run = Run()
    monitor = GradMonitor(model_with([3.0, 4.0]), wandb_run(run))
    for step in range(3):
        if order == "before":
            run.log({"loss": step}, step=step if numbered else None)
        monitor.observe()
        if order == "after":
            run.log({"loss": step}, step=step if numbered else None)
    assert sorted(row["gradients/step"] for row in run.rows.values() if "gradients/step" in row) == [0, 1, 2]
    assert sorted(row["loss"] for row in run.rows.values() if "loss" in row) == [0, 1, 2]
    assert run.defined == {"gradients/step": None, "gradients/*": "gradients/step"}


def test_names_among_others() -> None:
    """None is the beginning of another's path, as stores keep a file or a folder for each."""
    names = among_others(dict.fromkeys(["norm", "norm/weight", "clip/coefficient/rest", "zeros"], 1.0))
    assert list(names)[:2] == ["gradients/norm/all", "gradients/norm/weight"]
    assert not [name for name in names for other in names if other.startswith(f"{name}/")]


def records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as W&B writes it: a header, then blocks of 32 KiB with pieces of records."""
    data, offset, record = path.read_bytes(), 7, b""
    while offset < len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole one, or its last piece
            yield record
            record = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True)) as run:
        monitor = GradMonitor(model_with([3.0, 4.0]), wandb_run(run), on_error="raise")
        for step in range(3):
            monitor.clip_(1.0)
            run.log({"loss": 1.0 / (step + 1)})
        assert run.summary["gradients/clip/threshold"] == 1.0
    wandb.teardown()  # its other process writes the end of the file when it ends
    (file,) = tmp_path.rglob("*.wandb")
    rows, axes = [], {}
    for piece in records(file):
        record = Record.FromString(piece)
        rows += [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}]
        axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    rows = [row for row in rows if row]
    assert [row["gradients/norm/weight"] for row in rows] == pytest.approx([5.0, 1.0, 1.0])
    assert [row["gradients/step"] for row in rows] == [0, 1, 2]
    assert [row["loss"] for row in rows] == pytest.approx([1.0, 1 / 2, 1 / 3])
    assert axes["gradients/*"] == "gradients/step"


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer versions ask for
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    store = (tmp_path / "runs").as_uri()
    mlflow.set_tracking_uri(store)
    with pytest.raises(TypeError, match=r"run is None: pass what mlflow\.start_run returns"):
        mlflow_run(mlflow.active_run())
    with mlflow.start_run() as run:
        monitor = GradMonitor([(f"blocks[{name}]", p) for name, p in model_with([3.0, 4.0]).named_parameters()], mlflow_run(run))
        monitor.on_error = "raise"
        monitor.clip_(1.0)
    mlflow.set_tracking_uri((tmp_path / "elsewhere").as_uri())
    pickle.loads(pickle.dumps(monitor.log[0]))({"norm": float("nan")} | {f"norm/{i}": 1.0 for i in range(1200)}, step=7)
    client = mlflow.MlflowClient(store)
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "gradients/norm/all")]
    assert history[0] == (0, 5.0)
    assert history[1] == (7, pytest.approx(float("nan"), nan_ok=True))
    stored = client.get_run(run.info.run_id).data.metrics
    assert stored["gradients/norm/blocks_weight_"] == 5.0
    assert stored["gradients/norm/1199"] == 1.0


@pytest.mark.parametrize("wrong", [None, "run", print])
def test_what_is_no_run(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"pass what wandb\.init returns"):
        wandb_run(wrong)
