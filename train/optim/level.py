"""A level: parameters that fire together, with the optimizers that step them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.optim.config import AccumulatorDevice, Reduce

START = "@start"


@dataclass
class Level:
    """Parameters that fire together, by name, and the optimizers that step them.

    optimizers: each parameter is in exactly one. settings: see `LevelOptimizerConfig`.
    start: theta0 of a nested level (72), itself a level of parameters `NAME@start` in the same
        order, which fires, and sets this level back to it, when level `reset_by` fires.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    reduce: Reduce = "every_step"
    accumulator_device: AccumulatorDevice = "same"
    clip_norm: float | None = None
    tokens: int = 0  # in the accumulator
    bound: float | None = 0.0  # of its numbers, whatever the rank; None: they are not known yet
    start: Level | None = None
    reset_by: str | None = None

    def with_start(self) -> list[Level]:
        """This level, and its start if it has one."""
        return [self] if self.start is None else [self, self.start]

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Every parameter with its start; empty for a level without one."""
        if self.start is None:
            return []
        return list(zip(self.parameters.values(), self.start.parameters.values(), strict=True))

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the parameter's optimizer keeps for it; empty before its first step."""
        return {
            key: value
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def set_optimizer_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Give the parameter's optimizer what `optimizer_state` gave."""
        for optimizer in self.optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter] = state

    def take(self, tokens: int, largest: float) -> None:
        """Count gradients of so many tokens, whose sum over the ranks has no larger number."""
        self.tokens += tokens
        self.bound = (self.bound or 0.0) + largest

    def empty(self) -> None:
        """Count nothing any more."""
        self.tokens, self.bound = 0, 0.0

    def step(self, lr: float, clock_tokens: int) -> None:
        """Let the optimizers take a step on `.grad`, at token count `clock_tokens`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1.0)
                if "tokens" in group:
                    group["tokens"] = clock_tokens
            optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None
