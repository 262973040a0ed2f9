"""Lists of device tensors in parts and tables."""

import math
from collections.abc import Iterator
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


def forget() -> None:
    """Forget all tables but those of captures."""
    from normclip._backends import tables

    tables._latest.clear()
    tables._tables.cache_clear()
    tables._structures.cache_clear()


@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_parts_give_the_norm_of_all(order: float) -> None:
    parts = [make(torch.float64, size) for size in (3, 10, 5)]
    norms = [TensorList([part]).norm(order) for part in parts]
    for found in (joined(torch, torch.tensor(norms, dtype=torch.float64), order), joined(np, np.array(norms), order)):
        assert float(found) == pytest.approx(TensorList(parts).norm(order), rel=1e-12)


def test_tables_are_kept_while_memory_stays(place: Place, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "torch" in request.node.name:
        pytest.skip("plain torch has no tables")
    from normclip._backends import tables

    forget()
    uploads = []
    monkeypatch.setattr(tables, "upload", lambda array, device, upload=tables.upload: uploads.append(array.size) or upload(array, device))
    tensors = [place(torch.ones(size)) for size in (3, CHUNK + 1)]
    for _ in range(3):
        normclip.clip_(tensors, 1.0)
    structure, addresses = 3 * 3 + 3, 2
    assert uploads == [structure, addresses]
    normclip.clip_([place(torch.ones(size)) for size in (3, CHUNK + 1)], 1.0)
    assert uploads == [structure, addresses, addresses], "new memory of the same sizes has the same structure"
    del uploads[:]
    normclip.clip_(tensors[:1], 1.0)
    assert uploads == [3 + 2, 1]
    del uploads[:]
    for _ in range(3):
        normclip.dot(tensors, tensors)
    assert uploads == [2 * addresses], "pairs have the structure of either side"


def test_a_hundred_lists_in_turn_are_all_kept(place: Place, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "torch" in request.node.name:
        pytest.skip("plain torch has no tables")
    from normclip._backends import tables

    lists = [[place(torch.ones(3))] for _ in range(100)]
    for tensors in lists:
        normclip.total_norm(tensors)
    monkeypatch.setattr(tables, "upload", None)
    for tensors in lists:
        normclip.total_norm(tensors)


def test_memory_that_is_taken_again_is_read_as_what_it_is_now(place: Place) -> None:
    memory = place(torch.ones(4 * CHUNK))
    for size in (3, CHUNK + 1, 2 * CHUNK, 3):
        assert normclip.total_norm(memory[:size]).item() == pytest.approx(math.sqrt(size))
        halves = memory.view(torch.bfloat16)[:size]
        assert exact_norm([halves], 2.0) == pytest.approx(TensorList([halves.cpu()]).norm(2.0), rel=1e-12)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """CUDA as far as tables see it, without a device: the current stream, the events that it has waited for, and whether it captures."""
    from normclip._backends import tables

    class Stream:
        def __init__(self, number: int) -> None:
            self.cuda_stream, self.waited = number, []

        def wait_event(self, event: object) -> None:
            self.waited.append(event)

    class Numbers(np.ndarray):
        device = DEVICE  # NumPy's own arrays have one since version 2

        def record_stream(self, stream: Stream) -> None:
            pass

    class Event:
        def __init__(self, *, external: bool) -> None:
            assert external, "a capture cannot wait for any other"

        def record(self, stream: Stream) -> None:
            assert stream is seen.current

    seen = SimpleNamespace(current=Stream(0), capturing=False, Stream=Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: seen.current)
    monkeypatch.setattr(tables, "current_stream", lambda: seen.current.cuda_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(tables, "_EXTERNAL", {"external": True})
    monkeypatch.setattr(tables, "upload", lambda array, device: array.view(Numbers))
    monkeypatch.setattr(tables, "_captured", {})
    forget()
    yield seen
    forget()


DEVICE = torch.device("cuda", 0)


def layout(size: int, address: int = 16) -> bytes:
    return np.array([address, size, 2, 0]).tobytes()


def test_each_stream_waits_once_for_a_table(streams: SimpleNamespace) -> None:
    from normclip._backends.tables import Chunking, table_of

    both = [streams.current, streams.Stream(1)]
    tables = set()
    for stream in [*both, *both]:
        streams.current = stream
        tables.add(table_of(layout(1), DEVICE, Chunking()))
        (table,) = tables
        table.await_uploads()
    ready = [table.structure.uploaded._ready, table.addresses._ready]
    assert [stream.waited for stream in both] == [ready, ready]


def test_every_capture_waits_for_the_uploads_whatever_its_stream_has_seen(streams: SimpleNamespace) -> None:
    from normclip._backends.tables import Chunking, table_of

    known = table_of(layout(1), DEVICE, Chunking())
    known.await_uploads()
    streams.capturing = True
    for stream in (streams.Stream(2), streams.current, streams.current):
        streams.current, stream.waited = stream, []
        assert table_of(layout(1), DEVICE, Chunking()) is known
        known.await_uploads()
        assert stream.waited == [known.structure.uploaded._ready, known.addresses._ready]
    with pytest.raises(RuntimeError, match="make the same call once"):
        table_of(layout(2), DEVICE, Chunking())


def test_what_captures_keep_grows_with_new_memory_alone(streams: SimpleNamespace) -> None:
    from normclip._backends import tables

    def capture(bytes_: bytes) -> tables.Table:
        streams.capturing = False
        tables.table_of(bytes_, DEVICE, tables.Chunking())
        streams.capturing = True
        table = tables.table_of(bytes_, DEVICE, tables.Chunking())
        table.await_uploads()
        return table

    first = capture(layout(1))
    for _ in range(3):
        tables._latest.clear()
        tables._tables.cache_clear()  # as after many other lists
        assert capture(layout(1)) is first
    assert list(tables._captured.values()) == [first]
    moved = capture(layout(1, address=64))
    assert moved.structure is first.structure
    assert len(tables._captured) == 2
