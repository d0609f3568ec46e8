"""Collectives with a gradient, for activations [B, T, ...] between tensor-parallel blocks.

enter    before a column-parallel product: identity, whose gradient is summed over the ranks
leave    after a row-parallel product: the sum over the ranks, whose gradient is passed on
gather   enter, where each rank has a piece of the sequence: all-gather of axis 1; reduce-scatter
scatter  leave, where each rank is to have a piece: reduce-scatter of axis 1; all-gather
exchange all-to-all: cut one axis, join another (arXiv 2309.14509)

The first four are Megatron's (arXiv 1909.08053, 2205.05198). Built on torch's functional
collectives, which torch.compile and selective checkpointing see as operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import _functional_collectives as functional

# Under these names from torch 2.13 on, which warns of the older ones.
_gather = getattr(functional, "all_gather_single", functional.all_gather_tensor)
_scatter = getattr(functional, "reduce_scatter_single", functional.reduce_scatter_tensor)

SEQUENCE = 1


def _wait(tensor: Tensor) -> Tensor:
    return functional.wait_tensor(tensor)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of `group`; no gradient."""
    return _wait(functional.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts joined along `axis`; no gradient."""
    return _wait(_gather(x.contiguous(), axis, group))


def reduce_scatter(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part along `axis` of the sum over the ranks; no gradient."""
    return _wait(_scatter(x.contiguous(), "sum", axis, group))


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(grad, ctx.group), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, SEQUENCE, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return reduce_scatter(grad, SEQUENCE, ctx.group), None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, SEQUENCE, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_gather(grad, SEQUENCE, ctx.group), None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        return _exchanged(x, cut, join, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchanged(grad, ctx.join, ctx.cut, ctx.group), None, None, None


def _exchanged(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    parts = torch.stack(x.chunk(size, dim=cut)).contiguous()
    came = _wait(functional.all_to_all_single(parts, None, None, group))
    return torch.cat(came.unbind(0), dim=join)


def enter(x: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """Into a tensor-parallel block: whole activations, from a piece of the sequence if so."""
    return (_Gather if sequence_parallel else _Enter).apply(x, group)


def leave(x: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """Out of a tensor-parallel block: the sum of the ranks' x, or this rank's piece of it."""
    return (_Scatter if sequence_parallel else _Leave).apply(x, group)


def exchange(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """Give every rank its part of axis `cut`, and join what came along axis `join`."""
    return _Exchange.apply(x, cut, join, group)
