"""All or nothing: whatever is wrong with one tensor or number, the error says where and what to do, and no other tensor has changed."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import normclip
from normclip.rules import Hard, Soft
from support.tensors import raw

# How to call each function with a list of tensors such that it would write. Parameters are all that has a `grad`.
IN_PLACE: dict[str, Callable[[Any], object]] = {
    "clip_": lambda tensors: normclip.clip_(tensors, 0.1),
    "scale_": lambda tensors: normclip.scale_(tensors, 0.1),
    "clamp_": lambda tensors: normclip.clamp_(tensors, 0.1),
}
PARAMETERS: dict[str, Callable[[Any], object]] = {
    "clip_grad_norm_": lambda parameters: normclip.clip_grad_norm_(parameters, 0.1),
    "clip_grads_with_norm_": lambda parameters: normclip.clip_grads_with_norm_(parameters, 0.1, torch.tensor(9.0)),
    "clip_grad_value_": lambda parameters: normclip.clip_grad_value_(parameters, 0.1),
}
READING: dict[str, Callable[[Any], object]] = {
    "total_norm": normclip.total_norm,
    "get_total_norm": normclip.get_total_norm,
    "clip_ with inf": lambda tensors: normclip.clip_(tensors, math.inf),
}


def with_grads(tensors: Sequence[Any]) -> list[SimpleNamespace]:
    return [SimpleNamespace(grad=tensor) for tensor in tensors]


def good() -> list[Any]:
    return [torch.tensor([3.0, -4.0]), np.array([5.0, math.nan, 2.0])]


def assert_refused(function: Callable[[list[Any]], object], bad: Sequence[Any], error: type[Exception], says: Sequence[str]) -> None:
    """Pass good tensors around the bad ones. The error is of this very type and says all of these; the good ones are as before."""
    first, last = good()
    before = raw(first), raw(last)
    with pytest.raises(error) as raised:
        function([first, *bad, last])
    assert raised.type is error
    for part in says:
        assert part in str(raised.value)
    assert (raw(first), raw(last)) == before
    assert first._version == 0


def read_only() -> np.ndarray:
    array = np.ones((2, 3))
    array.flags.writeable = False
    return array


class Wrapper(torch.Tensor):
    """A tensor subclass that has a shape, and nothing that torch can compute with."""

    @staticmethod
    def __new__(cls) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(function)


class OnCuda:
    """A foreign tensor on a GPU, whose memory nobody should ask for."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **arguments: Any) -> Any:
        raise AssertionError("asked for memory that the CPU cannot read")


def sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        return torch.eye(3).to_sparse_csr()


def sliding_windows() -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.ones(8), (3, 4), (16, 8))


# What is wrong, the type of error, and what its message says besides the tensor's name.
NO_TENSOR: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "number": (lambda: 1.5, TypeError, ["is a float", "pass torch tensors, NumPy arrays"]),
    "NumPy scalar": (lambda: np.float32(1.5), TypeError, ["is a float32", "pass torch tensors, NumPy arrays"]),
    "text": (lambda: "weight", TypeError, ["is a str", "pass torch tensors, NumPy arrays"]),
    "list": (lambda: [1.0], TypeError, ["is a list", "pass torch tensors, NumPy arrays"]),
}
UNREADABLE: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "NumPy integers": (lambda: np.ones((2, 3), np.int64), TypeError, ["(int64, shape [2, 3])", "cast it, for example to float32"]),
    "torch integers": (lambda: torch.ones(2, 3, dtype=torch.int32), TypeError, ["(torch.int32, shape [2, 3])", "cast it"]),
    "booleans": (lambda: torch.ones(3, dtype=torch.bool), TypeError, ["(torch.bool, shape [3])", "cast it"]),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), TypeError, ["(torch.float8_e4m3fn, shape [3])", "cast it"]),
    "objects": (lambda: np.array([1.0, None]), TypeError, ["(object, shape [2])", "pass a dense CPU tensor"]),
    "foreign byte order": (lambda: np.ones(3, ">f4"), TypeError, ["(>f4, shape [3])", "pass a dense CPU tensor", "copy"]),
    "field of records": (lambda: np.ones(3, "f4, i2")["f0"], TypeError, ["(float32, shape [3])", "pass a dense CPU tensor", "copy"]),
    "meta integers": (lambda: torch.ones(3, dtype=torch.int32, device="meta"), TypeError, ["(torch.int32, shape [3])", "cast it"]),
    "wrapper": (Wrapper, TypeError, ["(torch.float32, shape [3])", "pass a dense CPU tensor with data"]),
    "zero tensor": (lambda: torch._efficientzerotensor(3), ValueError, ["(torch.float32, shape [3])", "no memory", "materialize it first"]),
    "CUDA": (OnCuda, TypeError, ["is on device 2:0", "pass torch.from_dlpack of it"]),
    "sparse CSR": (sparse_csr, TypeError, ["(torch.float32, shape [3, 3])", "pass a dense CPU tensor"]),
}
UNWRITABLE: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "read-only": (read_only, ValueError, ["(float64, shape [2, 3]) is read-only", "pass a writable copy"]),
    "broadcast": (
        lambda: np.broadcast_to(np.ones(3), (2, 3)),
        ValueError,
        ["(float64, shape [2, 3]) is read-only", "pass a writable copy"],
    ),
    "expanded": (
        lambda: torch.ones(3).expand(2, 3),
        ValueError,
        ["(torch.float32, shape [2, 3])", "expanded", "pass a copy, such as .clone()"],
    ),
    "expanded without end": (lambda: torch.ones(1).expand(2**40), ValueError, ["expanded", "pass a copy, such as .clone()"]),
    "windows": (sliding_windows, ValueError, ["(float64, shape [3, 4])", "by several indices", "pass a copy"]),
    "torch windows": (
        lambda: torch.ones(8).unfold(0, 4, 2),
        ValueError,
        ["(torch.float32, shape [3, 4])", "by several indices", "pass a copy"],
    ),
}


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize("fault", NO_TENSOR | UNREADABLE | UNWRITABLE)
def test_faults_of_tensors(fault: str, function: str) -> None:
    make, error, says = (NO_TENSOR | UNREADABLE | UNWRITABLE)[fault]
    assert_refused(IN_PLACE[function], [make()], error, ["tensors[1] ", *says])


