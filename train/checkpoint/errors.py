"""What can go wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that can't be saved, found or trusted; the message is one line."""


class SaveError(CheckpointError):
    """The last checkpoint of a run could not be written."""
