"""What computes a step's gradients; the trainer asks and does not know which it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hope.flash import load_flash
from hope.scan.cuda.device import why_not as why_not_cuda
from hope.scan.native.operators import why_not_native
from hope.scan.triton import why_not
from hope.triton import why_no_kernels
from train.config import ConfigError, RunConfig
from train.engines.native import NativeEngine
from train.engines.parts import Engine
from train.optim.levels import late_levels
from train.parallel.activations import why_not_compile
from train.parallel.layout import Job, Layout, resolve
from train.parallel.mesh import make_mesh
from train.parallel.parallelize import PRECISIONS
from train.parallel.ranks import Ranks
from train.zero.config import problems, refused, settings


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """How so many ranks run `config`; ConfigError, with every reason, where they can't."""
    late = late_levels(config.model, config.optimizer)
    job = Job(config.model, config.batch_rows, config.data.seq_len, tuple(late))
    if config.engine != "deepspeed":
        return resolve(config.parallel, world_size, job)
    job = replace(
        job,
        engine="deepspeed",
        refused=tuple(refused(config)),
        more_problems=partial(problems, config),
    )
    layout = resolve(config.parallel, world_size, job)
    settings(config, layout)
    return layout


def check_kernels(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError where what is insisted on, kernels or compiled layers, can't run on that
    device."""
    if config.parallel.compile and (reason := why_not_compile(device)):
        raise ConfigError(
            f"parallel.compile=true can't be used: {reason}; install one, name it in CXX, or take "
            "compile=false"
        )
    model, titans = config.model, config.model.titans
    dtype = PRECISIONS[config.parallel.precision] or torch.float32
    x = torch.empty(1, 1, 1, model.head_dim, dtype=dtype, device=device)
    asked = titans.scan.implementation
    if "titans" in model.mixers and asked in ("native", "triton", "cuda"):
        hidden = titans.memory_expansion * model.head_dim
        if asked == "native":
            reason = why_not_native(x)
        elif titans.writes and asked == "cuda":
            reason = why_not_cuda(x, hidden, titans.scan.memory_chunk)
        elif titans.writes:
            reason = why_not(x, hidden, titans.scan)
        else:
            reason = why_no_kernels(x)
        if reason:
            raise ConfigError(
                f"model.titans.scan.implementation={asked} can't be used: {reason}; take auto or "
                "chunked"
            )
    if "attention" in model.mixers:
        try:
            flash = load_flash(model.attention.backend)
            if flash is not None:
                flash.takes(x)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None


def open_engine(
    config: RunConfig, ranks: Ranks, initial: dict[str, Tensor] | None = None
) -> Engine:
    """The engine that `config` names, over all ranks of the job; a collective call of them.

    initial: whole parameters by name to start from; None draws them from config.seed. Raises
    ConfigError for a layout that these ranks can't have, and kernels that their devices can't run.
    """
    mesh = make_mesh(layout_of(config, ranks.size), ranks)
    check_kernels(config, mesh.device)
    if config.engine == "deepspeed":
        from train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, mesh, initial)
    return NativeEngine(config, mesh, initial)
