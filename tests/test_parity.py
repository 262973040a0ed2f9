"""The drop-ins beside `torch.nn.utils`: the same where torch is right, and each intended difference by itself."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.nn import Parameter, utils

import normclip

NAMES = ("clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "get_total_norm")
ORDERS = (0.5, 1.0, 2.0, 2.5, 3, math.inf, "inf", -1.0, -math.inf)

# float32: torch accumulates in float32 and rounds norm, norm + 1e-6 and coefficient to it, normclip rounds the coefficient alone. At the
# sizes here that leaves a few units of 6e-8. Of the smaller types torch rounds the norm and the coefficient, too: a few units of theirs.
# float64: what normclip promises.
RTOL = {
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.float32: 1e-6,
    torch.float64: 1e-12,
    torch.complex64: 1e-6,
    torch.complex128: 1e-12,
}
DTYPES = tuple(RTOL)


def gradients(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Gradients of several shapes, as of a small network, from a generator of their own."""
    generator = torch.Generator().manual_seed(7)
    # Small enough for the norm of order 0.5 to fit into float16.
    real = [
        0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((), (31,), (16, 20), (3, 4, 5), (0, 4), (1, 1))
    ]
    return [(torch.complex(value, value.flip(0) if value.ndim else -value) if dtype.is_complex else value).to(dtype) for value in real]


def parameters(grads: Iterable[torch.Tensor | None]) -> list[Parameter]:
    """Parameters with copies of these gradients, or without one."""
    made = []
    for grad in grads:
        parameter = Parameter(torch.zeros(2) if grad is None else torch.zeros(grad.shape, dtype=grad.dtype))
        parameter.grad = None if grad is None else grad.clone()
        made.append(parameter)
    return made


def assert_grads_close(ours: Iterable[Parameter], torchs: Iterable[Parameter], rtol: float | None = None, atol: float = 0.0) -> None:
    for our, their in zip(ours, torchs, strict=True):
        if their.grad is None:
            assert our.grad is None
        else:
            tolerance = RTOL[their.grad.dtype] if rtol is None else rtol
            torch.testing.assert_close(our.grad, their.grad, rtol=tolerance, atol=atol, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    ours, torchs = (inspect.signature(getattr(module, name)).parameters.values() for module in (normclip, utils))
    # A rule, by keyword, may stand in for the one argument that is else required. Groups of processes are passed by keyword too.
    ours = [p.replace(default=p.empty) if (name, p.name) == ("clip_grad_norm_", "max_norm") else p for p in ours]
    ours = [p for p in ours if p.name not in {"rule", "process_groups"}]
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in torchs]


# Empty gradients have no infinity norm in torch.
def without_empty(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    return [grad for grad in grads if grad.numel()]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_grad_norm(dtype: torch.dtype, order: Any, foreach: bool | None) -> None:
    grads = without_empty(gradients(dtype))
    ours, torchs = parameters(grads), parameters(grads)
    # Clips, whatever the order: of negative ones, norms are smaller than the smallest element.
    limit = 0.3 * float(utils.get_total_norm(grads, order))
    measured = normclip.clip_grad_norm_(ours, limit, order, foreach=foreach)
    expected = utils.clip_grad_norm_(torchs, limit, order, foreach=foreach)
    assert measured.item() == pytest.approx(expected.item(), rel=RTOL[dtype])
    assert (measured.shape, measured.device, measured.requires_grad) == (expected.shape, expected.device, expected.requires_grad)
    assert_grads_close(ours, torchs)
    assert not torch.equal(ours[1].grad, grads[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_clip(dtype: torch.dtype) -> None:
    ours, torchs = parameters(gradients(dtype)), parameters(gradients(dtype))
    for limit in (1e4, math.inf):
        assert normclip.clip_grad_norm_(ours, limit).item() == pytest.approx(utils.clip_grad_norm_(torchs, limit).item(), rel=RTOL[dtype])
        assert_grads_close(ours, torchs, rtol=0.0)
    assert {parameter.grad._version for parameter in ours} == {0}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_get_total_norm(dtype: torch.dtype, order: Any) -> None:
    grads = without_empty(gradients(dtype))
    for given in (grads, grads[2]):
        measured, expected = normclip.get_total_norm(given, order), utils.get_total_norm(given, order)
        assert measured.item() == pytest.approx(expected.item(), rel=RTOL[dtype])
    assert normclip.get_total_norm(iter(grads), order).item() == normclip.get_total_norm(grads, order).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [20.0, 0.1, 0.0, math.inf, math.nan])
def test_clip_grads_with_norm(dtype: torch.dtype, value: float) -> None:
    ours, torchs = parameters(gradients(dtype)), parameters(gradients(dtype))
    norm = torch.tensor(value, dtype=torch.float64)  # with a float32 one torch's coefficient is float32
    assert normclip.clip_grads_with_norm_(ours, 2.0, norm) is None
    utils.clip_grads_with_norm_(torchs, 2.0, norm)
    if dtype.is_complex and not math.isfinite(value):
        # torch multiplies by norm + 0i, which makes more NaN.
        assert torch.isnan(torch.view_as_real(ours[1].grad)).all() == math.isnan(value)
    else:
        assert_grads_close(ours, torchs)


def test_measure_then_clip_is_clip() -> None:
    two_steps, one_step = parameters(gradients(torch.float64)), parameters(gradients(torch.float64))
    normclip.clip_grads_with_norm_(two_steps, 1.5, normclip.get_total_norm([parameter.grad for parameter in two_steps]))
    normclip.clip_grad_norm_(one_step, 1.5)
    assert_grads_close(two_steps, one_step, rtol=0.0)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("limit", [0.5, 0, 100.0, math.inf])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if not dtype.is_complex])
