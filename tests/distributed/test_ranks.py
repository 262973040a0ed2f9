"""Groups of 2 and 4 processes: sharded models against whole ones, and what happens when one rank has trouble.

Once on the CPU, and once with the kernels of CUDA devices, interpreted.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.interpreter import need_interpreter
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")

SCRIPT = Path(__file__).parent / "scenarios.py"
NAMES = (
    "fsdp",
    "hsdp",
    "fsdp_bfloat16",
    "cpu_offload",
    "tensor_parallel",
    "sequence_parallel",
    "fsdp_and_tensor_parallel",
    "mesh_by_dimensions",
    "ddp",
    "pipeline",
    "one_collective",
    "plain_tensors",
    "beside_plain_tensors",
    "nonfinite_on_one_rank",
    "error_on_one_rank",
    "no_gradients_on_one_rank",
    "thresholds",
    "groups_without_gradients",
    "monitored",
    "monitored_error",
    "steps_of_shards",
    "steps_take_one_collective",
    "limits_of_replicas",
    "limits_that_fail_on_one_rank",
    "steps_that_fail_on_one_rank",
    "steps_without_gradients_on_one_rank",
    "checkpoints_of_shards",
    "late_rank",
    "killed_rank",
)

DEVICE_SCRIPT = Path(__file__).parent / "device_scenarios.py"
DEVICE_NAMES = (
    "fsdp",
    "hsdp",
    "tensor_parallel_beside_replicas",
    "two_meshes",
    "mesh_by_dimensions",
    "partial_sums",
    "types",
    "within_the_limit",
    "one_collective",
    "hosts_and_devices_merge_together",
    "nothing_to_clip",
    "nonfinite_on_one_rank",
    "errors_where_the_host_waits",
    "errors_where_nothing_waits",
    "steps_of_shards",
    "scaled_steps",
    "steps_take_one_collective",
    "steps_that_fail_where_the_host_waits",
    "steps_that_fail_where_nothing_waits",
)


@pytest.fixture(scope="session")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each of so many ranks has found. All scenarios are run at once, as starting processes takes longer than they do."""
    return functools.cache(lambda size: run_ranks(SCRIPT, size, tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="session")
def device_outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """The same of the kernels of devices."""
    need_interpreter()

    def run(size: int) -> list[dict[str, Any]]:
        return run_ranks(DEVICE_SCRIPT, size, tmp_path_factory.mktemp("device_ranks"), timeout=600.0, TRITON_INTERPRET="1")

    return functools.cache(run)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_scenario(name: str, size: int, outcomes_of: Callable[[int], list[dict[str, Any]]]) -> None:
    check(name, outcomes_of(size))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", DEVICE_NAMES)
def test_device_scenario(name: str, size: int, device_outcomes_of: Callable[[int], list[dict[str, Any]]]) -> None:
    check(name, device_outcomes_of(size))


def check(name: str, found: list[dict[str, Any]]) -> None:
    outcomes = [each.get(name, ("missing", "an earlier scenario has failed")) for each in found]
    assert all(kind == "returned" for kind, _ in outcomes), "\n".join(str(value) for kind, value in outcomes if kind != "returned")
    assert all(repr(value) == repr(outcomes[0][1]) for _, value in outcomes)


def test_no_scenario_is_forgotten(outcomes_of: Callable[[int], list[dict[str, Any]]]) -> None:
    assert set(outcomes_of(2)[0]) <= set(NAMES)


def test_no_device_scenario_is_forgotten(device_outcomes_of: Callable[[int], list[dict[str, Any]]]) -> None:
    assert set(device_outcomes_of(2)[0]) <= set(DEVICE_NAMES)
