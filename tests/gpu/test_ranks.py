"""Clipping and steps under FSDP2 on CUDA devices, also with gradients offloaded to the CPU, over NCCL alone and beside gloo; and errors."""

from pathlib import Path

import pytest
import torch

from support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not torch.distributed.is_nccl_available(), reason="needs a CUDA device and NCCL"),
]

SCRIPT = Path(__file__).parent / "scenarios.py"


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_clipping_and_steps_under_fsdp(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMCLIP_TEST_BACKEND", backend)
    # One device makes a group of one rank, which sends nothing: the collectives need two.
    outcomes = run_ranks(SCRIPT, min(2, torch.cuda.device_count()), tmp_path)
    for found in outcomes:
        assert set(found) == {
            "on_devices",
            "offloaded",
            "torch_on_offloaded",
            "steps",
            "hosts_and_devices_merge_together",
            "error_on_one_rank",
        }
        assert all(kind == "returned" for kind, _ in found.values()), "\n".join(str(value) for _, value in found.values())
        assert found == outcomes[0]
