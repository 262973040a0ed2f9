"""What is around an optimizer's step: hooks, the profiler's label, copies, memory, and what torch lets users do with its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from normclip.optim import ClippedAdamW, ClippedSGD
from normclip.rules import Hard
from support.optim import bits, by_dtype, parameters_of, run
from support.processes import output_of, run_python

MAKERS: dict[str, Any] = {
    "SGD": lambda parameters, **more: ClippedSGD(parameters, 0.1, 1.0, 0.9, **more),
    "AdamW": lambda parameters, **more: ClippedAdamW(parameters, 0.1, rule=1.0, **more),
}
by_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


@by_maker
def test_hooks(make: Any) -> None:
    optimizer, log = make(parameters_of(torch.float32)), []

    def hook(name: str) -> Any:
        return lambda who, args, kwargs: log.append((name, who is optimizer, args, kwargs, float(optimizer.last_norm or 0.0) > 0.0))

    handles = [
        register_optimizer_step_pre_hook(hook("all before")),
        optimizer.register_step_pre_hook(hook("before")),
        optimizer.register_step_post_hook(hook("after")),
        register_optimizer_step_post_hook(hook("all after")),
    ]
    try:
        run(optimizer, range(1))
        each = [("all before", False), ("before", False), ("after", True), ("all after", True)]
        assert log == [(name, True, (optimizer,), {}, stepped) for name, stepped in each]
        for handle, (name, _) in zip(handles, each, strict=True):
            handle.remove()
            log.clear()
            run(optimizer, range(1))
            assert name not in [said for said, *_ in log]
        assert log == []
    finally:
        for handle in handles:
            handle.remove()


@by_maker
def test_hooks_may_exchange_arguments(make: Any) -> None:
    optimizer = make(parameters_of(torch.float32))
    optimizer.register_step_pre_hook(lambda who, args, kwargs: (args, {"closure": lambda: 3.0}))
    run(optimizer, range(1))
    assert optimizer.step() == 3.0


@by_maker
def test_the_profiler_names_the_step(make: Any) -> None:
    optimizer = make(parameters_of(torch.float32))
    run(optimizer, range(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in [event.key for event in profiler.key_averages()]


WITHOUT = """
    import sys, types
    import pytest
    import torch

    class Without(types.ModuleType):
        def __getattribute__(self, name):
            if name == {name!r}:
                raise AttributeError(name)
            return super().__getattribute__(name)

    sys.modules[{module!r}].__class__ = Without
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {path!r}, "-k", "test_hooks or test_the_profiler"]))
"""


@pytest.mark.parametrize(
    ("module", "name"), [("torch._C._autograd", "_profiler_enabled"), ("torch.optim.optimizer", "_global_optimizer_post_hooks")]
)
def test_torch_may_lose_private_names(module: str, name: str) -> None:
    """The tests above pass in a torch that gives nobody this name."""
    run = run_python(WITHOUT.format(module=module, name=name, path=__file__))
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def by_names(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
    """The state with its parameters in the order of the optimizer's, as torch's documentation has it."""
    saved = {name: index for group in given["param_groups"] for name, index in zip(group["param_names"], group["params"], strict=True)}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    groups = [{**group, "param_names": names} for group in given["param_groups"]]
    return {**given, "param_groups": groups, "state": {index: given["state"][saved[name]] for index, name in enumerate(names)}}


@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_hooks_may_exchange_a_state_and_see_what_is_loaded(state_dtype: torch.dtype | None) -> None:
    def make(names: str) -> tuple[dict[str, nn.Parameter], ClippedAdamW]:
        named = {name: nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for name in names}
        return named, ClippedAdamW(named.items(), rule=1.0, state_dtype=state_dtype)

    (saved, through), (loaded, resumed) = make("xy"), make("yx")
    for size, parameter in enumerate(saved.values(), start=1):
        parameter.grad = torch.full_like(parameter, size)
    through.step()
    seen = []
    resumed.register_load_state_dict_pre_hook(by_names)
    resumed.register_load_state_dict_post_hook(lambda optimizer: seen.extend(state["exp_avg"] for state in optimizer.state.values()))
    resumed.load_state_dict(through.state_dict())
    for name in "xy":
        assert torch.equal(resumed.state[loaded[name]]["exp_avg"], through.state[saved[name]]["exp_avg"])
    assert [state.dtype for state in seen] == [state_dtype or torch.bfloat16] * 2
    resumed.load_state_dict(resumed.state_dict())  # its hooks are still those two, once each
    assert len(seen) == 4


@by_maker
def test_copies_have_the_same_attributes(make: Any) -> None:
    optimizer = make(parameters_of(torch.float32))
    for step in range(2):
        ours, copied = ({name for name in vars(each) if not name.startswith("_")} for each in (optimizer, copy.deepcopy(optimizer)))
        assert ours == copied
        run(optimizer, range(step, step + 1))


@by_maker
def test_lazy_modules(make: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    optimizer = make(model.parameters())
    optimizer.step()
    model(torch.ones(1, 3)).sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert not any(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


@by_maker
def test_what_is_no_parameter_group(make: Any) -> None:
    with pytest.raises(TypeError, match="param_group must be a dict"):
        make([{"params": parameters_of(torch.float32)}, torch.zeros(1)])


@by_maker
def test_a_number_may_replace_the_rule(make: Any) -> None:
    numbered, ruled = make(parameters_of(torch.float32)), make(parameters_of(torch.float32))
    numbered.rule, ruled.rule = 0.5, Hard(0.5)
    for optimizer in (numbered, ruled):
        run(optimizer, range(2))
    assert bits(numbered) == bits(ruled)
    numbered.rule = -0.5
    with pytest.raises(ValueError, match=r"rule is -0\.5"):
        numbered.step()
    assert bits(numbered) == bits(ruled)


@by_maker
def test_the_default_device_is_for_other_tensors(make: Any) -> None:
    elsewhere, here = make(parameters_of(torch.float32)), make(parameters_of(torch.float32))
    run(here, range(1))
    for parameter, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in (elsewhere, here)), strict=True):
        parameter.grad = other.grad
    with torch.device("meta"):
        elsewhere.step()
    assert bits(elsewhere) == bits(here)


@by_maker
@by_dtype
def test_a_limit_that_is_not_reached_changes_no_bit(make: Any, dtype: torch.dtype) -> None:
    """The step is taken in two halves then."""
    for layout in ("contiguous", "strided"):
        limited, free = make(parameters_of(dtype, layout), descent_limit=1e30), make(parameters_of(dtype, layout))
        for optimizer in (limited, free):
            run(optimizer, range(3))
        assert bits(limited) == bits(free)
        assert limited.last_descent > 0.0


STEP = """
    import torch
    from normclip.optim import ClippedAdamW, ClippedSGD

    def resident(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1000

    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in [(4_000_000,), (2000, 1000), *[(100,)] * 1000]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = {make}
    for _ in range(2):
        optimizer.step()  # makes the states, and what is kept from step to step
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = resident("VmRSS")
    optimizer.step()
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of memory")
@pytest.mark.parametrize(
    "make",
    [
        "ClippedSGD(parameters, 0.1, 1.0, 0.9)",
        "ClippedAdamW(parameters, rule=1.0)",
        "ClippedAdamW(parameters, rule=1.0, descent_limit=1.0, update_rms_limit=1.0)",
    ],
)
def test_a_step_takes_a_few_megabytes(make: str) -> None:
    """Where parameters, gradients and states take 24 each."""
    assert float(output_of(STEP.format(make=make))) <= 4.0
