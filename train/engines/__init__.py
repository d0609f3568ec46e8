"""What computes a step's gradients; the trainer asks and does not know which it is."""

from __future__ import annotations

from torch import Tensor

from train.config import RunConfig
from train.engines.native import NativeEngine
from train.engines.parts import Engine
from train.parallel.layout import Job, Layout, resolve
from train.parallel.mesh import make_mesh
from train.parallel.ranks import Ranks
from train.zero.config import check


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """How so many ranks run `config`; ConfigError, with every reason, where they can't."""
    names = ["fast", *(level.name for level in config.model.cms.levels)]
    late = [name for name in names if config.optimizer.level(name).reduce == "at_update"]
    job = Job(config.model, config.batch_rows, config.data.seq_len, tuple(late))
    layout = resolve(config.parallel, world_size, job)
    if config.engine == "deepspeed":
        check(config, layout)
    return layout


def open_engine(
    config: RunConfig, ranks: Ranks, initial: dict[str, Tensor] | None = None
) -> Engine:
    """The engine that `config` names, over all ranks of the job; a collective call of them.

    initial: whole parameters by name to start from; None draws them from config.seed.
    """
    mesh = make_mesh(layout_of(config, ranks.size), ranks)
    if config.engine == "deepspeed":
        from train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, mesh, initial)
    return NativeEngine(config, mesh, initial)
