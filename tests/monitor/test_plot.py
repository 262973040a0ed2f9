"""The picture of what was logged, also of files that are damaged."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from normclip.monitor import GradMonitor, json_lines, plot
from normclip.monitor.picture import _apart, _row_names, _shortened
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


def texts_of(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]


def drawn(folder: Path, rows: list[dict[str, Any]], **how: Any) -> list[str]:
    """The texts of the picture of these steps."""
    (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plot(folder / "run.jsonl", folder / "run.svg", **how)
    return texts_of(folder / "run.svg")


def row_of(step: int, norms: list[float], **others: float | None) -> dict[str, Any]:
    layers = {f"norm/net.{index}.weight": norm for index, norm in enumerate(norms)}
    return {"step": step, "norm": math.hypot(*norms), "sign_cosine": 0.8, "nonfinite": 0.0, **layers, **others}


def test_layers_that_stand_out_have_names(tmp_path: Path) -> None:
    """Far above and far below the others."""
    norms = [1.0, 1.1, 100.0, 0.9, 1.2, 0.001, 1.0, 1.0, 5.0, 1.0]
    texts = drawn(tmp_path, [row_of(step, norms) for step in range(5)])
    title = texts.index("L2 norm")  # which is drawn after what is in the panel
    named = {text for text in texts[:title] if text.endswith(".weight")}
    assert named == {"net.2.weight", "net.5.weight", "net.8.weight"}
    assert {f"net.{index}.weight" for index in range(10)} <= set(texts[title:]), "all rows of the heat map"
    assert {"Gradients by step", "run.jsonl · 5 steps"} <= set(texts)


def test_what_happened_is_marked_and_counted(tmp_path: Path) -> None:
    rows = [row_of(step, [3.0, 4.0], **{"clip/coefficient": 1.0, "clip/threshold": 1.0, "clip/fraction": 0.5}) for step in range(8)]
    texts = drawn(tmp_path, rows)
    assert "clipped step" not in texts
    assert "not finite" not in texts
    rows[1] |= {"clip/coefficient": 0.5}
    rows[2] |= {"norm": None, "nonfinite": 3.0, "clip/coefficient": None}
    texts = drawn(tmp_path, [*rows, rows[3] | {"clip/coefficient": 0.5}])
    assert {"clipped step", "not finite", "run.jsonl · 8 steps · 25% clipped · 1 not finite", "threshold", "coefficient"} <= set(texts)


def test_groups_have_names(tmp_path: Path) -> None:
    clips = {"clip/coefficient/muon": 0.5, "clip/threshold/muon": 1.0, "clip/norm": 5.0, "clip/fraction": 1.0}
    assert {"coefficient of muon", "threshold of muon"} <= set(drawn(tmp_path, [row_of(0, [3.0, 4.0], **clips)]))


@pytest.mark.parametrize(
    "rows",
    [
        [row_of(0, [3.0, 4.0])],
        [row_of(0, [0.0, 0.0]), row_of(1, [0.0, 0.0])],
        [row_of(step, [], norm=None, nonfinite=1.0, **{"norm/a": None, "norm/b": None, "nonfinite/a": 1.0}) for step in range(3)],
        [{"step": step, "norm": 1.0, f"norm/{'ab'[step % 2]}": 1.0, "norm/c": 2.0} for step in range(6)],
        [row_of(step, [1.0 + index for index in range(60)]) for step in range(400)],
    ],
    ids=["one step", "zeros", "nothing finite", "layers come and go", "many"],
)
def test_pictures_of_the_unusual(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for heat in ("norm", "sign_cosine"):
        assert "Gradients by step" in drawn(tmp_path, rows, heat=heat)


def test_figures_of_which_there_is_no_heat_map(tmp_path: Path) -> None:
    assert "Sign-cosine by layer" in drawn(tmp_path, [row_of(0, [1.0], **{"sign_cosine/a": 0.5, "sign_cosine/b": 0.6})], heat="sign_cosine")
    with pytest.raises(ValueError, match="heat is 'zeros': choose 'norm' or 'sign_cosine'"):
        plot(tmp_path / "run.jsonl", tmp_path / "run.svg", heat="zeros")  # type: ignore[arg-type]


def test_an_svg_has_no_background(tmp_path: Path) -> None:
    """So that it suits dark pages."""
    drawn(tmp_path, [row_of(0, [3.0, 4.0])])
    assert "#ffffff" not in (tmp_path / "run.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("places", "low", "high", "moved"),
    [
        ([], 0.0, 100.0, []),
        ([10.0, 50.0], 0.0, 100.0, [10.0, 50.0]),
        ([50.0, 50.0, 50.0], 0.0, 100.0, [38.0, 50.0, 62.0]),
        ([50.0, 51.0, 90.0], 0.0, 100.0, [44.5, 56.5, 90.0]),
        ([99.0, 100.0], 0.0, 100.0, [88.0, 100.0]),
        ([0.0, 1.0], 0.0, 100.0, [0.0, 12.0]),
        ([5.0, 5.0, 5.0], 0.0, 10.0, [0.0, 12.0, 24.0]),
    ],
)
def test_labels_move_apart(places: list[float], low: float, high: float, moved: list[float]) -> None:
    assert _apart(np.array(places), low, high).tolist() == pytest.approx(moved)


def test_short_names() -> None:
    assert _shortened([]) == {}
    assert _shortened(["a.b.weight", "a.b.bias"]) == {"a.b.weight": "weight", "a.b.bias": "bias"}
    assert _shortened(["model.a", "model.b.c", "model"]) == {"model.a": "model.a", "model.b.c": "model.b.c", "model": "model"}
    assert _shortened(["m.layers.0.a", "m.layers.10.a"]) == {"m.layers.0.a": "layers.0.a", "m.layers.10.a": "layers.10.a"}
    (short,) = _shortened(["x" * 20 + "." + "y" * 30]).values()
    assert short == "…" + "y" * 27


def test_names_of_many_rows_are_those_of_modules() -> None:
    blocks = [f"transformer.h.{block}.{part}.weight" for block in range(12) for part in ("a", "b", "c")]
    names = _row_names(["transformer.wte.weight", *blocks, "transformer.ln_f.weight"])
    assert names[:2] == [(0.0, "transformer.wte"), (2.0, "transformer.h.0")]
    assert len(names) == 14
    assert len(_row_names([f"layers.{block}.{part}" for block in range(100) for part in "ab"])) == 18