def test_clip_grad_value(dtype: torch.dtype, limit: float, foreach: bool | None) -> None:
    grads = [*gradients(dtype), torch.tensor([math.nan, math.inf, -math.inf, -0.7], dtype=dtype)]
    ours, torchs = parameters(grads), parameters(grads)
    assert normclip.clip_grad_value_(ours, limit, foreach=foreach) is None
    utils.clip_grad_value_(torchs, limit, foreach=foreach)
    assert_grads_close(ours, torchs, rtol=0.0)


CLIPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "norm": (lambda p: normclip.clip_grad_norm_(p, 0.1), lambda p: utils.clip_grad_norm_(p, 0.1)),
    "norm given": (
        lambda p: normclip.clip_grads_with_norm_(p, 0.1, torch.tensor(7.0)),
        lambda p: utils.clip_grads_with_norm_(p, 0.1, torch.tensor(7.0)),
    ),
    "value": (lambda p: normclip.clip_grad_value_(p, 0.1), lambda p: utils.clip_grad_value_(p, 0.1)),
}


@pytest.mark.parametrize("clip", CLIPS)
def test_mixed_types_and_missing_gradients(clip: str) -> None:
    grads = [None, *gradients(torch.float32), None, *gradients(torch.float64), *gradients(torch.bfloat16), None]
    ours, torchs = parameters(grads), parameters(grads)
    results = [function(given) for function, given in zip(CLIPS[clip], (ours, torchs), strict=True)]
    assert_grads_close(ours, torchs, rtol=RTOL[torch.bfloat16])
    if clip == "norm":
        assert results[0].dtype is results[1].dtype is torch.float64


@pytest.mark.parametrize("clip", CLIPS)
def test_one_parameter_alone(clip: str) -> None:
    (ours,), (torchs,) = parameters([torch.tensor([[3.0, 4.0]])]), parameters([torch.tensor([[3.0, 4.0]])])
    for function, given in zip(CLIPS[clip], (ours, torchs), strict=True):
        function(given)
    assert_grads_close([ours], [torchs])
    assert ours.grad.max() < 0.2


@pytest.mark.parametrize(
    "collection", [iter, tuple, lambda given: (parameter for parameter in given), lambda given: dict(enumerate(given)).values()]
)
@pytest.mark.parametrize("clip", CLIPS)
def test_collections_of_parameters(clip: str, collection: Callable[[list[Parameter]], Any]) -> None:
    ours, torchs = parameters(gradients()), parameters(gradients())
    CLIPS[clip][0](collection(ours))
    CLIPS[clip][1](list(torchs))
    assert_grads_close(ours, torchs)


