"""Tensor parallelism: a model's parameters divided as its shard plan says, and the collectives.

Parameters become DTensors over the tensor-parallel ranks, so that optimizers, FSDP2 and checkpoints
know what they hold; modules compute on this rank's part. Collectives stand in three places only
(`hope.sharding` says why they suffice): after every norm, where the column-parallel products begin;
after every row-parallel product; after the vocabulary-parallel embedding.

With sequence parallelism each rank has a piece of the sequence between the blocks. Convolutions lie
inside the blocks, on this rank's channels of whole sequences: no halo crosses the ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as OnEvery
from torch.distributed.tensor import Shard as Divided
from torch.nn.functional import embedding

from data_pipeline import IGNORE
from hope import HopeModel
from hope.attention import Attention
from hope.fused import logits_gradient, row_statistics
from hope.init import Linear, RMSNorm
from hope.model import Embedding
from hope.sharding import Shard, check_tensor_parallel, local_part
from hope.titans import SelfModifyingTitans
from train.parallel.collectives import all_reduce, enter, leave


class LocalParameters(nn.Module):
    """Mixed into a module's class: it computes on its own part of each parameter, in `precision`.

    Whoever lists the parameters (optimizers, checkpoints) sees them as they are. So does FSDP2,
    while it has them sharded over a second axis; what it gathers for computing has one axis.
    """

    precision: torch.dtype | None = None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, DTensor):
            if value.device_mesh.ndim > 1:
                return value
            value = value.to_local()
        elif not isinstance(value, nn.Parameter):
            return value
        return value if self.precision is None else value.to(self.precision)


def read_local(model: nn.Module, precision: torch.dtype | None = None) -> None:
    """Let every module that owns parameters read its own part of them, in `precision`."""
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        kind = type(module)
        if not issubclass(kind, LocalParameters):
            module.__class__ = type(f"Local{kind.__name__}", (LocalParameters, kind), {})
        module.precision = precision  # type: ignore[assignment]


def divide(model: HopeModel, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor of which this rank holds what the shard plan gives it.

    ValueError where the plan can't be divided. Works on the meta device too.
    """
    check_tensor_parallel(model.config, mesh.size())
    rank, size = mesh.get_local_rank(), mesh.size()
    plan = model.shard_plan()
    for name, parameter in list(model.named_parameters()):
        path, _, own = name.rpartition(".")
        placement = plan[name]
        part = local_part(parameter.detach(), placement, rank, size).clone()
        where = Divided(placement.dim) if isinstance(placement, Shard) else OnEvery()
        whole = DTensor.from_local(
            part, mesh, [where], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        model.get_submodule(path).register_parameter(own, nn.Parameter(whole))
    for module in model.modules():
        if isinstance(module, (SelfModifyingTitans, Attention)):
            module.num_heads //= size


def connect(model: HopeModel, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """Put the collectives in."""

    def into(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        return enter(y, group, sequence_parallel)

    def out_of(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        return leave(y, group, sequence_parallel)

    plan = model.shard_plan()
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(into)
        elif isinstance(module, Linear) and plan.get(f"{name}.weight") == Shard(1):
            module.register_forward_hook(out_of)
        elif isinstance(module, Embedding):
            kind = type(module)
            module.__class__ = type(f"Vocabulary{kind.__name__}", (VocabularyParallel, kind), {})
            module.vocabulary_rank = dist.get_rank(group)  # type: ignore[assignment]
            module.register_forward_hook(out_of)


class VocabularyParallel(nn.Module):
    """Mixed into an embedding: rows of this rank's tokens, zeros for the others'."""

    vocabulary_rank: int

    def forward(self, tokens: Tensor) -> Tensor:
        weight = cast(Tensor, self.weight)
        own = tokens - self.vocabulary_rank * weight.shape[0]
        elsewhere = (own < 0) | (own >= weight.shape[0])
        found = embedding(own.masked_fill(elsewhere, 0), weight)
        return found.masked_fill(elsewhere.unsqueeze(-1), 0)


class _CrossEntropy(Function):
    """-log softmax over logits [n, V / ranks], of which every rank has its own columns."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        own = labels - dist.get_rank(group) * logits.shape[-1]
        lse, picked = row_statistics(logits, own)
        largest = lse.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        total, label = all_reduce(torch.stack([(lse - largest).exp(), picked]), group)
        lse = largest + total.log()
        counts = labels != IGNORE
        ctx.save_for_backward(logits, own, lse, counts)
        return (lse - label).masked_fill(~counts, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, own, lse, counts = ctx.saved_tensors
        share = counts * grad
        return logits_gradient(logits, own, lse, share, -share), None, None


def vocabulary_parallel_loss(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`summed_loss` of logits [..., V / ranks]: the same sum on every rank of `group`."""
    return _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), group)


def loss_over(group: dist.ProcessGroup) -> Any:
    """`vocabulary_parallel_loss` over `group`, to be called like `summed_loss`."""
    return partial(vocabulary_parallel_loss, group=group)