@pytest.mark.parametrize("function", PARAMETERS)
@pytest.mark.parametrize("fault", NO_TENSOR | UNREADABLE | UNWRITABLE)
def test_faults_of_gradients(fault: str, function: str) -> None:
    make, error, says = (NO_TENSOR | UNREADABLE | UNWRITABLE)[fault]
    # Names go by the place among the parameters, with and without gradients.
    assert_refused(lambda tensors: PARAMETERS[function](with_grads([None, *tensors])), [make()], error, ["parameters[2].grad ", *says])


@pytest.mark.parametrize("function", READING)
@pytest.mark.parametrize("fault", NO_TENSOR | UNREADABLE)
def test_faults_in_reading(fault: str, function: str) -> None:
    make, error, says = (NO_TENSOR | UNREADABLE)[fault]
    assert_refused(READING[function], [make()], error, ["tensors[1] ", *says])


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize("fault", NO_TENSOR | UNREADABLE | UNWRITABLE)
def test_faults_are_found_wherever_they_are(fault: str, function: str) -> None:
    make, error, _ = (NO_TENSOR | UNREADABLE | UNWRITABLE)[fault]
    tensors = [torch.full((2,), float(index)) for index in range(50)]
    before = [raw(tensor) for tensor in tensors]
    for place in (0, 50):
        with pytest.raises(error, match=re.escape(f"tensors[{place}] ")):
            IN_PLACE[function]([*tensors[:place], make(), *tensors[place:]])
    assert [raw(tensor) for tensor in tensors] == before


@pytest.mark.parametrize("function", IN_PLACE | PARAMETERS)
def test_partly_overlapping_tensors(function: str) -> None:
    base = torch.arange(8.0)
    parts = [base[:5], torch.ones(1), base[3:]]
    if function in IN_PLACE:
        assert_refused(
            IN_PLACE[function],
            parts,
            ValueError,
            ["tensors[3] (torch.float32, shape [5])", "tensors[1]", "pass tensors that do not overlap"],
        )
    else:
        says = ["parameters[3].grad (torch.float32, shape [5])", "parameters[1].grad", "pass tensors that do not overlap"]
        assert_refused(lambda tensors: PARAMETERS[function](with_grads(tensors)), parts, ValueError, says)
    assert torch.equal(base, torch.arange(8.0))


@pytest.mark.parametrize(
    "views",
    [
        lambda base: [base, base[:1]],
        lambda base: [base[::2], base[::3]],
        lambda base: [base.view(2, 6)[:, :4], base.view(2, 6)[:, 3:]],
        lambda base: [base, base.view(torch.float64)],
        lambda base: [base, base.view(torch.complex64)],
        lambda base: [base[1:], base.numpy()[:2]],
        lambda base: [base[-1:], base[4:6], base],
    ],
)
def test_ways_to_overlap(views: Callable[[torch.Tensor], list[Any]]) -> None:
    base = torch.arange(12.0)
    with pytest.raises(ValueError, match="do not overlap"):
        normclip.scale_(views(base), 0.5)
    assert torch.equal(base, torch.arange(12.0))
    # Reading needs no such care.
    assert float(normclip.total_norm(views(base), math.inf)) >= 1.0


