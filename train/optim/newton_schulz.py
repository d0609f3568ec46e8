"""Newton-Schulz orthogonalisation, of stacks of matrices and of sharded ones.

torch.optim.Muon has one too, for single matrices that are whole, in bfloat16: here the memories'
starts are stacks [..., d, h], FSDP2 and tensor parallelism shard matrices, and a sharded step has
to be the step of one process to float32 round-off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.optimizer import ParamsT

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (K. Jordan, "Muon", 2024): singular values end within 0.7 and 1.2."""

SMALLEST_NORM = 1e-7


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T for the singular value decomposition U S V^T of each matrix, nearly; float32.

    matrices [..., rows, columns]; zero stays zero. `steps` iterations of
    X <- a X + (b X X^T + c (X X^T)^2) X from X / |X|.
    """
    a, b, c = COEFFICIENTS
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def orthogonalise_shard(shard: Tensor, like: Tensor, steps: int = 5) -> Tensor:
    """This rank's shard of the orthogonalised whole.

    shard: the rank's part of a tensor that is sharded as `like`; a plain `like` is whole. Where
    every matrix of a stack lies on one rank nothing is sent; else each rank gathers the whole,
    (ranks - 1) / ranks of its bytes, and orthogonalises it.
    """
    if not isinstance(like, DTensor):
        return orthogonalise(shard, steps)
    axes = [one.dim for one in like.placements if isinstance(one, Shard)]
    if all(axis < like.ndim - 2 for axis in axes):
        return orthogonalise(shard, steps)
    mesh, placements = like.device_mesh, like.placements
    whole = DTensor.from_local(shard, mesh, placements, shape=like.shape, stride=like.stride())
    result = orthogonalise(whole.full_tensor(), steps)
    return distribute_tensor(result, mesh, placements, src_data_rank=None).to_local()


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps each matrix, or stack of them [..., rows, columns], by itself; see `move`.

    Raises ValueError for a parameter with fewer than two axes.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(
                        f"{type(self).__name__} orthogonalises matrices; a parameter of shape "
                        f"{list(parameter.shape)} needs another optimizer, such as AdamW"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, group)

    def move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter of a group by its gradient."""
        raise NotImplementedError
