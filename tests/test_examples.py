"""The examples run as a user starts them, and print a line for each contender."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

NEEDS = {"ppo_cartpole": "stable_baselines3", "trainer": "transformers"}


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example_trains_alike_with_and_without(example: str) -> None:
    if example in NEEDS:
        pytest.importorskip(NEEDS[example])
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    ours = re.search(r"^ClippedAdamW +(\d+\.\d+) ", run.stdout, re.MULTILINE)
    theirs = re.search(r"^.*AdamW?(?: \(fused\)|\(fused=True\))? +(\d+\.\d+) ", run.stdout, re.MULTILINE)
    assert ours is not None, run.stdout
    assert theirs is not None, run.stdout
    if example != "ppo_cartpole":  # returns of single episodes differ from run to run
        assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=1e-2)