def test_complex_tensors_are_not_clamped() -> None:
    tensor = torch.ones(2, dtype=torch.complex64)
    assert_refused(IN_PLACE["clamp_"], [tensor], TypeError, ["tensors[1] (torch.complex64, shape [2]) is complex", "view_as_real"])
    refuse = lambda tensors: PARAMETERS["clip_grad_value_"](with_grads(tensors))  # noqa: E731
    assert_refused(refuse, [tensor], TypeError, ["parameters[1].grad (torch.complex64, shape [2]) is complex", "view_as_real"])


def test_sparse_tensors_with_repeated_indices_are_not_clamped() -> None:
    tensor = torch.sparse_coo_tensor([[0, 0]], torch.ones(2), (3,), check_invariants=True)
    assert_refused(IN_PLACE["clamp_"], [tensor], ValueError, ["tensors[1] (torch.float32, shape [3]) is sparse", "coalesce() it first"])
    assert torch.equal(tensor.coalesce().values(), torch.tensor([2.0]))


@pytest.mark.parametrize("limit", [-1.0, -5e-324, math.nan, -math.inf, "-1", torch.tensor(-1.0)])
@pytest.mark.parametrize(
    "function",
    [
        lambda tensors, limit: normclip.clip_(tensors, limit),
        lambda tensors, limit: normclip.clip_(tensors, limit, math.inf),
        lambda tensors, limit: normclip.clamp_(tensors, limit),
        lambda tensors, limit: normclip.clip_grad_norm_(with_grads(tensors), limit),
        lambda tensors, limit: normclip.clip_grads_with_norm_(with_grads(tensors), limit, 5.0),
        lambda tensors, limit: normclip.clip_grad_value_(with_grads(tensors), limit),
    ],
)
def test_limits(function: Callable[[list[Any], Any], object], limit: Any) -> None:
    assert_refused(lambda tensors: function(tensors, limit), [], ValueError, [str(float(limit)), "pass a number that is not negative"])


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_factors(factor: float) -> None:
    assert_refused(lambda tensors: normclip.scale_(tensors, factor), [], ValueError, [f"factor is {factor}", "pass a finite number"])


@pytest.mark.parametrize("norm", [-1.0, torch.tensor(-0.5)])
def test_negative_norms(norm: Any) -> None:
    refuse = lambda tensors: normclip.clip_grads_with_norm_(with_grads(tensors), 0.1, norm)  # noqa: E731
    assert_refused(refuse, [], ValueError, ["total_norm is -", "not negative"])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda tensors: normclip.total_norm(tensors, math.nan), "ord"),
        (lambda tensors: normclip.get_total_norm(tensors, math.nan), "norm_type"),
        (lambda tensors: normclip.clip_(tensors, 0.1, math.nan), "ord"),
        (lambda tensors: normclip.clip_grad_norm_(with_grads(tensors), 0.1, math.nan), "norm_type"),
    ],
)
def test_orders(function: Callable[[list[Any]], object], name: str) -> None:
    assert_refused(function, [], ValueError, [f"{name} is NaN", "pass a number, inf or -inf"])


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (None, TypeError, "a NoneType"),
        (1j, TypeError, "a complex"),
        ("fro", ValueError, "'fro'"),
        ([1.0], TypeError, "a list"),
        (float, TypeError, "the class float"),
        (torch.ones(2), ValueError, "a Tensor of shape [2]"),
        (np.ones(2), TypeError, "a ndarray of shape [2]"),
        (10**400, ValueError, "too long"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("rule", lambda tensors, number: normclip.clip_(tensors, number)),
        ("ord", lambda tensors, number: normclip.clip_(tensors, 0.1, number)),
        ("ord", lambda tensors, number: normclip.total_norm(tensors, number)),
        ("norm_type", lambda tensors, number: normclip.get_total_norm(tensors, number)),
        ("factor", lambda tensors, number: normclip.scale_(tensors, number)),
        ("limit", lambda tensors, number: normclip.clamp_(tensors, number)),
        ("max_norm", lambda tensors, number: normclip.clip_grads_with_norm_(with_grads(tensors), number, 5.0)),
        ("total_norm", lambda tensors, number: normclip.clip_grads_with_norm_(with_grads(tensors), 0.1, number)),
        ("clip_value", lambda tensors, number: normclip.clip_grad_value_(with_grads(tensors), number)),
        ("norm_type", lambda tensors, number: normclip.clip_grad_norm_(with_grads(tensors), 0.1, number)),
        ("limits['rest']", lambda tensors, number: normclip.clip_grads_(with_grads(tensors), limits={"rest": number})),
        ("max_norm", lambda tensors, number: Hard(number)),
        ("max_norm", lambda tensors, number: Soft(number)),
    ],
)
def test_what_is_no_number(name: str, function: Callable[..., object], number: Any, error: type[Exception], says: str) -> None:
    assert_refused(lambda tensors: function(tensors, number), [], error, [f"{name} is {says}: pass a number"])


