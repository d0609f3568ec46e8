"""Muon: momentum, orthogonalised (K. Jordan et al., 2024; arXiv 2502.16982)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from train.optim.newton_schulz import MatrixOptimizer, orthogonalise_shard
from train.parallel.placement import local

AdjustLR = Literal["match_rms_adamw", "original"]


def lr_factor(adjust_lr: AdjustLR, shape: torch.Size) -> float:
    """What a step on matrices [..., rows, columns] is multiplied by.

    match_rms_adamw: 0.2 sqrt(max(rows, columns)), so that a step is as large as AdamW's
    (arXiv 2502.16982); original: sqrt(max(1, rows / columns)).
    """
    rows, columns = shape[-2:]
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(MatrixOptimizer):
    """torch.optim.Muon's step, for matrices, stacks of them [..., rows, columns], and DTensors.

    buffer <- momentum buffer + (1 - momentum) g; with nesterov the update is the same mix of g and
    the buffer, else the buffer; p <- p (1 - lr weight_decay) - lr factor NS(update). State:
    `momentum_buffer`, float32, sharded as its parameter. Communication: see
    `train.optim.newton_schulz.orthogonalise_shard`.

    Raises ValueError for a parameter with fewer than two axes.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        adjust_lr: AdjustLR = "match_rms_adamw",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
        }
        super().__init__(params, defaults)

    def move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        grad, buffer = local(grad).float(), local(state["momentum_buffer"])
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        direction = orthogonalise_shard(update, parameter, group["ns_steps"])
        weight = local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * lr_factor(group["adjust_lr"], parameter.shape)
        weight.add_(direction.to(weight.dtype), alpha=-scale)
