"""The picture of what was logged, also of files that are damaged."""

import math
from pathlib import Path

import pytest
import torch

from normclip.monitor import GradMonitor, json_lines, plot
from support.training import model_with


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
    json_lines(path)({"norm": 0.0}, step=0)
    plot(path, tmp_path / "gradients.svg")


def test_plot_of_what_is_damaged(tmp_path: Path) -> None:
    path, picture = tmp_path / "gradients.jsonl", tmp_path / "gradients.svg"
    good = b'{"step": 1, "norm": 2.0}'
    damaged = [b'{"step": 1, "no', b"\xff\xfe", b"[1]", b'{"norm": 2.0}', b'{"step": 1, "norm": "2"}', b"\0\0", b"7"]
    path.write_bytes(b"\n".join([good, *damaged[:3], good, b""]))
    with pytest.warns(RuntimeWarning, match=r"gradients.jsonl: .* line 2 \(Unterminated .*\), line 3 \(.*utf-8.*\), line 4 \(no object"):
        plot(path, picture)
    assert picture.stat().st_size > 1000
    path.write_bytes(b"\n".join(damaged))
    with pytest.raises(ValueError, match=r"holds no steps that can be read: line 1 .* line 5 \(norm is no number\) and 2 more"):
        plot(path, picture)
