"""From a configuration and a mesh to this rank's parts of the model: one function, one order.

Pipeline stages are cut out first, on the meta device. Then, for each: tensor parallelism, which
changes what a parameter is; context parallelism, which wraps mixers; activation checkpointing,
inside of what is compiled; compilation; FSDP2 last, around everything, so that its hooks gather
parameters before anything computes, and once for what is computed again. Then memory is allocated,
for this rank's share only, and filled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from hope import HopeConfig
from hope.init import initial_value
from train.parallel.activations import checkpoint_activations, compile_layers
from train.parallel.config import ParallelConfig
from train.parallel.context import pass_on
from train.parallel.fsdp import shard
from train.parallel.megatron import swap
from train.parallel.mesh import Mesh
from train.parallel.part import Part, cut_layers
from train.parallel.placement import fill
from train.parallel.stages import layers_of_rank
from train.parallel.tensor import connect, divide, read_local

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}


def parallelize(
    config: HopeConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    seq_len: int,
    late: Collection[str] = (),
) -> list[Part]:
    """This rank's parts, first to last, without memory: parameters are on the meta device.

    late: levels with reduce: at_update.
    """
    return [
        _part(config, parallel, mesh, layers, late)
        for layers in layers_of_rank(config, parallel, mesh, seq_len)
    ]


def _part(
    config: HopeConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    layers: range,
    late: Collection[str],
) -> Part:
    precision = PRECISIONS[parallel.precision]
    model = cut_layers(config, layers)
    if mesh.tensor is not None:
        divide(model, mesh.tensor)
        if parallel.tensor_backend == "megatron":
            swap(model, mesh.tensor)
        else:
            connect(model, mesh.tensor.get_group(), parallel.sequence_parallel)
    if mesh.tensor is not None or (precision is not None and not mesh.layout.sharded):
        read_local(model, None if mesh.layout.sharded else precision)
    pieces = pass_on(model, mesh.cp) if mesh.cp.size > 1 else None
    checkpoint_activations(model, parallel.activation_checkpointing)
    if parallel.compile:
        compile_layers(model)
    part = Part(model, layers, pieces)
    if mesh.fsdp is not None:
        shard(
            model,
            part,
            mesh.fsdp,
            precision=precision,
            cpu_offload=parallel.cpu_offload,
            keep_gathered=mesh.layout.pp > 1,
            late=late,
        )
    return part


def allocate(
    parts: Sequence[Part],
    device: torch.device,
    value: Callable[[str, torch.Size], Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Give every parameter memory on `device` and its value.

    value: the whole tensor of a parameter by its name and shape; None draws initial ones from
    `seed`, which are those of a single process whatever the layout.
    """
    for part in parts:
        part.to_empty(device=device)
        for name, parameter in part.model.named_parameters():
            if value is None:
                whole = initial_value(part.model, name, parameter.shape, seed)
            else:
                whole = value(name, parameter.shape)
            fill(parameter, whole)
