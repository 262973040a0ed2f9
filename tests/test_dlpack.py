"""How memory comes in: the C exchange API, versioned capsules, plain ones, and who keeps it alive."""

import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import normclip
from support.capsules import Producer
from support.oracle import assert_norm
from support.tensors import DTYPES, LAYOUTS, NUMPY_DTYPES, WRITABLE_LAYOUTS, Recipe, raw

C_API = "__dlpack_c_exchange_api__"
VERSIONED = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 1)
"""Whether NumPy's capsules say if they may be written."""

needs_versions = pytest.mark.skipif(not VERSIONED, reason="this NumPy's capsules do not say whether they may be written")


@pytest.fixture
def without_c_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it was before version 2.10."""
    if hasattr(torch.Tensor, C_API):
        monkeypatch.delattr(torch.Tensor, C_API)


@pytest.mark.skipif(not hasattr(torch.Tensor, C_API), reason="this torch has no C exchange API")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "reversed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_into_torch_tensors_agree(dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(dtype, 3000, layout, library="torch")
    results = []
    for available in (True, False):
        if not available:
            monkeypatch.delattr(torch.Tensor, C_API)
        tensor = recipe.make()
        results.append([normclip.total_norm(tensor, order).item() for order in (0.0, 1.0, 2.0, 2.5, -math.inf)])
        if layout in WRITABLE_LAYOUTS:
            normclip.scale_(tensor, 0.3)
            results[-1] += [raw(tensor), tensor._version]
    assert results[0] == results[1]


def test_c_exchange_api_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.Tensor, C_API):
        pytest.skip("this torch has no C exchange API")
    monkeypatch.delattr(torch.Tensor, "__dlpack__")
    assert normclip.get_total_norm([torch.tensor([3.0, 4.0])]).item() == 5.0
    monkeypatch.setattr(torch.Tensor, C_API, None)  # as producers may say that they have none
    with pytest.raises((TypeError, AttributeError), match="__dlpack__"):
        normclip.get_total_norm([torch.tensor([3.0, 4.0])])


@pytest.mark.parametrize("kind", ["leaf", "result", "parameter", "subclass"])
@pytest.mark.parametrize("c_api", [True, False])
def test_tensors_that_require_gradients(kind: str, c_api: bool, request: pytest.FixtureRequest) -> None:
    if not c_api:
        request.getfixturevalue("without_c_api")

    class Subclass(torch.Tensor):
        pass

    leaf = torch.tensor([3.0, 4.0], requires_grad=True)
    tensor = {"leaf": leaf, "result": leaf * 1.0, "parameter": torch.nn.Parameter(leaf.detach()), "subclass": leaf.as_subclass(Subclass)}[
        kind
    ]
    norm = normclip.clip_(tensor, 1.0)
    assert (norm.item(), type(norm), norm.requires_grad) == (5.0, torch.Tensor, False)
    assert tensor.tolist() == torch.tensor([0.6, 0.8]).tolist()
    assert tensor._version == 1
    assert tensor.requires_grad


def test_sparse_tensors_without_the_c_api(without_c_api: None) -> None:
    tensor = torch.sparse_coo_tensor([[0, 1, 1]], torch.tensor([3.0, 1.0, 3.0]), (4,), check_invariants=True)
    assert normclip.clip_(tensor, 1.0).item() == 5.0
    torch.testing.assert_close(tensor.to_dense(), torch.tensor([0.6, 0.8, 0.0, 0.0]))


class Relay:
    """Exports an array the way that a generation of producers did."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)


