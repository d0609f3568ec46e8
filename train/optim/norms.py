"""Norms of gradients, plain or sharded, formed as `torch.nn.utils` forms them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether every number of this rank's gradients is finite; no communication."""
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    filled = [tensor for tensor in local if tensor.numel() > 0]
    if not filled:
        return True
    return bool(torch.stack(torch._foreach_norm(filled, float("inf"))).isfinite().all())


def gradient_norms(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The Euclidean norm of the gradient of each parameter that has one; scalars."""
    grads = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    if not grads:
        return {}
    return dict(zip(grads, torch._foreach_norm(list(grads.values())), strict=True))


def total_norm(norms: list[Tensor]) -> float:
    """The norm of everything from the norms of its parts, the same on all ranks."""
    if not norms:
        return 0.0
    total = torch.linalg.vector_norm(torch.stack(norms))
    return float(total.full_tensor() if isinstance(total, DTensor) else total)