def test_swapped_arguments() -> None:
    assert_refused(lambda tensors: normclip.clip_grad_norm_(1.0, with_grads(tensors)), [], TypeError, ["max_norm is a list: pass a number"])
    assert_refused(lambda tensors: normclip.clip_(1.0, tensors), [], TypeError, ["rule is a list: pass a number"])


def test_classes_of_rules() -> None:
    for function in (
        lambda tensors: normclip.clip_(tensors, Soft),
        lambda tensors: normclip.clip_grad_norm_(with_grads(tensors), rule=Soft),
        lambda tensors: normclip.clip_grads_(with_grads(tensors), Soft),
    ):
        assert_refused(function, [], TypeError, ["rule is the class Soft: pass an object of it, Soft(...)"])


def test_one_element_is_a_number() -> None:
    tensor = torch.tensor([3.0, 4.0])
    assert normclip.clip_(tensor, torch.tensor([1.0]), torch.tensor(2)).item() == 5.0
    assert torch.equal(tensor, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), 5.0, None, object()])
def test_what_is_no_collection(given: Any) -> None:
    for function in (IN_PLACE | PARAMETERS | READING).values():
        with pytest.raises(
            TypeError, match=rf"(tensors|parameters) is a {type(given).__name__}: pass a tensor or an iterable .*model\.parameters\(\)"
        ):
            function(given)


@pytest.mark.parametrize(
    "given",
    [
        lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)),
        lambda: {"weight": torch.ones(2)},
        lambda: torch.nn.Linear(2, 2).named_parameters(),
        lambda: "weight",
    ],
)
@pytest.mark.parametrize("function", IN_PLACE | PARAMETERS | READING)
def test_collections_of_something_else(function: str, given: Callable[[], Any]) -> None:
    """Sequential models, state dicts and named parameters are iterable, too."""
    name, remedy = (
        (r"parameters\[0\]", r"pass model\.parameters\(\)")
        if function in PARAMETERS
        else (r"tensors\[0\]", "pass torch tensors, NumPy arrays")
    )
    with pytest.raises(TypeError, match=f"{name} is a .*{remedy}"):
        (IN_PLACE | PARAMETERS | READING)[function](given())


@pytest.mark.parametrize("function", PARAMETERS)
def test_arrays_are_no_parameters(function: str) -> None:
    with pytest.raises(TypeError, match=r"without \.grad: pass model\.parameters\(\)"):
        PARAMETERS[function]([np.ones(3)])


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_functional_transforms_are_refused(transform: Callable[..., Any]) -> None:
    """Inside `torch.func`, tensors are batches of others or record what happens to them."""
    with pytest.raises(TypeError, match=r"tensors\[0\] .*pass a dense CPU tensor with data"):
        transform(normclip.total_norm)(torch.ones(3, 1))


class Broken:
    """A producer that fails in one of the ways that producers do."""

    def __init__(self, device: Any = (1, 0), capsule: Any = None, error: Exception | None = None) -> None:
        self.device, self.capsule, self.error = device, capsule, error

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **arguments: Any) -> Any:
        if self.error:
            raise self.error
        return self.capsule


def consumed_capsule() -> Any:
    capsule = np.ones(3).__dlpack__()
    np.from_dlpack(Broken(capsule=capsule))  # takes the memory and renames the capsule
    return capsule


@pytest.mark.parametrize(
    "make",
    [
        lambda: Broken(error=BufferError("busy")),
        lambda: Broken(error=RuntimeError("busy")),
        lambda: Broken(capsule="no capsule"),
        lambda: Broken(capsule=consumed_capsule()),
        lambda: Broken(device="cpu"),
    ],
)
def test_broken_producers_are_named(make: Callable[[], Any]) -> None:
    first, _ = good()
    before = raw(first)
    with pytest.raises((TypeError, ValueError, BufferError), match=r"tensors\[1\]"):
        normclip.scale_([first, make()], 0.5)
    assert raw(first) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_errors_that_are_not_about_the_tensor_pass_through(error: Any) -> None:
    for function in (normclip.total_norm, lambda tensors: normclip.scale_(tensors, 0.5), lambda tensors: normclip.dot(tensors, tensors)):
        with pytest.raises(error) as raised:
            function([Broken(error=error())])
        assert raised.type is error


def test_the_iterator_s_own_error_passes_through() -> None:
    def failing() -> Any:
        yield np.ones(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        normclip.scale_(failing(), 0.5)