def test_a_model_in_training() -> None:
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = torch.randn(64, 4)
    for model, clip in zip(models, (normclip.clip_grad_norm_, utils.clip_grad_norm_), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            clip(model.parameters(), 0.5)
            optimizer.step()
    assert_grads_close(models[0].parameters(), models[1].parameters(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [[], [None, None], [torch.empty(0), torch.empty(0, 3)]])
def test_no_elements(given: list[torch.Tensor | None]) -> None:
    ours, torchs = parameters(given), parameters(given)
    assert torch.equal(normclip.clip_grad_norm_(ours, 1.0), utils.clip_grad_norm_(torchs, 1.0))
    normclip.clip_grads_with_norm_(ours, 1.0, torch.tensor(2.0))
    normclip.clip_grad_value_(ours, 1.0)
    tensors = [grad for grad in given if grad is not None]
    assert torch.equal(normclip.get_total_norm(tensors), utils.get_total_norm(tensors))


def test_empty_generator_is_warned_of() -> None:
    for clip in (normclip.clip_grad_norm_, utils.clip_grad_norm_):
        with pytest.warns(UserWarning, match="`parameters` is an empty generator, no gradient clipping will occur") as caught:
            norm = clip((parameter for parameter in []), 1.0)
        assert norm.item() == 0.0
        assert caught[0].filename == __file__, "it points to the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normclip.clip_grad_norm_([], 1.0)
        normclip.clip_grad_norm_(iter(()), 1.0)
        normclip.clip_grad_norm_((parameter for parameter in parameters([torch.ones(1)])), 1.0)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients_spread_as_in_torch(special: float, order: float) -> None:
    grads = [torch.tensor([1.0, special, -2.0]), torch.tensor([3.0])]
    ours, torchs = parameters(grads), parameters(grads)
    measured, expected = normclip.clip_grad_norm_(ours, 1.0, order), utils.clip_grad_norm_(torchs, 1.0, order)
    torch.testing.assert_close(measured, expected, equal_nan=True)
    assert_grads_close(ours, torchs, rtol=0.0)
    assert {torch.isfinite(parameter.grad).all().item() for parameter in ours} == ({False} if math.isnan(special) else {False, True})


@pytest.mark.parametrize("order", [1.0, 2.0, 2.5, math.inf])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nonfinite_norms_are_errors_where_asked(special: float, order: float) -> None:
    grads = [torch.tensor([3.0]), None, torch.tensor([1.0, special, special]), torch.tensor([-4.0])]
    torchs = parameters(grads)
    with pytest.raises(RuntimeError) as theirs:
        utils.clip_grad_norm_(torchs, 1.0, order, error_if_nonfinite=True)
    ours = parameters(grads)
    with pytest.raises(RuntimeError) as raised:
        normclip.clip_grad_norm_(ours, 1.0, order, error_if_nonfinite=True)
    assert str(raised.value).startswith(str(theirs.value)), "torch's message, and then more"
    counts = "(2 NaN, 0 inf)" if math.isnan(special) else "(0 NaN, 2 inf)"
    assert str(raised.value).endswith(f"Non-finite: parameters[2].grad {counts}")
    assert_grads_close(ours, parameters(grads), rtol=0.0)
    assert {parameter.grad._version for parameter in ours if parameter.grad is not None} == {0}
    with pytest.raises(RuntimeError, match=r"tensors\[1\]"):
        normclip.get_total_norm([grads[0], grads[2]], order, error_if_nonfinite=True)


def test_message_names_the_first_few_tensors() -> None:
    tensors = [torch.tensor([math.nan]) for _ in range(9)]
    with pytest.raises(RuntimeError, match=r"tensors\[4\] \(1 NaN, 0 inf\) and 4 more$"):
        normclip.get_total_norm(tensors, error_if_nonfinite=True)


def test_norm_that_overflows_by_itself_is_an_error_where_asked() -> None:
    with pytest.raises(RuntimeError, match="Non-finite: the norm itself"):
        normclip.get_total_norm([torch.full((4,), 1.7e308, dtype=torch.float64)], error_if_nonfinite=True)


def test_finite_norms_are_no_errors() -> None:
    ours = parameters(gradients())
    assert normclip.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True) > 1.0
    assert normclip.get_total_norm([parameter.grad for parameter in ours], error_if_nonfinite=True).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients(coalesced: bool) -> None:
    grad = torch.sparse_coo_tensor([[0, 3, 3]], torch.tensor([3.0, 4.0, 8.0]), (5,), check_invariants=True)
    grad = grad.coalesce() if coalesced else grad
    # Of torch's versions, not all take norms of sparse tensors.
    ours, torchs = parameters([grad, torch.ones(2)]), parameters([grad.to_dense(), torch.ones(2)])
    torch.testing.assert_close(normclip.clip_grad_norm_(ours, 1.0), utils.clip_grad_norm_(torchs, 1.0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ours[0].grad.to_dense(), torchs[0].grad, rtol=1e-6, atol=0.0)


# Intended differences. Each test says what torch does, so that it fails when torch comes round.


def test_order_zero_counts_elements_not_tensors() -> None:
    tensors = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3.0])]
    assert utils.get_total_norm(tensors, 0).item() == 2.0
    assert normclip.get_total_norm(tensors, 0).item() == 3.0


