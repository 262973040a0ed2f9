"""Device tensors that are changed in place, against the Rust backend."""

import math

import pytest
import torch
from torch import Tensor

import normclip
from normclip import _backends
from normclip._backends.choose import serving
from normclip._backends.protocol import USUAL
from normclip._core import TensorList
from normclip.optim import ClippedSGD

from .conftest import CHUNK, INTERPRETED
from .tensors import DTYPES, SIZES, Place, assert_same, by_dtype, exact_norm, layouts, make

# The interpreter computes in NumPy, which warns of overflow, where a device has none.
# That of Triton 3.6 makes numbers of arrays, of which NumPy warns before 2.4 refuses it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


# ---- Layouts ----


@pytest.mark.parametrize("layout", layouts())
def test_any_layout_is_read_and_written(place: Place, layout: str) -> None:
    expected, tensor = layouts()[layout], place(layouts()[layout])
    for order in (2.0, 1.0, math.inf):
        assert exact_norm([tensor], order) == pytest.approx(TensorList([expected]).norm(order), rel=1e-12)
    assert normclip.stats(tensor).l1 == pytest.approx(TensorList([expected]).norm(1.0), rel=1e-12)
    normclip.scale_(tensor, 0.3)
    TensorList([expected], writable=True).scale_(0.3)
    assert_same([tensor], [expected])


def test_the_same_memory_counts_once(place: Place) -> None:
    one, columns = place(torch.full((4,), 2.0)), place(torch.ones(4, 6))[:, 1:3]
    assert normclip.total_norm([one, one, columns, columns]).item() == pytest.approx(math.sqrt(24.0))
    assert normclip.stats([one, one], per_tensor=True).per_tensor.l1.tolist() == [8.0, 8.0]
    normclip.scale_([one, one, columns, columns], 0.5)
    assert (one.tolist(), columns.unique().tolist()) == ([1.0] * 4, [0.5])


def test_what_cannot_be_written_is_refused_before_anything_is(place: Place) -> None:
    good, memory = place(torch.ones(3)), place(torch.ones(8))
    with pytest.raises(ValueError, match=r"tensors\[1\] .*expanded"):
        normclip.scale_([good, memory[:1].expand(3)], 0.5)
    with pytest.raises(ValueError, match=r"tensors\[2\] .* shares part of its memory with tensors\[1\]"):
        normclip.clip_([good, memory[:5], memory[4:]], 0.1)
    with pytest.raises(TypeError, match=r"tensors\[1\] .* is complex"):
        normclip.clamp_([good, place(torch.ones(2, dtype=torch.complex64))], 0.5)
    assert good.tolist() == [1.0] * 3
    assert memory.tolist() == [1.0] * 8


def test_sparse_tensors_count_by_their_sums(place: Place) -> None:
    sparse = place(torch.sparse_coo_tensor([[0, 2, 2]], [3.0, 1.0, 3.0], (4,), check_invariants=True))
    assert normclip.total_norm(sparse).item() == 5.0
    normclip.scale_(sparse, 0.5)
    assert sparse.to_dense().tolist() == [1.5, 0.0, 2.0, 0.0]


# ---- Changing ----


@by_dtype
@pytest.mark.parametrize("limit", [1.0, 1e-3, 0.0, 1e9])
def test_clipping_gives_the_bits_of_the_cpu(place: Place, dtype: torch.dtype, limit: float) -> None:
    tensors = [make(dtype, size) for size in SIZES]
    placed = [place(tensor.clone()) for tensor in tensors]
    norm = exact_norm(placed, 2.0)
    assert normclip.clip_(placed, limit).item() == pytest.approx(norm, rel=1e-7)
    TensorList(tensors, writable=True).clip_(limit, norm, 0.0)
    assert_same(placed, tensors)


@pytest.mark.parametrize("factor", [0.3, -2.0, 1e-42, 1e39, 0.0])
def test_scaling_gives_the_bits_of_the_cpu(place: Place, factor: float, request: pytest.FixtureRequest) -> None:
    if factor in (1e-42, 1e39) and "torch" in request.node.name:
        pytest.skip("plain torch multiplies in float32")
    tensors = [make(dtype, CHUNK + 3) for dtype in DTYPES if not (INTERPRETED and dtype == torch.bfloat16 and factor == 1e-42)]
    placed = [place(tensor.clone()) for tensor in tensors]
    normclip.scale_(placed, factor)
    TensorList(tensors, writable=True).scale_(factor)
    assert_same(placed, tensors)


