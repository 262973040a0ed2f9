"""Programs of several processes that form a group on this machine: of gloo, or of another backend."""

import datetime
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


def run_ranks(script: Path, size: int, folder: Path, *, timeout: float = 240.0, **environment: str) -> list[dict[str, Any]]:
    """Run a script that calls `be_a_rank`, once for each rank. Gives what each scenario has returned on each rank, or its traceback."""
    usual = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    logs = [folder / f"log{rank}" for rank in range(size)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w", encoding="utf-8") as output:
            command = [sys.executable, str(script), str(rank), str(size), str(folder)]
            ranks.append(subprocess.Popen(command, env=os.environ | usual | environment, stdout=output, stderr=output))
    try:
        for process in ranks:
            process.wait(timeout)
    finally:
        for process in ranks:
            process.kill()
    output = "\n".join(log.read_text(encoding="utf-8") for log in logs)
    assert not any(process.returncode for process in ranks), output
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(size)]


def be_a_rank(scenarios: list[Callable[[int, int], Any]], dying: Callable[[int, int], Any] | None, backend: str = "gloo") -> None:
    """Join the group, run the scenarios in order up to the first that fails, then one, if given, that the last rank does not survive.

    With a backend that has NCCL each rank has a CUDA device of its own.
    """
    import torch
    import torch.distributed as dist

    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
    found: dict[str, Any] = {}

    def run(scenario: Callable[[int, int], Any]) -> None:
        try:
            found[scenario.__name__] = ("returned", scenario(rank, size))
        except BaseException:  # torch's CheckpointException is no Exception
            found[scenario.__name__] = ("raised", traceback.format_exc(limit=-3))
        (folder / f"result{rank}").write_bytes(pickle.dumps(found))

    for scenario in scenarios:
        run(scenario)
        if found[scenario.__name__][0] == "raised":
            os._exit(0)
    if dying is not None:
        run(dying)
    os._exit(0)  # the group is broken, and nothing is left to be ended in good order