class Unversioned(Relay):
    """Before DLPack 1: the argument `max_version` is unknown, and nothing is said about writing."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("producer", [Relay, Unversioned])
def test_any_producer_is_read(producer: type[Relay], dtype: str) -> None:
    array = Recipe(dtype, 1000, "transposed").make()
    assert_norm(normclip.total_norm(producer(array)), [array])
    assert_norm(normclip.total_norm([producer(array), array]), [array])


@needs_versions
def test_versioned_producers_are_written() -> None:
    array = np.array([3.0, 4.0])
    assert normclip.clip_(Relay(array), 1.0) == 5.0
    np.testing.assert_allclose(array, [0.6, 0.8], rtol=1e-15)


@needs_versions
def test_read_only_flag() -> None:
    array = np.array([3.0, 4.0])
    array.flags.writeable = False
    with pytest.raises(ValueError, match=r"tensors\[1\] is read-only: pass a writable copy"):
        normclip.scale_([np.ones(1), Relay(array)], 0.5)
    assert normclip.clip_([Relay(array)], math.inf) == 5.0
    assert array.tolist() == [3.0, 4.0]


class OldArray(np.ndarray):
    """As arrays are before NumPy 2.1: they know no versions of DLPack, and export nothing that is read-only."""

    def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
        if not self.flags.writeable:
            raise BufferError("Cannot export readonly array since signalling readonly is unsupported by DLPack.")
        return np.asarray(self).__dlpack__()


def test_arrays_of_older_versions_of_numpy() -> None:
    array = np.array([3.0, 4.0]).view(OldArray)
    assert normclip.clip_([array], 1.0) == 5.0, "which it writes"
    array[:] = 3.0, 4.0
    array.flags.writeable = False
    matrix = np.arange(6.0).reshape(2, 3).view(OldArray)
    for given in (array, [array, array], np.broadcast_to(np.array(3.0).view(OldArray), (5, 5), subok=True), matrix.T[::-1, ::-1]):
        tensors = given if isinstance(given, list) else [given]
        for tensor in tensors:
            tensor.flags.writeable = False
        assert isinstance(tensors[0], OldArray)
        assert normclip.total_norm(given) == normclip.total_norm(np.asarray(tensors[0])), "the same memory counts once"
        assert normclip.clip_(given, math.inf) == normclip.total_norm(given)
        assert normclip.dot(given, given) == pytest.approx(normclip.total_norm(given) ** 2)
        with pytest.raises(ValueError, match=r"tensors\[0\] .* is read-only: pass a writable copy"):
            normclip.scale_(given, 0.5)
    assert array.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("without", ["C API", "nothing"])
def test_lazy_conjugates_of_any_torch(without: str, request: pytest.FixtureRequest) -> None:
    if without == "C API":
        request.getfixturevalue("without_c_api")
    base = torch.tensor([3.0 + 0.0j, 4.0j])
    tensors = [base.conj(), base.clone().requires_grad_().conj(), torch.ones(2, dtype=torch.complex64)]
    assert_norm(normclip.total_norm(tensors), [tensor.resolve_conj() for tensor in tensors])
    normclip.scale_(base.conj(), 0.5)
    assert torch.equal(base, torch.tensor([1.5 + 0.0j, 2.0j]))


def test_unversioned_producers_are_not_written() -> None:
    """They cannot say whether they may be."""
    array = np.array([3.0, 4.0])
    for change in (
        lambda given: normclip.scale_(given, 0.5),
        lambda given: normclip.clip_(given, 1.0),
        lambda given: normclip.clamp_(given, 1.0),
    ):
        with pytest.raises(ValueError, match=r"tensors\[0\] is read-only: pass a writable copy"):
            change([Unversioned(array)])
    assert array.tolist() == [3.0, 4.0]


FOUR = np.array([1.0, 3.0, 4.0, 1.0], np.float32)


@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
@pytest.mark.parametrize(
    "described",
    [
        {"shape": (2,), "byte_offset": 4},
        {"shape": (2,), "strides": (1,), "byte_offset": 4},
        {"shape": (2,), "strides": (-1,), "byte_offset": 8},
        {"shape": (2, 1), "strides": (1, 99), "byte_offset": 4},
        {"shape": (1,), "dtype": (5, 64, 1), "byte_offset": 4},
        {"shape": (2,), "byte_offset": 4, "device": (3, 0)},  # pinned
    ],
)
def test_what_capsules_describe(described: dict[str, Any], version: tuple[int, int] | None) -> None:
    producer = Producer(FOUR, version=version, **described)
    assert normclip.total_norm(producer) == 5.0
    assert producer.arguments == {"max_version": (1, 0)}
    if version is not None:
        normclip.scale_(producer, 1.0)
        assert producer.arguments == {"max_version": (1, 0), "copy": False}


def test_scalars_and_empty_tensors_of_other_producers() -> None:
    assert normclip.total_norm(Producer(FOUR, shape=(), byte_offset=8)) == 4.0
    # Empty tensors may come without memory.
    assert normclip.total_norm(Producer(FOUR, shape=(3, 0), data=False)) == 0.0
    with pytest.raises(ValueError, match=r"tensors\[0\] has elements but no memory"):
        normclip.total_norm(Producer(FOUR, shape=(3, 1), data=False))


@pytest.mark.parametrize(
    "dtype", [(2, 32, 4), (2, 8, 1), (2, 128, 1), (0, 32, 1), (1, 8, 1), (4, 32, 1), (5, 32, 1), (6, 8, 1), (10, 8, 1)], ids=str
)
def test_other_element_types_are_refused(dtype: tuple[int, int, int]) -> None:
    with pytest.raises(TypeError, match=r"tensors\[0\] has an element type that normclip does not read: cast it"):
        normclip.total_norm(Producer(FOUR, shape=(1,), dtype=dtype))


@pytest.mark.parametrize(
    "described",
    [
        {"ndim": -1},
        {"ndim": -(2**31)},
        {"null_shape": True},
        {"shape": (-1,)},
        {"shape": (0, -1)},
        {"shape": (-2, -2)},
        {"shape": (2,), "strides": (2**62,)},
        {"shape": (2,), "strides": (-(2**63),)},
        {"shape": (2, 2), "strides": (2**45, 2**45)},
        {"shape": (1,), "byte_offset": 2**64 - 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("version", [None, (1, 0)])
def test_shapes_that_no_tensor_has_are_refused(described: dict[str, Any], version: tuple[int, int] | None) -> None:
    producer = Producer(FOUR, version=version, **described)
    for call in (normclip.total_norm, lambda given: normclip.dot(given, given)):
        with pytest.raises(ValueError, match=r"has a shape or strides that no tensor in memory can have: pass a copy"):
            call(producer)


@pytest.mark.parametrize("shape", [(2**24, 2**24), (2**31, 2**31), (2**32, 2**32), (2**62, 4), (2**63 - 1,) * 3])
def test_more_elements_than_memory_holds_are_refused(shape: tuple[int, ...]) -> None:
    for call in (normclip.total_norm, lambda given: normclip.clip_(given, 1.0)):
        with pytest.raises(ValueError, match=r"tensors\[0\] .*has more elements than memory can hold \(expanded or broadcast\): pass what"):
            call(Producer(FOUR, shape=shape, strides=(0,) * len(shape)))


@pytest.mark.parametrize("shape", [(2**24, 2**24), (2**31, 2**31)])
def test_expanded_tensors_are_read_if_that_ends(shape: tuple[int, int]) -> None:
    one = torch.ones(1)
    assert normclip.total_norm(one.expand(1000, 1000)).item() == 1000.0
    for call in (normclip.total_norm, lambda given: normclip.clip_(given, 1.0)):
        with pytest.raises(ValueError, match=r"tensors\[0\] .*has more elements than memory can hold"):
            call(one.expand(shape))


def test_devices_in_capsules_are_believed_over_promises() -> None:
    class Liar(Producer):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(TypeError, match=r"tensors\[0\] is on device 2:1, .* normclip reads CPU memory: pass torch\.from_dlpack of it"):
        normclip.total_norm(Liar(FOUR, device=(2, 1)))


def test_other_major_versions_are_refused() -> None:
    with pytest.raises(BufferError, match=r"tensors\[0\] exports DLPack 2, and normclip reads DLPack 1"):
        normclip.total_norm(Producer(FOUR, version=(2, 0)))


def test_flags_other_than_read_only_and_copied_do_not_matter() -> None:
    array = np.array([3.0, 4.0], np.float32)
    normclip.scale_(Producer(array, flags=0b1100), 0.5)
    assert array.tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        normclip.scale_(Producer(array, flags=0b1101), 0.5)


def test_copies_are_read_and_not_written() -> None:
    array = np.array([3.0, 4.0], np.float32)
    for change in (lambda given: normclip.scale_(given, 0.5), lambda given: normclip.clip_(given, 1.0)):
        with pytest.raises(ValueError, match=r"tensors\[1\] exports a copy of its elements, .* pass what shares its memory"):
            change([array, Producer(array, flags=0b010)])
    assert array.tolist() == [3.0, 4.0]
    assert normclip.total_norm(Producer(array, flags=0b010)) == 5.0
    assert normclip.clip_(Producer(array, flags=0b010), math.inf) == 5.0


def test_producers_that_would_have_to_copy_are_read_and_not_written() -> None:
    class Copies(Relay):
        def __dlpack__(self, *, copy: bool | None = None, **arguments: Any) -> Any:
            if copy is False:
                raise BufferError("not without a copy")
            return self.array.copy().__dlpack__(**arguments)

    array = np.array([3.0, 4.0])
    assert normclip.total_norm(Copies(array)) == 5.0
    with pytest.raises(TypeError, match=r"tensors\[0\] gives no access to its memory \(not without a copy\)"):
        normclip.scale_(Copies(array), 0.5)


def test_jax_arrays_are_measured_and_not_written() -> None:
    numpy = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    array = numpy.array([3.0, 4.0])
    assert normclip.total_norm(array) == 5.0
    with pytest.raises(ValueError, match="read-only"):
        normclip.clip_(array, 1.0)


class Traced(np.ndarray):
    """An array that can be watched going away."""


def traced(value: float) -> np.ndarray:
    return np.full(1000, value).view(Traced)


def passed(kind: str, array: np.ndarray) -> Any:
    return {
        "array": lambda: array,
        "relay": lambda: Relay(array),
        "unversioned": lambda: Unversioned(array),
        "torch": lambda: torch.from_numpy(array),
    }[kind]()


@pytest.mark.parametrize("kind", ["array", "relay", "unversioned", "torch"])
def test_memory_goes_when_the_call_is_over(kind: str) -> None:
    array = traced(1.0)
    watch = weakref.ref(array)
    normclip.total_norm([passed(kind, array)])
    if kind != "unversioned" and (VERSIONED or kind != "relay"):
        normclip.clip_([passed(kind, array)], 1.0)
    with pytest.raises((TypeError, ValueError)):
        normclip.scale_([passed(kind, array), "no tensor"], 0.5)
    del array
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("c_api", [True, False])
@pytest.mark.parametrize("kind", ["array", "relay", "unversioned", "torch"])
def test_memory_stays_while_it_is_read(kind: str, c_api: bool, request: pytest.FixtureRequest) -> None:
    """A generator makes tensors that nobody else holds; freed ones would be overwritten by the next."""
    if not c_api:
        request.getfixturevalue("without_c_api")

    def made() -> Iterator[Any]:
        for value in range(100):
            yield passed(kind, traced(float(value)))

    assert float(normclip.total_norm(made(), 1)) == 1000.0 * sum(range(100))


class Maker(Relay):
    """Makes its memory when it is asked for it, so that the capsule alone keeps that."""

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.copy().__dlpack__(**arguments)


def test_memory_of_capsules_stays_while_it_is_read() -> None:
    makers = [Maker(np.full(1000, float(value))) for value in range(100)]
    assert normclip.total_norm(makers, 1) == 1000.0 * sum(range(100))


@pytest.mark.parametrize("c_api", [True, False])
def test_memory_of_parameters_stays_while_it_is_read(c_api: bool, request: pytest.FixtureRequest) -> None:
    if not c_api:
        request.getfixturevalue("without_c_api")

    class Fresh:
        """Every look at the gradient makes a new one."""

        @property
        def grad(self) -> torch.Tensor:
            return torch.ones(1000, requires_grad=True) * 1.0

    assert normclip.clip_grad_norm_([Fresh() for _ in range(90)], math.inf).item() == 300.0


def calls() -> dict[str, Callable[[list[Any]], object]]:
    return {
        "norm": normclip.total_norm,
        "clip": lambda tensors: normclip.clip_(tensors, 1.0),
        "scale": lambda tensors: normclip.scale_(tensors, 1.0 - 1e-7),
        "clamp": lambda tensors: normclip.clamp_(tensors, 0.5),
        "refuse": lambda tensors: refused([*tensors, np.ones(1, int)]),
    }


def refused(tensors: list[Any]) -> None:
    with pytest.raises(TypeError):
        normclip.total_norm(tensors)


@pytest.mark.parametrize("c_api", [True, False])
@pytest.mark.parametrize("call", calls())
def test_nothing_leaks(call: str, c_api: bool, request: pytest.FixtureRequest) -> None:
    if not c_api:
        request.getfixturevalue("without_c_api")
    sparse = torch.sparse_coo_tensor([[1]], torch.ones(1), (3,), check_invariants=True).coalesce()
    relay = Relay(np.ones(3))
    tensors = [np.ones(3), torch.ones(3), torch.ones(3, requires_grad=True), *([relay] if VERSIONED else []), sparse]
    watched = [*tensors, relay.array, torch.Tensor, np.ndarray, Relay]
    for _ in range(20):  # caches of all kinds fill
        calls()[call](tensors)
    grown = []
    for _ in range(3):  # what leaks does so each time; what else the process does meanwhile need not
        gc.collect()
        references, blocks = [sys.getrefcount(item) for item in watched], sys.getallocatedblocks()
        for _ in range(500):
            calls()[call](tensors)
        gc.collect()
        assert [sys.getrefcount(item) for item in watched] == references
        grown.append(sys.getallocatedblocks() - blocks)
    assert min(grown) < 250, "less than half a block each call"