@pytest.mark.parametrize("factor", [0.3, -2.0, 0.0, 1.0, math.nan, math.inf])
def test_a_factor_may_be_on_the_device(place: Place, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [make(dtype, size) for dtype in DTYPES for size in (CHUNK + 3, 0, 5)]
    placed = [place(tensor.clone()) for tensor in tensors]
    number = place(torch.tensor(factor, dtype=torch.float64))
    with monkeypatch.context() as patch:
        for read in ("item", "tolist", "__float__", "__bool__"):
            patch.setattr(Tensor, read, lambda tensor: pytest.fail("the host has asked for the factor"))
        _backends.collect(placed, writable=True).scale_(number)
    TensorList(tensors, writable=True).scale_(number)
    assert_same(placed, tensors)


def test_a_factor_of_1_on_the_device_writes_nothing(place: Place, request: pytest.FixtureRequest) -> None:
    if "torch" in request.node.name:
        pytest.skip("plain torch multiplies by 1")
    # A signalling NaN would become a quiet one.
    bits = torch.tensor([0x7F800001, 0x3F800000], dtype=torch.int32)
    tensor = place(bits.view(torch.float32).clone())
    _backends.collect([tensor], writable=True).scale_(place(torch.ones((), dtype=torch.float64)))
    assert torch.equal(tensor.view(torch.int32).cpu(), bits)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clip_grad_norm(place: Place, norm_type: float) -> None:
    grads = [make(torch.float32, CHUNK + 3), make(torch.bfloat16, 7)]
    parameters = [torch.nn.Parameter(place(torch.zeros_like(grad))) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = place(grad.clone())
    expected = TensorList(grads).norm(norm_type)
    norm = normclip.clip_grad_norm_((parameter for parameter in parameters), 0.5, norm_type)
    assert norm.item() == pytest.approx(expected)
    TensorList(grads, writable=True).scale_(0.5 / (expected + 1e-6))
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), grad)


def test_a_known_norm_may_be_on_the_device(place: Place) -> None:
    parameter = torch.nn.Parameter(place(torch.zeros(2)))
    parameter.grad = place(torch.tensor([3.0, 4.0]))
    normclip.clip_grads_with_norm_(parameter, 1.0, normclip.get_total_norm([parameter.grad]))
    torch.testing.assert_close(parameter.grad.cpu(), torch.tensor([0.6, 0.8]))
    normclip.clip_grads_with_norm_(parameter, 0.5, 1.0)
    torch.testing.assert_close(parameter.grad.cpu(), torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_norms_that_are_not_finite_spread_as_in_torch(place: Place, special: float) -> None:
    tensor = place(torch.tensor([1.0, special]))
    normclip.clip_(tensor, 1.0)
    assert [math.isnan(x) for x in tensor.tolist()] == ([True, True] if math.isnan(special) else [False, True])


def test_versions_count_what_may_have_been_written(place: Place) -> None:
    tensor = place(torch.ones(3))
    version = tensor._version
    normclip.clip_(tensor, math.inf)
    normclip.scale_(tensor, 1.0)
    assert tensor._version == version
    normclip.clip_(tensor, 1e9)
    assert tensor._version > version


@by_dtype
def test_clamping(place: Place, dtype: torch.dtype) -> None:
    tensor = make(dtype, CHUNK + 9)
    tensor[3], tensor[5], tensor[CHUNK] = math.nan, -math.inf, -0.0
    placed = place(tensor.clone())
    normclip.clamp_(placed, 0.3)
    TensorList([tensor], writable=True).clamp_(0.3)
    assert_same([placed], [tensor])


def test_an_error_names_what_is_not_finite(place: Place) -> None:
    parameters = [torch.nn.Parameter(place(torch.zeros(3))) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = place(torch.ones(3)), place(torch.tensor([1.0, math.nan, math.inf]))
    with pytest.raises(RuntimeError, match=r"(parameters\[2\]\.grad|tensors\[1\]) \(1 NaN, 1 inf\)"):
        normclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert parameters[0].grad.tolist() == [1.0] * 3


# ---- Steps ----


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_an_optimizer(place: Place, momentum: float) -> None:
    def stepped(at: Place) -> ClippedSGD:
        parameters = [torch.nn.Parameter(at(make(dtype, CHUNK + 37, 9))) for dtype in (torch.float32, torch.float64)]
        optimizer = ClippedSGD(parameters, 0.1, 1.0, momentum=momentum, weight_decay=0.01)
        for step in range(3):
            for parameter in parameters:
                parameter.grad = at(make(parameter.dtype, CHUNK + 37, step))
            optimizer.step()
        return optimizer

    found = stepped(place)
    assert isinstance(found.last_norm, Tensor)
    assert isinstance(found.last_coefficient, Tensor)
    assert found.last_norm.device == found.param_groups[0]["params"][0].device
    with serving(USUAL):
        expected = stepped(lambda tensor: tensor)
    for x, y in zip(found.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(x.detach().cpu(), y.detach())
    assert float(found.last_norm) == pytest.approx(expected.last_norm, rel=1e-12)
