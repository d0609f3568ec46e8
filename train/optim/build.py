"""Build the optimizers of a model: one torch optimizer a level, so that skipping is not calling."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from hope.config import HopeConfig
from train.config import LevelOptimizerConfig, OptimizerConfig
from train.optim.cadence import START, Cadence, Level
from train.optim.levels import group_by_level


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on matrices; not on norms, biases, gates of one value or token vectors."""
    return parameter.ndim >= 2 and not name.endswith(("embedding.weight", "head_norm"))


def build_cadence(model: nn.Module, model_config: HopeConfig, config: OptimizerConfig) -> Cadence:
    """AdamW for every level of `model`, composed into one Cadence.

    In a nested CMS every level but the slowest gets a start theta0, a copy of its weights as they
    are now, with an optimizer of its own.
    """
    named = dict(model.named_parameters())
    names_by_level = group_by_level(named, model_config)
    reset_by: dict[str, str] = {}
    if model_config.cms.mode == "nested":
        reset_by = dict(pairwise(level.name for level in model_config.cms.levels))
    levels = []
    for level_name, names in names_by_level.items():
        lr_scale = config.levels.get(level_name, LevelOptimizerConfig()).lr_scale
        parameters = {name: named[name] for name in names}
        level = Level(level_name, parameters, _adamw(parameters, config), lr_scale)
        if level_name in reset_by:
            copies = {n + START: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
            level.start = Level(level_name, copies, _adamw(copies, config), lr_scale)
            level.reset_by = reset_by[level_name]
        levels.append(level)
    return Cadence(levels, named.values(), config.clip_norm)


def _adamw(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    decayed = [p for name, p in parameters.items() if decays(name, p)]
    plain = [p for name, p in parameters.items() if not decays(name, p)]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
