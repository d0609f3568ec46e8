"""Checkpoints: one canonical layout whatever the number of ranks, verified before it is used."""

from train.checkpoint.store import CheckpointError, CheckpointStore, load_parameters

__all__ = ["CheckpointError", "CheckpointStore", "load_parameters"]
