"""How the levels of a checkpoint become the levels of a run that resumes from it.

Levels are matched by name. A level whose period changed keeps its weights, moments, accumulator and
token count, and fires next when the clock passes a multiple of the new period: no gradient is lost
or counted twice. A level that was added starts as an exact zero on the residual stream (its down
projection is zero), so that the model computes what it did. Anything else would lose weights or
change what the model computes, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hope import HopeConfig, HopeModel
from hope.config import CMSConfig, LevelConfig
from hope.init import initial_value

Value = TypeVar("Value")

LEVEL = re.compile(r"\bcms\.levels\.(\d+)\.")


@dataclass(frozen=True)
class LevelMapping:
    """From the levels of a checkpoint to those of the model that takes it up.

    positions: the place in the model's CMS of each level of the checkpoint; added: names of the
    levels that the checkpoint does not have; changes: one line each, for the log.
    """

    positions: tuple[int, ...]
    added: tuple[str, ...]
    changes: tuple[str, ...]

    def rename(self, tensors: Mapping[str, Value]) -> dict[str, Value]:
        """Tensors of the checkpoint by the names that they have in the model."""

        def moved(match: re.Match[str]) -> str:
            return f"cms.levels.{self.positions[int(match[1])]}."

        return {LEVEL.sub(moved, name): tensor for name, tensor in tensors.items()}

    def start_added(self, config: HopeConfig, seed: int) -> dict[str, Tensor]:
        """`model/NAME` tensors of added levels: as a fresh model has them, down projection zero."""
        with torch.device("meta"):
            model = HopeModel(config, seed=None)
        found = {}
        for name, parameter in model.named_parameters():
            match = LEVEL.search(name)
            if match is None or int(match[1]) in self.positions:
                continue
            found[f"model/{name}"] = initial_value(model, name, parameter.shape, seed)
            if name.endswith("down.weight"):
                found[f"model/{name}"].zero_()
        return found


def describe_levels(cms: CMSConfig) -> dict[str, Any]:
    """The part of a CMS's configuration that a checkpoint keeps, as plain data."""
    levels = [[one.name, one.hidden_size, one.update_every_tokens] for one in cms.levels]
    return {"mode": cms.mode, "levels": levels}


def map_levels(saved: dict[str, Any], now: CMSConfig) -> LevelMapping:
    """How the levels of a checkpoint, as `describe_levels` gave them, map to those of `now`.

    Raises ValueError, one line with the reason, where they can't.
    """
    before = {name: (size, period) for name, size, period in saved["levels"]}
    after = [level.name for level in now.levels]
    if saved["mode"] != now.mode:
        raise ValueError(
            f"model.cms.mode was {saved['mode']!r} and is now {now.mode!r}: "
            "another model, with other weights"
        )
    if gone := [name for name in before if name not in after]:
        raise ValueError(
            f"model.cms.levels: {_named(gone)} is gone, and what it learned would be lost; keep it "
            "(optimizer.levels.NAME.lr_scale=0 holds a level still)"
        )
    positions = tuple(after.index(name) for name in before)
    if list(positions) != sorted(positions):
        raise ValueError(
            f"model.cms.levels were {list(before)} and are now {after}: "
            "another order is another model; change the periods without passing one another"
        )
    added = tuple(name for name in after if name not in before)
    if added and now.mode != "sequential":
        why = {
            "independent": "its share would come from the other levels",
            "nested": "the learned start of the level before it would have no past",
        }
        raise ValueError(
            f"model.cms.levels: {_named(added)} can't be added to cms.mode={now.mode}: "
            f"{why[now.mode]}"
        )
    changes = [f"level {name!r} is new and starts as zero" for name in added]
    for level in now.levels:
        if level.name in before:
            changes += _compare(level, *before[level.name])
    return LevelMapping(positions, added, tuple(changes))


def _compare(level: LevelConfig, size: int, period: int | str) -> list[str]:
    if level.hidden_size != size:
        raise ValueError(
            f"model.cms.levels: {level.name!r} had hidden_size {size} and now "
            f"{level.hidden_size}: its weights do not fit"
        )
    if level.update_every_tokens == period:
        return []
    return [
        f"level {level.name!r} has period {level.update_every_tokens} instead of {period}; "
        "what it has accumulated stays, and is used at its next firing"
    ]


def _named(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
