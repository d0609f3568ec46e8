"""Build the optimizers of a model: each level has its own, so that skipping is not calling."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hope.config import HopeConfig
from train.optim.cadence import Cadence
from train.optim.config import LevelSettings, OptimizerConfig, OptimizerName
from train.optim.level import START, Level
from train.optim.levels import group_by_level, reset_by
from train.optim.m3 import M3
from train.optim.muon import Muon
from train.optim.norms import Norms
from train.parallel.mesh import Mesh
from train.parallel.ranks import Ranks
from train.parallel.reduction import GradientReduction, ReplicaReduction

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where every torch from 2.11 on has a fused AdamW and SGD; SGD's does not take DTensors."""

ELEMENTWISE = ("adamw", "sgd")

NOT_MATRICES = ("embedding.weight", "head.weight", "head_norm", "w_eta", "w_alpha")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on what has two or more axes, the memories' starts, the vectors behind eta
    and alpha, and convolutions too; not on norms, biases, shares of levels or token vectors."""
    return parameter.ndim >= 2 and not name.endswith(("embedding.weight", "head_norm"))


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Linear maps inside the layers, also stacks of them such as the memories' starts [..., d, h].

    What Muon and M3 orthogonalise; token vectors, the head and convolutions are AdamW's.
    """
    return parameter.ndim >= 2 and not name.endswith(NOT_MATRICES) and ".conv" not in name


def build_cadence(
    model: nn.Module | Mapping[str, nn.Parameter],
    model_config: HopeConfig,
    config: OptimizerConfig,
    ranks: Ranks | Mesh | None = None,
) -> Cadence:
    """An optimizer for every level of `model`, composed into one Cadence over `ranks` (None: one).

    model: or its parameters by name, where this rank has only some of them. ranks: those that all
    hold the whole model; or the mesh whose ranks hold parts of it.

    In a nested CMS every level but the slowest gets a start theta0, a copy of its weights as they
    are now, with an optimizer of its own.
    """
    named = dict(model.named_parameters() if isinstance(model, nn.Module) else model)
    names_by_level = group_by_level(named, model_config)
    slower = reset_by(model_config)
    levels = []
    for level_name, names in names_by_level.items():
        settings = config.level(level_name)
        level = _level(level_name, {name: named[name] for name in names}, settings, config)
        if level_name in slower:
            copies = {
                name + START: nn.Parameter(parameter.detach().clone())
                for name, parameter in level.parameters.items()
            }
            level.start = _level(level_name + START, copies, settings, config)
            level.reset_by = slower[level_name]
        levels.append(level)
    if not isinstance(ranks, Mesh):
        reduction = GradientReduction(ranks or Ranks.alone())
        return Cadence(levels, named.values(), config.clip_norm, reduction)
    layout = ranks.layout
    twice = layout.pp > 1 and model_config.tie_embeddings and ranks.pp.rank == layout.pp - 1
    elsewhere = [named["embedding.weight"]] if twice and "embedding.weight" in named else []
    return Cadence(
        levels,
        named.values(),
        config.clip_norm,
        GradientReduction(ranks.reduce, ranks.world),
        Norms(ranks, elsewhere),
        ReplicaReduction(ranks.replicas, ranks.world) if layout.sharded else None,
    )


def _level(
    name: str,
    parameters: dict[str, nn.Parameter],
    settings: LevelSettings,
    config: OptimizerConfig,
) -> Level:
    return Level(
        name,
        parameters,
        _optimizers(parameters, settings, config),
        reduce=settings.reduce,
        accumulator_device=settings.accumulator_device,
        clip_norm=settings.clip_norm,
    )


def _optimizers(
    parameters: dict[str, nn.Parameter], settings: LevelSettings, config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    if settings.optimizer in ELEMENTWISE:
        return [elementwise(settings.optimizer, _groups(parameters, settings), settings, config)]
    matrices = {name: p for name, p in parameters.items() if is_matrix(name, p)}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    found = [elementwise("adamw", _groups(rest, settings), settings, config)] if rest else []
    if matrices:
        make = _muon if settings.optimizer == "muon" else _m3
        found.append(make(matrices, settings, config))
    return found


def _groups(
    parameters: dict[str, nn.Parameter], settings: LevelSettings
) -> list[dict[str, object]]:
    """Two groups of parameters: with weight decay and without."""
    decayed = [p for name, p in parameters.items() if decays(name, p)]
    plain = [p for name, p in parameters.items() if not decays(name, p)]
    return [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def elementwise(
    name: OptimizerName,
    groups: list[dict[str, object]],
    settings: LevelSettings,
    config: OptimizerConfig,
) -> torch.optim.Optimizer:
    """AdamW or SGD over groups of parameters: what moves every number by itself."""
    every: list[Tensor] = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    fused = all(p.device.type in FUSED_DEVICES for p in every)
    if name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=settings.peak_lr,
            momentum=config.sgd.momentum,
            nesterov=config.sgd.nesterov,
            fused=fused and not any(isinstance(p, DTensor) for p in every),
        )
    return torch.optim.AdamW(
        groups, lr=settings.peak_lr, betas=config.betas, eps=config.eps, fused=fused
    )


def _muon(
    parameters: dict[str, nn.Parameter], settings: LevelSettings, config: OptimizerConfig
) -> torch.optim.Optimizer:
    return Muon(
        parameters.values(),
        lr=settings.peak_lr,
        weight_decay=settings.weight_decay,
        **config.muon.model_dump(),
    )


def _m3(
    parameters: dict[str, nn.Parameter], settings: LevelSettings, config: OptimizerConfig
) -> torch.optim.Optimizer:
    m3 = config.m3
    steps = m3.slow_every_steps
    if steps is None and m3.slow_every_tokens is None:
        steps = 16
    return M3(
        [{"params": list(parameters.values()), "lr_ratio": m3.lr_ratio}],
        lr=settings.peak_lr,
        weight_decay=settings.weight_decay,
        slow_every_steps=steps,
        **m3.model_dump(exclude={"slow_every_steps", "lr_ratio"}),
    )
