"""Build the optimizers of a model: one torch optimizer a level, so that skipping is not calling."""

from __future__ import annotations

import torch
from torch import nn

from hope.config import HopeConfig
from train.config import LevelOptimizerConfig, OptimizerConfig
from train.optim.cadence import Cadence, Level
from train.optim.levels import group_by_level


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on matrices; not on norms, biases, gates of one value or token vectors."""
    return parameter.ndim >= 2 and not name.endswith(("embedding.weight", "head_norm"))


def build_cadence(model: nn.Module, model_config: HopeConfig, config: OptimizerConfig) -> Cadence:
    """AdamW for every level of `model`, composed into one Cadence."""
    named = dict(model.named_parameters())
    levels = []
    for level_name, names in group_by_level(named, model_config).items():
        parameters = {name: named[name] for name in names}
        decayed = [p for name, p in parameters.items() if decays(name, p)]
        plain = [p for name, p in parameters.items() if not decays(name, p)]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        own = config.levels.get(level_name, LevelOptimizerConfig())
        levels.append(Level(level_name, parameters, optimizer, own.lr_scale))
    return Cadence(levels, named.values(), config.clip_norm)
