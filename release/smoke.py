"""Install a wheel or a source distribution where nothing else is, and use it. `python release/smoke.py FILE [--without-torch]`.

First beside NumPy alone, then with torch in the same environment; for platforms that torch has no wheels for, the second part is left out.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

NUMPY = """
import sys
import numpy as np
import normclip

assert "site-packages" in normclip.__file__, normclip.__file__
gradients = [np.full((3, 5), 3.0, np.float32), np.full(7, -4.0), np.zeros(0, np.float16)]
exact = (15 * 9.0 + 7 * 16.0) ** 0.5
assert abs(normclip.total_norm(gradients) - exact) < 1e-12 * exact
assert normclip.total_norm(gradients, ord=1) == 73.0
assert normclip.total_norm(np.full(4, 1e200)) == 2e200
assert normclip.stats(gradients).linf == 4.0
assert abs(normclip.clip_(gradients, 1.0) - exact) < 1e-12 * exact
assert abs(normclip.total_norm(gradients) - 1.0) < 1e-7

many = np.linspace(-1.0, 1.0, 3_000_001)
norms = set()
for threads in (1, 2, 4):
    normclip.set_num_threads(threads)
    norms.add(normclip.total_norm(many))
assert len(norms) == 1, norms
try:
    normclip.clip_(many, float("nan"))
except ValueError:
    pass
else:
    raise AssertionError("a limit of NaN was taken")
assert "torch" not in sys.modules
print("normclip", normclip.__version__, "with NumPy", np.__version__)
"""

TORCH = """
import torch
import normclip

def model():
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 8)).double()
    made(torch.ones(4, 64, dtype=torch.float64)).square().sum().backward()
    return list(made.parameters())

ours, theirs = model(), model()
norms = normclip.clip_grad_norm_(ours, 0.5), torch.nn.utils.clip_grad_norm_(theirs, 0.5)
torch.testing.assert_close(*norms, rtol=1e-12, atol=0.0)
for one, other in zip(ours, theirs):
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0.0)
with normclip.patch_torch():
    assert torch.nn.utils.clip_grad_norm_.__module__ == "normclip.patch"
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(ours, 1.0), torch.tensor(0.5).double(), rtol=1e-5, atol=0.0)
assert torch.nn.utils.clip_grad_norm_.__module__ == "torch.nn.utils.clip_grad"
print("normclip", normclip.__version__, "with torch", torch.__version__)
"""


def run(python: Path, *arguments: str) -> None:
    """Run Python in the environment, far from the sources."""
    subprocess.run([python, "-I", *arguments], cwd=python.parent, check=True)


def install(python: Path, *requirements: str) -> None:
    """Have pip install these in the environment."""
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)


def smoke(distribution: Path, *, torch: bool = True) -> None:
    """Install a distribution into an environment of its own, use it, and remove the environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        install(python, str(distribution.resolve()))
        run(python, "-c", NUMPY)
        if torch:
            install(python, "torch")
            run(python, "-c", TORCH)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("distribution", type=Path)
    parser.add_argument("--without-torch", action="store_true", help="for platforms that torch has no wheels for")
    arguments = parser.parse_args()
    smoke(arguments.distribution, torch=not arguments.without_torch)
