"""Sinks: what they write, where, after a crash, and in another process."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from normclip.monitor import GradMonitor, json_lines, tensorboard
from support.processes import output_of
from support.training import model_with


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
    for path in (tmp_path / "nowhere" / "gradients.jsonl", tmp_path, Path("/sys/kernel/notes")):
        with pytest.raises(OSError, match=str(path)):
            json_lines(path)


def test_json_lines_after_a_crash(tmp_path: Path) -> None:
    """A line that was cut off is one that cannot be read, and no more."""
    path = tmp_path / "gradients.jsonl"
    log = json_lines(path)
    log({"norm": 5.0}, step=0)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "nor')
    for sink in (log, json_lines(path)):
        sink({"norm": 6.0}, step=2)
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"step": 0, "norm": 5.0}',
        '{"step": 1, "nor',
        '{"step": 2, "norm": 6.0}',
        '{"step": 2, "norm": 6.0}',
    ]


def test_json_lines_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = json_lines("gradients.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log({"norm": 5.0}, step=0)
    pickle.loads(pickle.dumps(log))({"norm": 5.0}, step=1)
    assert len((tmp_path / "gradients.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no such file here")
def test_json_lines_to_a_pipe() -> None:
    program = "from normclip.monitor import json_lines; log = json_lines('/dev/stdout'); log({'norm': 5.0}, step=0); log({}, step=1)"
    assert output_of(program) == '{"step": 0, "norm": 5.0}\n{"step": 1}\n'


def scalars_of(folder: Path, name: str) -> set[tuple[int, float]]:
    """From all files of a folder, each of which has one writer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return {(event.step, event.value) for file in folder.iterdir() for event in EventAccumulator(str(file)).Reload().Scalars(name)}


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with SummaryWriter(str(tmp_path)) as writer:
        monitor = GradMonitor(model_with([3.0, 4.0]), tensorboard(writer))
        for _ in range(3):
            monitor.clip_(1.0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("norm/weight")] == [(0, 5.0), (1, 1.0), (2, 1.0)]
    assert "clip/threshold" in events.Tags()["scalars"]


def test_tensorboard_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by the process that logs, and complete when it ends."""
    monkeypatch.chdir(tmp_path)
    program = """
        from normclip.monitor import tensorboard
        import os
        log = tensorboard("runs")
        os.chdir("/")
        log({"norm": 5.0}, step=0)
    """
    output_of(program)
    assert scalars_of(tmp_path / "runs", "norm") == {(0, 5.0)}
    log = tensorboard(tmp_path / "runs")
    log({"norm": 6.0}, step=1)
    pickle.loads(pickle.dumps(log))({"norm": 7.0}, step=2)
    del log
    assert scalars_of(tmp_path / "runs", "norm") == {(0, 5.0), (1, 6.0), (2, 7.0)}
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        tensorboard(tmp_path / "file")
    with pytest.raises(TypeError, match=r"pass a folder, or a torch\.utils.tensorboard.SummaryWriter"):
        tensorboard(7)


class Writer:
    """That can be pickled."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, *scalar: Any) -> None:
        self.written.append(scalar)


def test_tensorboard_with_a_writer_is_pickled_if_that_is(tmp_path: Path) -> None:
    sink = pickle.loads(pickle.dumps(tensorboard(Writer())))
    sink({"norm": 5.0}, step=0)
    assert sink._writer.written == [("norm", 5.0, 0)]
    with SummaryWriter(str(tmp_path)) as writer, pytest.raises(TypeError, match="pass the folder to tensorboard"):
        pickle.dumps(tensorboard(writer))
