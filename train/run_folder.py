"""The run folder: one writer at a time, and a resume that is the run it claims to be."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.checkpoint.levels import describe_levels, map_levels
from train.checkpoint.manifest import MARKER
from train.config import ConfigError, RunConfig, dump_config, flatten, load_config

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
PLOTS = "plots"
MLFLOW_RUN_ID = "mlflow_run_id"

# May differ between a run and its resumption: none of them changes what is computed.
FREE_SECTIONS = (
    "run_dir",
    "num_threads",
    "evaluation",
    "checkpoint",
    "mlflow",
    "parallel",
    "engine",
    "deepspeed",
)
FREE_KEYS = (
    "training.stop_at_tokens",
    "training.flush",
    "training.max_skipped_in_a_row",
    "data.prefetch",
    "data.on_corrupt",
    "data.cache_dir",
    "data.cache_bytes",
)
# How accumulators are kept, for all levels or one; the levels, which are mapped by name; and where
# the data lies: what it holds stands in the loader's state.
FREE_PATTERN = re.compile(
    r"optimizer\.(levels\.\w+\.)?(reduce|accumulator_device)|model\.cms\.(mode$|levels\.)"
    r"|data\.(train\.\d+\.(path|validation)|validation)$"
)


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
    """Raises RunFolderError when `config` would not continue the run in its folder.

    Levels may be added and change their periods, as `train.checkpoint.levels` says; rows read in
    shuffled order may come in batches of another size.
    """
    path = config.run_dir / CONFIG
    if not path.exists():
        raise RunFolderError(f"nothing to resume: {config.run_dir} holds no run ({CONFIG} missing)")
    try:
        saved = load_config(path)
    except ConfigError as error:
        raise RunFolderError(f"the saved configuration can't be used: {error}") from None
    try:
        added = map_levels(describe_levels(saved.model.cms), config.model.cms).added
    except ValueError as error:
        raise RunFolderError(f"{config.run_dir} can't be resumed: {error}") from None
    before, now = (flatten(c.model_dump(mode="json")) for c in (saved, config))
    free = {f"optimizer.levels.{name}" for name in added}
    if config.data.order != "stream":
        free.add("training.batch_tokens")
    changed = [
        f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _is_free(key, free)
    ]
    if changed:
        raise RunFolderError(
            f"{config.run_dir} was trained with another configuration: {', '.join(changed)}; "
            "resume with the saved one or choose another run_dir"
        )


def _is_free(key: str, free: set[str]) -> bool:
    """Whether a resume may change `key`; `free` names further keys, or sections of them."""
    return (
        key.split(".")[0] in FREE_SECTIONS
        or key in FREE_KEYS
        or FREE_PATTERN.match(key) is not None
        or any(key == one or key.startswith(f"{one}.") for one in free)
    )


def save_config(config: RunConfig) -> None:
    """Write the resolved configuration into the run folder."""
    (config.run_dir / CONFIG).write_text(dump_config(config), encoding="utf-8")
