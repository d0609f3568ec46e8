"""What the sections of a run's configuration demand of one another.

Every function raises ValueError, one line that names the keys, for what can't go together.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from train.parallel.pulse import FIRST_RANK_PHASES
from train.zero.config import DeepSpeedConfig

if TYPE_CHECKING:
    from train.config import RunConfig


def check_consistency(config: RunConfig) -> None:
    """Look at all that is known before there are ranks and data."""
    check_rows(config)
    check_mode(config)
    check_engine(config)
    check_chunks(config)
    check_carry(config)
    check_levels(config)
    check_checkpoints(config)
    check_faults(config)


def check_rows(config: RunConfig) -> None:
    """Batches are whole rows."""
    seq_len, batch_tokens = config.data.seq_len, config.training.batch_tokens
    if batch_tokens % seq_len:
        nearest = max(1, round(batch_tokens / seq_len)) * seq_len
        raise ValueError(
            f"training.batch_tokens={batch_tokens} must be a multiple of "
            f"data.seq_len={seq_len}; the nearest is {nearest}"
        )


def check_chunks(config: RunConfig) -> None:
    """Rows are whole chunks of the memories that write."""
    seq_len, chunk = config.data.seq_len, config.model.titans.scan.projection_chunk
    remembers = "titans" in config.model.mixers and config.model.titans.writes
    if remembers and seq_len % chunk:
        raise ValueError(
            f"data.seq_len={seq_len} must be a multiple of "
            f"model.titans.scan.projection_chunk={chunk}; the nearest is "
            f"{math.ceil(seq_len / chunk) * chunk}"
        )


def check_mode(config: RunConfig) -> None:
    """Domains are of mode continual, and it reads them in order."""
    domains = [source.domain for source in config.data.train]
    if config.mode == "pretrain":
        if config.training.total_tokens == 0:
            raise ValueError("missing key 'training.total_tokens'")
        for source in config.data.train:
            for key in ("name", "validation", "tokens"):
                if getattr(source, key) is not None:
                    raise ValueError(f"data.train: {key!r} is of a domain: add mode=continual")
        return
    if config.data.order != "stream" or config.training.state_carry != "stream":
        raise ValueError(
            "mode=continual reads each domain once, in order, and carries the memories on: it "
            "needs data.order=stream and training.state_carry=stream"
        )
    if any(source.weight != 1.0 for source in config.data.train):
        raise ValueError("data.train: domains of mode=continual have no weight, but tokens")
    if len(set(domains)) != len(domains):
        raise ValueError(f"data.train: domains need names of their own, got {domains}")


def check_engine(config: RunConfig) -> None:
    """The section deepspeed is of that engine."""
    if config.engine != "deepspeed" and config.deepspeed != DeepSpeedConfig():
        raise ValueError("deepspeed: is of engine=deepspeed, and engine=native would ignore it")


def check_carry(config: RunConfig) -> None:
    """State is carried along rows that continue one another."""
    if config.training.state_carry == "stream" and config.data.order != "stream":
        raise ValueError(
            "training.state_carry=stream needs data.order=stream: "
            "shuffled rows do not continue one another"
        )


def check_levels(config: RunConfig) -> None:
    """What is said of levels is of levels that there are."""
    slow = {level.name for level in config.model.cms.levels}
    _check_names("optimizer.levels", set(config.optimizer.levels), slow | {"fast"}, "levels")
    if config.training.total_tokens > 0:
        check_schedules(config, config.training.total_tokens)
    placed = config.init_from.levels if config.init_from is not None else None
    _check_names("init_from.levels", placed or (), slow, "CMS levels")


def _check_names(key: str, named: Collection[str], known: Collection[str], what: str) -> None:
    if unknown := set(named) - set(known):
        raise ValueError(f"{key} names {sorted(unknown)}, but the {what} are {sorted(known)}")


def check_schedules(config: RunConfig, total: int) -> None:
    """Every level's schedule fits into `total` tokens of training."""
    for name in ("fast", *(level.name for level in config.model.cms.levels)):
        schedule = config.optimizer.level(name).schedule
        needed = schedule.warmup_tokens + (schedule.decay_tokens or 0)
        if schedule.name == "wsd" and total < needed:
            raise ValueError(
                f"the schedule of level {name!r} warms up and decays for {needed} tokens, more "
                f"than training.total_tokens={total}"
            )


def check_checkpoints(config: RunConfig) -> None:
    """Who writes checkpoints can reach where they go."""
    if config.checkpoint.asynchronous and (config.checkpoint.url or "").startswith("memory:"):
        raise ValueError(
            "checkpoint.url: memory:// is of one process, and checkpoints are written by "
            "another: set checkpoint.asynchronous=false"
        )


def check_faults(config: RunConfig) -> None:
    """Faults on purpose can happen where they are asked for."""
    phases = {phase for fault in config.faults for phase in fault.possible_phases}
    beside = phases & set(FIRST_RANK_PHASES)
    if beside and config.checkpoint.asynchronous:
        raise ValueError(
            f"faults: {', '.join(sorted(beside))} happen in another process while checkpoints "
            "are written beside training: set checkpoint.asynchronous=false"
        )
    kinds = {fault.kind.rpartition("_")[2]: fault.kind for fault in config.faults}
    for what, key, url in (
        ("shard", "data.train.0.path", config.data.train[0].path),
        ("checkpoint", "checkpoint.url", config.checkpoint.url or ""),
    ):
        if what in kinds and "://" in url:
            raise ValueError(f"faults: {kinds[what]} damages local files, and {key} is a URL")
