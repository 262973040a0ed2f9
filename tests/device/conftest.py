"""The public functions on device tensors: on CUDA where there is some, else on CPU tensors by Triton's interpreter.

Triton decides when it is imported whether it interprets, so without CUDA these tests run in a process of their own; `test_interpreter.py`
starts it. There CPU tensors pass for those of a device, with small chunks, so that few elements make many.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from normclip import _backend, _core

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

CHUNK = 128 if INTERPRETED else 1 << 15


def _not_on_cpu(*args: Any, **options: Any) -> NoReturn:
    raise _core.NotOnCPU("it passes for a tensor on a device")


@pytest.fixture(params=["triton", "torch"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """Moves a tensor to the device under test; strides stay."""
    from normclip import _cuda, _devices

    kinds = (1,) if INTERPRETED else (2, 10, 13)
    monkeypatch.setattr(_devices, "_CUDA", kinds if request.param == "triton" else ())
    if not INTERPRETED:
        return lambda tensor: tensor if tensor.is_cuda else tensor.cuda()
    monkeypatch.setattr(_devices, "_HOST", ())
    monkeypatch.setattr(_cuda, "TUNING", _cuda.Tuning(chunk=CHUNK, tile=128, unroll=2, lanes=8, short=2))
    monkeypatch.setattr(_backend, "TensorList", _Refusing)
    monkeypatch.setattr(_backend, "_core", SimpleNamespace(dot=_not_on_cpu))
    return lambda tensor: tensor


class _Refusing:
    """Stands for a `TensorList` that finds tensors of a device."""

    grads = staticmethod(_not_on_cpu)

    def __new__(cls, *args: Any, **options: Any) -> NoReturn:
        _not_on_cpu()
