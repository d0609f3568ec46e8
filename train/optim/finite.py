"""What is not finite: gradients, and sums of finite gradients that overflow.

A number of a sum is at most the largest numbers of its terms added up, over the ranks and over the
steps that wait in an accumulator. The ranks tell each other the largest with everything else that
they agree on, so all of them know that bound; below SAFE neither a sum nor a norm can overflow, and
nothing need be looked at. Beyond it a step is a trial: accumulators are copied before, what has
become of them is looked at on every rank, and an overflow is undone with the copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.optim.level import Level
from train.parallel.placement import local
from train.parallel.ranks import Ranks

SAFE = 1e30
"""The norm of 10^16 numbers of this size is one of float32 still."""
LARGEST = torch.finfo(torch.float32).max

State = Mapping[nn.Parameter, Mapping[str, Tensor]]
"""Accumulators by parameter."""


@dataclass(frozen=True)
class NonFinite:
    """Where an infinite or NaN number appeared; no levels: in the loss or the carried state."""

    ranks: list[int]
    levels: list[str]

    def __str__(self) -> str:
        what = "loss or the carried state"
        if self.levels:
            what = f"gradient of level {', '.join(self.levels)}"
        return f"the {what} is not finite on rank {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Overflow:
    """Levels of which a sum of finite gradients, or its norm, is beyond the largest number."""

    levels: list[str]

    def __str__(self) -> str:
        return f"a sum of finite gradients overflowed, of level {', '.join(self.levels)}"


class OverflowedError(FloatingPointError):
    """A step that can't be taken; raised on all ranks, with no weight moved."""

    def __init__(self, problem: Overflow) -> None:
        super().__init__(f"{problem}: lower optimizer.lr and go on from a checkpoint before it")
        self.problem = problem


def largest(tensors: Iterable[Tensor | None]) -> float:
    """The largest absolute value of this rank's numbers, inf where one is not finite, 0 where there
    are none; no communication."""
    own = [local(tensor) for tensor in tensors if tensor is not None]
    filled = [tensor for tensor in own if tensor.numel() > 0]
    if not filled:
        return 0.0
    found = float(torch.stack(torch._foreach_norm(filled, math.inf)).max())
    return found if math.isfinite(found) else math.inf


def most(level: Level, state: State) -> float:
    """The largest number that this rank has of a step's gradients of a level; with the largest that
    waits in its accumulators where that is not known yet. inf where a gradient is not finite."""
    found = largest(parameter.grad for parameter in level.parameters.values())
    unknown = [part for part in level.with_start() if part.bound is None]
    return found + sum(largest(_held(part, state)) for part in unknown)


def may_overflow(levels: Iterable[Level], most: Mapping[str, float]) -> bool:
    """Whether a sum or norm could, of what waits and this step's numbers, by level at most so large
    over all ranks; the same on all of them."""
    return any(
        (part.bound or 0.0) + most[level.name] > SAFE
        for level in levels
        for part in level.with_start()
    )


def check_sums(
    levels: Sequence[Level],
    norm: float,
    level_norms: Mapping[str, float],
    state: State | None,
    world: Ranks,
) -> None:
    """Raise OverflowedError where float32 does not hold a norm or, with a state, where accumulators
    have overflowed on any rank of `world`: a collective call then.

    Of a level whose ranks add up theirs when it fires, the largest numbers together must be finite:
    by then no step could be left out that would help.
    """
    found = {name for name, one in level_norms.items() if not abs(one) <= LARGEST}
    if not found and not abs(norm) <= LARGEST:
        found = set(level_norms)
    if state is not None:
        own = [max(largest(_held(part, state)) for part in one.with_start()) for one in levels]
        at_update = [level.reduce == "at_update" for level in levels]
        told = world.sum(
            [
                one if late or math.isinf(one) else 0.0
                for one, late in zip(own, at_update, strict=True)
            ]
        )
        found |= {level.name for level, one in zip(levels, told, strict=True) if one > LARGEST}
    if found:
        raise OverflowedError(Overflow([level.name for level in levels if level.name in found]))


def _held(part: Level, state: State) -> list[Tensor]:
    return [t for p in part.parameters.values() for t in state.get(p, {}).values()]


class Trial:
    """What a step changes before it moves a weight, copied so that it can be undone.

    state: the accumulators by parameter, as `Cadence` has them.
    """

    def __init__(self, state: State, levels: Iterable[Level]) -> None:
        self._state = {p: {k: t.clone() for k, t in held.items()} for p, held in state.items()}
        parts = [part for level in levels for part in level.with_start()]
        self._counts = [(part, part.tokens, part.bound) for part in parts]

    def undo(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Give the levels their counts back, and no gradients; returns the accumulators."""
        for part, tokens, bound in self._counts:
            part.tokens, part.bound = tokens, bound
            for parameter in part.parameters.values():
                parameter.grad = None
        return self._state
