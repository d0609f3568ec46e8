"""Fully sharded data parallelism (FSDP2), and with replicas HSDP: gradients stay sums.

A level with reduce: at_update is divided over one replica's ranks alone: FSDP2 adds its gradients
up among those, and the cadence adds up the replicas' sums when the level fires.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from hope import HopeModel
from hope.cms import ContinuumMemory
from train.optim.levels import FAST


def shard(
    model: HopeModel,
    root: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: torch.dtype | None,
    cpu_offload: bool,
    keep_gathered: bool,
    late: Collection[str] = (),
) -> None:
    """Shard every layer of `model` by itself, and what is left with `root`, which contains it; and
    by themselves levels whose gradients are added up at other times than the rest of their layer's.

    late: levels with reduce: at_update.
    precision: what layers compute in; gradients are summed, and not averaged, in float32.
    keep_gathered: keep a layer's parameters whole between forward and backward (pipelines).
    States of memories pass through in float32: FSDP2 must not cast what goes into a layer.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision is not None:
        policy = MixedPrecisionPolicy(
            param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    rest = FAST in late
    modules: list[tuple[nn.Module, bool]] = []
    for layer in model.layers:
        memory = cast(ContinuumMemory, layer.cms)
        levels = zip(memory.levels, model.config.cms.levels, strict=True)
        modules += [(one, not rest) for one, its in levels if (its.name in late) != rest]
        modules.append((layer, rest))
    modules.append((root, rest))
    for module, at_update in modules:
        fully_shard(
            module,
            mesh=mesh["shard"] if at_update and mesh.ndim > 1 else mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=not keep_gathered and module is not root,
        )
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
