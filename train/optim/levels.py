"""Which level every parameter belongs to: by name, once, here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from hope.config import HopeConfig
from train.optim.config import OptimizerConfig

FAST = "fast"

_CMS_PARAMETER = re.compile(r"(?:^|\.)cms\.levels\.(\d+)\.")


def level_of(parameter_name: str, config: HopeConfig) -> str:
    """`fast` for mixers, embeddings, norms and head; else the name of the CMS level."""
    match = _CMS_PARAMETER.search(parameter_name)
    return config.cms.levels[int(match.group(1))].name if match else FAST


def periods(config: HopeConfig) -> dict[str, int]:
    """Tokens between firings of every level, fastest first; 0 means every step."""
    named = {FAST: 0}
    for level in config.cms.levels:
        every = level.update_every_tokens
        named[level.name] = 0 if every == "step" else every
    return named


def group_by_level(names: Iterable[str], config: HopeConfig) -> dict[str, list[str]]:
    """Parameter names of every level; each name appears exactly once."""
    groups: dict[str, list[str]] = {name: [] for name in periods(config)}
    for name in names:
        groups[level_of(name, config)].append(name)
    return groups


def reset_by(config: HopeConfig) -> dict[str, str]:
    """Of each level with a learned start the level whose firing sets it back to that start.

    In a nested CMS (Eq. 72) the next slower one, for all levels but the slowest; else none has any.
    """
    if config.cms.mode != "nested":
        return {}
    return dict(pairwise(level.name for level in config.cms.levels))


def late_levels(config: HopeConfig, optimizer: OptimizerConfig) -> list[str]:
    """Levels whose gradients ranks add up when they fire: reduce: at_update."""
    return [name for name in periods(config) if optimizer.level(name).reduce == "at_update"]
