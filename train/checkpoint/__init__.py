"""Checkpoints: one canonical layout whatever the number of ranks, verified before it is used.

Names are loaded when they are asked for: the process that writes needs none of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.checkpoint.errors import CheckpointError, SaveError
    from train.checkpoint.store import CheckpointStore, load_parameters, open_store

__all__ = ["CheckpointError", "CheckpointStore", "SaveError", "load_parameters", "open_store"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "errors" if name.endswith("Error") else "store"
    return getattr(import_module(f"{__name__}.{room}"), name)
