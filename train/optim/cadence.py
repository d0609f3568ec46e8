"""Cadence: every level takes its optimizer step at its own pace, on an exact gradient sum.

Gradients arrive as sums over tokens, not means. A level that does not fire adds its sum to a
float32 accumulator and counts the tokens in it; when it fires, its optimizer takes one step on the
accumulated sum divided by those tokens, and the accumulator is empty again (Eq. 71). A level whose
accumulator is empty uses the step's own gradient, so with every period at most one step this is
ordinary training to the bit, and a level that fires every N steps takes exactly the step of one
batch N times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ACCUMULATOR = "accumulated_grad"


@dataclass
class Level:
    """Parameters that fire together, by name, and the optimizer that steps them."""

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scale: float = 1.0
    tokens: int = 0  # in the accumulator


@dataclass(frozen=True)
class StepReport:
    """What one call of `Cadence.step` did: the norm clipped over, and the rates that were used."""

    grad_norm: float
    learning_rates: dict[str, float]


class Cadence:
    """Steps levels when they fire and accumulates for those that don't.

    state[parameter]["accumulated_grad"], float32 and shaped like the parameter, exists only while
    something is pending.
    """

    def __init__(
        self, levels: list[Level], parameters: Iterable[nn.Parameter], clip_norm: float
    ) -> None:
        """levels: every parameter in exactly one; parameters: all of them, in the model's order,
        which is the order that norms are added up in."""
        self.levels = levels
        level_of = {p: level.name for level in levels for p in level.parameters.values()}
        self._ordered = [(p, level_of[p]) for p in parameters]
        self.clip_norm = clip_norm
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, firing: set[str], tokens: int, lr: Callable[[float], float]) -> StepReport:
        """End a step whose `.grad`s are sums over `tokens` tokens (over all ranks).

        firing: names of the levels that fire; lr: maps a level's lr_scale to its learning rate.
        Gradients are consumed. Raises FloatingPointError, with weights and accumulators
        untouched, when a gradient is not finite.
        """
        if tokens <= 0:
            raise ValueError("a step needs at least one token that counts in the loss")
        for level in self.levels:
            if not math.isfinite(_grad_norm(level.parameters.values())):
                raise FloatingPointError(f"the gradient of level {level.name!r} is not finite")
        fired = [level for level in self.levels if level.name in firing]
        for level in self.levels:
            level.tokens += tokens
            if level.name not in firing:
                self._accumulate(level)
        for level in fired:
            self._ready(level)
        norm = self._clip(firing)
        rates = {}
        for level in fired:
            rates[level.name] = lr(level.lr_scale)
            for group in level.optimizer.param_groups:
                group["lr"] = rates[level.name]
            level.optimizer.step()
            for parameter in level.parameters.values():
                parameter.grad = None
            level.tokens = 0
        return StepReport(norm, rates)

    def _accumulate(self, level: Level) -> None:
        """Move each gradient of the level into its accumulator."""
        for parameter in level.parameters.values():
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                continue
            held = self.state.get(parameter)
            if held is None:
                self.state[parameter] = {ACCUMULATOR: grad.float()}
            else:
                held[ACCUMULATOR].add_(grad)

    def _ready(self, level: Level) -> None:
        """Put the mean gradient over everything pending into `.grad`, and empty the accumulator."""
        for parameter in level.parameters.values():
            held = self.state.pop(parameter, None)
            if held is not None:
                total = held[ACCUMULATOR]
                if parameter.grad is not None:
                    total.add_(parameter.grad)
                parameter.grad = total.to(parameter.dtype)
            if parameter.grad is not None:
                parameter.grad.div_(level.tokens)

    def _clip(self, firing: set[str]) -> float:
        """Scale the gradients of what fires to one global norm of at most clip_norm."""
        parameters = [parameter for parameter, level in self._ordered if level in firing]
        norm = _grad_norm(parameters)
        if norm > self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, torch.tensor(norm))
        return norm

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by `parameter name/key`, plain data): optimizer states and accumulators."""
        tensors: dict[str, Tensor] = {}
        for level in self.levels:
            for name, parameter in level.parameters.items():
                held = self.state.get(parameter, {}) | level.optimizer.state.get(parameter, {})
                tensors |= {f"{name}/{key}": value for key, value in held.items()}
        return tensors, {"tokens": {level.name: level.tokens for level in self.levels}}

    def load_state_dict(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Take back what `state_dict` gave. Raises ValueError for state of unknown parameters."""
        self.state.clear()
        remaining = dict(tensors)
        for level in self.levels:
            level.tokens = plain["tokens"][level.name]
            level.optimizer.state.clear()
            for name, parameter in level.parameters.items():
                for full_name in [key for key in remaining if key.rpartition("/")[0] == name]:
                    key, value = full_name.rpartition("/")[2], remaining.pop(full_name)
                    if key == ACCUMULATOR:
                        self.state[parameter] = {key: value}
                    else:
                        level.optimizer.state[parameter][key] = value
        if remaining:
            raise ValueError(f"checkpoint holds state of unknown parameters: {sorted(remaining)}")


def _grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
