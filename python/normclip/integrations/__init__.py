"""Callbacks for training frameworks, one module each, which imports the framework when it is first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import types

    from normclip.integrations import lightning, transformers

__all__ = ["lightning", "transformers"]


def __getattr__(name: str) -> "types.ModuleType":
    if name not in __all__:
        raise AttributeError(f"module 'normclip.integrations' has no attribute {name!r}")
    return importlib.import_module(f"normclip.integrations.{name}")
