"""M3, multi-scale momentum Muon (arXiv 2512.24695, Algorithm 1, Eq. 75)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from train.optim.newton_schulz import MatrixOptimizer, orthogonalise_shard
from train.parallel.placement import local

Variant = Literal["paper", "ema"]


class M3(MatrixOptimizer):
    """A fast and a slow momentum, each orthogonalised, over the root of a second moment.

        p <- p (1 - lr weight_decay) - lr (NS(M1) + alpha NS(M2)) / (sqrt(V) + eps)      (75)

    variant "paper", the printed letter: M1 += beta1 g and V += beta2 g^2 each step;
    M2 += beta3 (sum of g over the window) at the end of a window, used from the next step on.
    Nothing decays: V grows as AdaGrad's does. "ema": exponential averages, M <- beta M +
    (1 - beta) x, of the same three, the slow one of the window's mean gradient, and V divided by
    1 - beta2^t as Adam does. The paper prints no numbers: the defaults are Muon's momentum, AdamW's
    second moment, a slow momentum that counts half, and an eps of the size of a clipped gradient's
    entries: NS fills entries whose gradient has been zero, which with Adam's 1e-8 took a step of
    1e8 lr and ended the first run that was tried in its second step.

    A window is `slow_every_steps` steps, or, on a token clock, ends in the step in which
    floor(n / slow_every_tokens) grows: whoever calls `step` puts the token count n, this step
    included, in each group's "tokens". For matrices and stacks of them [..., rows, columns], plain
    or DTensor (communication: twice `orthogonalise_shard`'s).

    State: fast_momentum, slow_momentum, slow_sum, second_moment, float32 and sharded as the
    parameter; step, slow_count and tokens, int64 numbers.

    Raises ValueError for a parameter with fewer than two axes, and unless exactly one kind of
    window is given.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.9),
        alpha: float = 0.5,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        variant: Variant = "ema",
        slow_every_steps: int | None = None,
        slow_every_tokens: int | None = None,
        ns_steps: int = 5,
    ) -> None:
        if (slow_every_steps is None) == (slow_every_tokens is None):
            raise ValueError("M3 needs slow_every_steps or slow_every_tokens, one of the two")
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "variant": variant,
            "slow_every_steps": slow_every_steps,
            "slow_every_tokens": slow_every_tokens,
            "ns_steps": ns_steps,
            "tokens": 0,
        }
        super().__init__(params, defaults)

    def move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            for name in ("fast_momentum", "slow_momentum", "slow_sum", "second_moment"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            for name in ("step", "slow_count", "tokens"):
                state[name] = torch.zeros((), dtype=torch.int64)
        grad = local(grad).float()
        fast, slow = local(state["fast_momentum"]), local(state["slow_momentum"])
        window, second = local(state["slow_sum"]), local(state["second_moment"])
        beta1, beta2, beta3 = group["betas"]
        averages = group["variant"] == "ema"
        state["step"] += 1
        state["slow_count"] += 1
        window.add_(grad)
        if averages:
            fast.lerp_(grad, 1 - beta1)
            second.lerp_(grad.square(), 1 - beta2)
            root = (second / (1 - beta2 ** int(state["step"]))).sqrt_()
        else:
            fast.add_(grad, alpha=beta1)
            second.addcmul_(grad, grad, value=beta2)
            root = second.sqrt()
        direction = orthogonalise_shard(fast, parameter, group["ns_steps"])
        direction = direction + group["alpha"] * orthogonalise_shard(
            slow, parameter, group["ns_steps"]
        )
        weight = local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_((group["lr"] * direction / root.add_(group["eps"])).to(weight.dtype))
        if self._window_ends(state, group):
            if averages:
                slow.lerp_(window / int(state["slow_count"]), 1 - beta3)
            else:
                slow.add_(window, alpha=beta3)
            window.zero_()
            state["slow_count"].zero_()

    def _window_ends(self, state: dict[str, Tensor], group: dict[str, Any]) -> bool:
        before, now = int(state["tokens"]), group["tokens"]
        state["tokens"].fill_(now)
        if group["slow_every_steps"] is not None:
            return int(state["step"]) % group["slow_every_steps"] == 0
        return now // group["slow_every_tokens"] > before // group["slow_every_tokens"]
