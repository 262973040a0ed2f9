"""Lists of device tensors in parts and tables."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import normclip
from normclip._backends.totals import joined
from normclip._core import TensorList

from .conftest import CHUNK
from .tensors import ORDERS, Place, exact_norm, make

# The interpreter computes in NumPy, which warns of overflow, where a device has none.
# That of Triton 3.6 makes numbers of arrays, of which NumPy warns before 2.4 refuses it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_parts_give_the_norm_of_all(order: float) -> None:
    parts = [make(torch.float64, size) for size in (3, 10, 5)]
    norms = [TensorList([part]).norm(order) for part in parts]
    for found in (joined(torch, torch.tensor(norms, dtype=torch.float64), order), joined(np, np.array(norms), order)):
        assert float(found) == pytest.approx(TensorList(parts).norm(order), rel=1e-12)


def test_tables_are_kept_while_memory_stays(place: Place, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "torch" in request.node.name:
        pytest.skip("plain torch has no tables")
    from normclip._backends import cuda

    cuda._tables.cache_clear()
    uploads = []
    monkeypatch.setattr(cuda, "_upload", lambda array, device, upload=cuda._upload: uploads.append(1) or upload(array, device))
    tensors = [place(torch.ones(size)) for size in (3, CHUNK + 1)]
    for _ in range(3):
        normclip.clip_(tensors, 1.0)
    assert len(uploads) == 1
    normclip.clip_(tensors[:1], 1.0)
    assert len(uploads) == 2
    for _ in range(3):
        normclip.dot(tensors, tensors)
    assert len(uploads) == 3


def test_memory_that_is_taken_again_is_read_as_what_it_is_now(place: Place) -> None:
    memory = place(torch.ones(4 * CHUNK))
    for size in (3, CHUNK + 1, 2 * CHUNK, 3):
        assert normclip.total_norm(memory[:size]).item() == pytest.approx(math.sqrt(size))
        halves = memory.view(torch.bfloat16)[:size]
        assert exact_norm([halves], 2.0) == pytest.approx(TensorList([halves.cpu()]).norm(2.0), rel=1e-12)


def test_each_stream_waits_once_for_a_table_and_a_capture_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from normclip._backends import cuda

    class Stream:
        def __init__(self, number: int) -> None:
            self.cuda_stream, self.waits = number, 0

        def record_event(self) -> str:
            return "the upload"

        def wait_event(self, event: str) -> None:
            assert event == "the upload"
            self.waits += 1

    streams = [Stream(0), Stream(1)]
    current, capturing = streams[0], False
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(cuda, "_upload", lambda array, device: SimpleNamespace(record_stream=lambda stream: None))
    cuda._tables.cache_clear()
    device, layouts = torch.device("cuda", 0), [np.array([16, size, 2, 0]).tobytes() for size in (1, 2)]
    tables = set()
    for stream in [*streams, *streams]:
        current = stream
        tables.add(cuda._table(layouts[0], device, cuda.Tuning()))
    assert len(tables) == 1
    assert [stream.waits for stream in streams] == [1, 1]
    current, capturing = Stream(2), True
    assert cuda._table(layouts[0], device, cuda.Tuning()) in tables & cuda._captured
    assert current.waits == 0
    with pytest.raises(RuntimeError, match="make the same call once"):
        cuda._table(layouts[1], device, cuda.Tuning())
    cuda._captured.clear()
    cuda._tables.cache_clear()
