"""The run folder: one writer at a time, and a resume that is the run it claims to be."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.checkpoint.manifest import MARKER
from train.config import ConfigError, RunConfig, dump_config, flatten, load_config

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
PLOTS = "plots"
MLFLOW_RUN_ID = "mlflow_run_id"

# May differ between a run and its resumption: none of them changes what is computed.
FREE_SECTIONS = ("run_dir", "num_threads", "evaluation", "checkpoint", "mlflow")
FREE_KEYS = ("training.stop_at_tokens", "training.micro_batch_rows", "data.prefetch")


class RunFolderError(RuntimeError):
    """A run folder that can't be used for what was asked; the message is one line."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; RunFolderError when another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(f"can't write to run folder {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"{folder} is in use by another training process; "
                "wait for it or choose another run_dir"
            ) from None
        yield
    finally:
        os.close(lock)


def check_fresh(folder: Path) -> None:
    """Raises RunFolderError when the folder already holds a checkpoint; clears what is left of a
    run that never reached one."""
    if any((folder / CHECKPOINTS).glob(f"*/{MARKER}")):
        raise RunFolderError(
            f"{folder} already holds a run; add --resume to continue it, or choose another run_dir"
        )
    for leftover in (METRICS, MLFLOW_RUN_ID):
        (folder / leftover).unlink(missing_ok=True)


def check_same_run(config: RunConfig) -> None:
    """Raises RunFolderError when `config` would not continue the run in its folder."""
    path = config.run_dir / CONFIG
    if not path.exists():
        raise RunFolderError(f"nothing to resume: {config.run_dir} holds no run ({CONFIG} missing)")
    try:
        saved = load_config(path)
    except ConfigError as error:
        raise RunFolderError(f"the saved configuration can't be used: {error}") from None
    before, now = (flatten(c.model_dump(mode="json")) for c in (saved, config))
    changed = [
        f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key.split(".")[0] not in FREE_SECTIONS
        and key not in FREE_KEYS
    ]
    if changed:
        raise RunFolderError(
            f"{config.run_dir} was trained with another configuration: {', '.join(changed)}; "
            "resume with the saved one or choose another run_dir"
        )


def save_config(config: RunConfig) -> None:
    """Write the resolved configuration into the run folder."""
    (config.run_dir / CONFIG).write_text(dump_config(config), encoding="utf-8")
