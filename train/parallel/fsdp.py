"""Fully sharded data parallelism (FSDP2), and with replicas HSDP: gradients stay sums."""

from __future__ import annotations

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


def shard(
    model: HopeModel,
    root: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: torch.dtype | None,
    cpu_offload: bool,
    keep_gathered: bool,
) -> None:
    """Shard every layer of `model` by itself, and what is left with `root`, which contains it.

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
    modules: list[nn.Module] = [*model.layers, root]
    for module in modules:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=not keep_gathered and module is not root,
        )
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