def test_duplicates_count_once() -> None:
    (ours,), (torchs,) = parameters([torch.tensor([3.0, 4.0])]), parameters([torch.tensor([3.0, 4.0])])
    assert utils.clip_grad_norm_([torchs, torchs], 1.0).item() == pytest.approx(math.sqrt(50.0))
    assert torchs.grad.norm().item() == pytest.approx(5.0 / 50.0), "scaled twice by 1/√50"
    assert normclip.clip_grad_norm_([ours, ours], 1.0).item() == 5.0
    assert ours.grad.norm().item() == pytest.approx(1.0)


def test_empty_tensors_have_infinity_norm_zero() -> None:
    tensors = [torch.empty(0), torch.tensor([-2.0])]
    with pytest.raises(RuntimeError, match="empty"):
        utils.get_total_norm(tensors, math.inf)
    assert normclip.get_total_norm(tensors, math.inf).item() == 2.0
    assert normclip.get_total_norm(tensors[:1], math.inf).item() == 0.0


def test_half_precision_norms_are_float32() -> None:
    tensor = torch.full((100,), 60_000.0, dtype=torch.float16)
    theirs, ours = utils.get_total_norm([tensor]), normclip.get_total_norm([tensor])
    assert (theirs.dtype, theirs.item()) == (torch.float16, math.inf)
    assert (ours.dtype, ours.item()) == (torch.float32, 600_000.0)


def test_large_finite_gradients_are_not_zeroed() -> None:
    grads = [torch.tensor([3e20, 4e20])]
    ours, torchs = parameters(grads), parameters(grads)
    assert utils.clip_grad_norm_(torchs, 1.0).item() == math.inf
    assert torch.equal(torchs[0].grad, torch.zeros(2))
    assert normclip.clip_grad_norm_(ours, 1.0).item() == pytest.approx(5e20)
    torch.testing.assert_close(ours[0].grad, torch.tensor([0.6, 0.8]))


def test_measuring_large_gradients_leaves_them_alone() -> None:
    for special in (3e20, math.inf):
        (ours,), (torchs,) = parameters([torch.tensor([special, 1.0])]), parameters([torch.tensor([special, 1.0])])
        utils.clip_grad_norm_([torchs], math.inf)
        assert torch.isnan(torchs.grad).any()
        normclip.clip_grad_norm_([ours], math.inf)
        assert torch.equal(ours.grad, torch.tensor([special, 1.0]))


def test_gradients_beyond_float32_norms_are_clipped() -> None:
    """The norm is returned as float32, where it is infinite, but clipping goes by the exact one."""
    (ours,) = parameters([torch.full((10_000,), 3e38)])
    assert normclip.clip_grad_norm_(ours, 1.0).item() == math.inf
    torch.testing.assert_close(ours.grad, torch.full((10_000,), 0.01))


@pytest.mark.parametrize("limit", [-1.0, math.nan, -math.inf])
def test_negative_and_nan_limits_are_errors(limit: float) -> None:
    ours, torchs = parameters([torch.tensor([3.0, 4.0])]), parameters([torch.tensor([3.0, 4.0])])
    utils.clip_grad_norm_(torchs, limit)
    assert not torch.equal(torchs[0].grad, torch.tensor([3.0, 4.0])), "flipped or destroyed"
    for clip in (normclip.clip_grad_norm_, normclip.clip_grad_value_):
        with pytest.raises(ValueError, match="not negative"):
            clip(ours, limit)
    with pytest.raises(ValueError, match="not negative"):
        normclip.clip_grads_with_norm_(ours, limit, torch.tensor(5.0))
    assert torch.equal(ours[0].grad, torch.tensor([3.0, 4.0]))


def test_value_clipping_passes_over_missing_gradients_only() -> None:
    """torch fails where no parameter has a gradient."""
    with pytest.raises(RuntimeError):
        utils.clip_grad_value_(parameters([None]), 1.0)
    normclip.clip_grad_value_(parameters([None]), 1.0)


@pytest.mark.parametrize("order", [1, 2])
def test_long_sums_keep_their_precision(order: int) -> None:
    tensor = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    exact = tensor.double().norm(order).item()
    in_double = normclip.get_total_norm([tensor, torch.empty(0, dtype=torch.float64)], order).item()
    assert abs(utils.get_total_norm([tensor], order).item() / exact - 1.0) > 1e-6
    assert abs(in_double / exact - 1.0) < 1e-12
    assert normclip.get_total_norm([tensor], order).item() == torch.tensor(exact, dtype=torch.float32).item()
