"""The public functions on device tensors: on CUDA where there is some, else on CPU tensors by Triton's interpreter.

Triton decides when it is imported whether it interprets, so without CUDA these tests run in a process of their own; `test_interpreter.py`
starts it. There CPU tensors pass for those of a device, with small chunks, so that few elements make many.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from normclip._backends.choose import serving
from normclip._backends.protocol import USUAL, Served

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

CHUNK = 128 if INTERPRETED else 1 << 15


def _on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda or tensor.is_sparse or tensor.is_conj():
        return tensor.cuda()
    # With all the memory that it is a part of, so that gaps and distances from the borders of vectors stay.
    memory = tensor.detach().new_empty(0).set_(tensor.untyped_storage()).cuda()
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.fixture(params=["triton", "torch"])
def place(request: pytest.FixtureRequest) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Moves a tensor to the device under test; strides stay. "pairs" is Triton's kernels as they are where float64 is slow."""
    kinds = () if request.param == "torch" else (1,) if INTERPRETED else USUAL.triton
    tuning = None
    if kinds:
        from normclip._backends.cuda import Tuning
        from normclip._backends.tables import Chunking

        sizes = {"chunking": Chunking(chunk=CHUNK), "tile": 128, "unroll": 2, "lanes": 8, "short": 2} if INTERPRETED else {}
        tuning = Tuning(in_pairs=request.param == "pairs", **sizes)
    with serving(Served(rust=() if INTERPRETED else USUAL.rust, triton=kinds, tuning=tuning)):
        yield (lambda tensor: tensor) if INTERPRETED else _on_cuda
