"""Cadence: every level takes its optimizer step at its own pace, on an exact gradient sum.

Gradients arrive as sums over tokens, not means. A level that does not fire adds its sum to a
float32 accumulator and counts the tokens in it; when it fires, its optimizers take one step on the
accumulated sum divided by those tokens, and the accumulator is empty again (Eq. 71). A level whose
accumulator is empty uses the step's own gradient, so with every period at most one step this is
ordinary training to the bit, and a level that fires every N steps takes exactly the step of one
batch N times as large.

In a nested CMS (Eq. 72) every level but the slowest has a start theta0, and the next slower level's
period is its context. The paper leaves the rest open; decided here:

* theta0 is state of this optimizer, so that checkpoints hold and reshard it like a moment. The
  model computes with the live weights, in evaluation too.
* theta0 collects the gradients that the live weights saw over the context. When the slower level
  fires, theta0 takes one step on their mean, first order: an optimizer step like the level's,
  with moments of its own and the level's learning rate. The live weights then become a copy of it.
* That step replaces the level's own, whose result would be set back at once; the level's
  accumulator is dropped, for theta0 has had the same gradients. Its moments stay: (72) sets back
  the memory's value. Dropping them with it was measured 0.010 nats worse on both of two seeds.
* Periods are multiples of one another, so a level that fires ends the context of every faster one.
* theta0's gradient takes the place of the level's in the one norm that is clipped. So with every
  period at most one step this too is ordinary training to the bit, and with slower levels that
  never fire it is the sequential CMS to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.optim.finite import NonFinite, OverflowedError, Trial, check_sums, may_overflow, most
from train.optim.level import START, Level
from train.optim.norms import Norms, shrink
from train.parallel.placement import Stored, local, placed
from train.parallel.reduction import GradientReduction

ACCUMULATOR = "accumulated_grad"
VALUE = "value"

Contributions = Sequence[Tensor | None]
"""This step's gradient of each parameter of a level, in order, as its accumulator takes it."""


@dataclass(frozen=True)
class StepReport:
    """What one call of `Cadence.step` did.

    grad_norm: over everything that fired, as it was clipped; level_norms: of each level that
    fired, before any clipping; learning_rates: that they fired with.
    """

    grad_norm: float
    level_norms: dict[str, float]
    learning_rates: dict[str, float]


class Cadence:
    """Steps levels when they fire and accumulates for those that don't.

    state[parameter]["accumulated_grad"], float32, exists only while something is pending. Its shape
    is the parameter's; over several ranks that hold whole parameters, with reduce "every_step", it
    is this rank's share of the rows.
    """

    def __init__(
        self,
        levels: list[Level],
        parameters: Iterable[nn.Parameter],
        clip_norm: float,
        reduction: GradientReduction,
        norms: Norms | None = None,
        late: GradientReduction | None = None,
    ) -> None:
        """levels: every parameter in exactly one; parameters: all, in the model's order, in which
        norms are added up; late: what adds up levels of reduce: at_update, if not `reduction`."""
        self.norms = norms or Norms()
        self.levels = levels
        self.clip_norm = clip_norm
        self.reduction = reduction
        self._late = late or reduction
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._live = list(parameters)
        start_of = {live: start for level in levels for live, start in level.pairs()}
        self._ordered = [
            p for live in self._live for p in (live, start_of.get(live)) if p is not None
        ]
        self._with_gradient: set[nn.Parameter] | None = None
        self._most = {level.name: 0.0 for level in levels}  # of this step's numbers, all ranks'

    def gradients(self) -> list[Tensor]:
        """What this rank has of this step's, before `agree` looks at them."""
        return [local(p.grad) for p in self._live if p.grad is not None]

    @torch.no_grad()
    def agree(self, numbers: Sequence[float] = ()) -> tuple[list[float], NonFinite | None]:
        """Let the ranks tell each other about this step, before any gradient is added up.

        Returns `numbers` added over the ranks, and where something is not finite: a number, or a
        gradient. One small all-reduce. The gradients stay as they are, for `step` or `drop`.
        """
        ranks, world = self.reduction.ranks, self.reduction.world
        present = [float(parameter.grad is not None) for parameter in self._live]
        own = [most(level, self.state) for level in self.levels]
        bad = not all(map(math.isfinite, [*own, *numbers]))
        bad_ranks = [float(bad and rank == world.rank) for rank in range(world.size)]
        told = [*own, *bad_ranks, *numbers]
        if ranks.size == world.size:
            sums = iter(world.sum([*present, *told]))
        else:  # stages of a pipeline have different parameters
            sums = iter([*ranks.sum(present), *world.sum(told)])
        self._with_gradient = {p for p in self._live if next(sums) > 0}
        self._most = {level.name: next(sums) for level in self.levels}
        levels = [name for name, size in self._most.items() if not math.isfinite(size)]
        where = [rank for rank in range(world.size) if next(sums) > 0]
        return list(sums), NonFinite(where, levels) if where else None

    @torch.no_grad()
    def step(
        self,
        firing: set[str],
        tokens: int,
        rate: Callable[[str], float],
        clock_tokens: int = 0,
    ) -> StepReport:
        """End a step whose `.grad`s are sums over `tokens` tokens (over all ranks).

        firing: names of the levels that fire; rate: a level's learning rate by its name;
        clock_tokens: the token count now, for optimizers that keep a slow momentum. Gradients are
        consumed. Raises FloatingPointError, with weights and accumulators untouched, when a
        gradient is not finite on any rank; OverflowedError, on all ranks alike, when a sum of
        finite ones is not. That step is then to be dropped.
        """
        if tokens <= 0:
            raise ValueError("a step needs at least one token that counts in the loss")
        if self._with_gradient is None and (problem := self.agree()[1]):
            self._with_gradient = None
            raise FloatingPointError(str(problem))
        trial = Trial(self.state, self.levels) if may_overflow(self.levels, self._most) else None
        contributions = [self._contributions(level, firing) for level in self.levels]
        self._with_gradient = None
        try:
            return self._advance(firing, tokens, contributions, rate, clock_tokens, trial)
        except OverflowedError:
            if trial is not None:
                self.state = trial.undo()
            raise

    def drop(self) -> None:
        """Forget this step's gradients: nothing moves, and no accumulator has seen them."""
        self._with_gradient = None
        for parameter in self._live:
            parameter.grad = None

    @torch.no_grad()
    def flush(self, rate: Callable[[str], float], clock_tokens: int = 0) -> StepReport | None:
        """Fire every level that has gradients pending, as if its period ended now; None when
        nothing is. Raises OverflowedError, with no weight moved, when a sum of them overflows."""
        pending = {level.name for level in self.levels if _pending(level)}
        if not pending:
            return None
        nothing: list[Contributions] = [[None] * len(level.parameters) for level in self.levels]
        self._most = dict.fromkeys(self._most, 0.0)
        return self._advance(pending, 0, nothing, rate, clock_tokens)

    @property
    def pending_tokens(self) -> dict[str, int]:
        """Tokens whose gradients wait in each level's accumulator."""
        return {level.name: level.tokens for level in self.levels}

    def _contributions(self, level: Level, firing: set[str]) -> Contributions:
        """Take the gradients of a level, added over the ranks where its policy says so."""
        assert self._with_gradient is not None
        found: list[Tensor | None] = []
        for parameter in level.parameters.values():
            grad, parameter.grad = parameter.grad, None
            if parameter in self._with_gradient:
                grad = torch.zeros_like(parameter) if grad is None else grad
            found.append(grad)
        if _sums_every_step(level) and not self._fires_alone(level, firing):
            shares = iter(self.reduction.scatter([grad for grad in found if grad is not None]))
            return [None if grad is None else next(shares) for grad in found]
        return found

    def _fires_alone(self, level: Level, firing: set[str]) -> bool:
        """Whether this step's gradients are all that the level has: one all-reduce will do."""
        return level.name in firing and level.tokens == 0 and level.start is None

    def _advance(
        self,
        firing: set[str],
        tokens: int,
        contributions: list[Contributions],
        rate: Callable[[str], float],
        clock_tokens: int,
        trial: Trial | None = None,
    ) -> StepReport:
        """Accumulate or fire every level, given its contributions of `tokens` tokens; in a trial,
        look at all sums before a weight is moved."""
        moving: list[tuple[str, Level]] = []
        for level, given in zip(self.levels, contributions, strict=True):
            alone = self._fires_alone(level, firing)
            level.take(tokens, self._most[level.name])
            if level.start is not None:
                level.start.take(tokens, self._most[level.name])
                if level.reset_by in firing:
                    self._forget(level)
                    self._ready(level.start, given, alone)
                    moving.append((level.name, level.start))
                    continue
                self._accumulate(level.start, [None if g is None else g.clone() for g in given])
            if level.name in firing:
                self._ready(level, given, alone)
                moving.append((level.name, level))
            else:
                self._accumulate(level, given)
        norm, level_norms = self._clip([level for _, level in moving])
        held = None if trial is None else self.state
        check_sums(self.levels, norm, level_norms, held, self.reduction.world)
        rates = {}
        for name, level in moving:
            rates[level.name] = rate(name)
            level.step(rates[level.name], clock_tokens)
            level.empty()
        for level in self.levels:
            if level.reset_by in firing:
                for live, start in level.pairs():
                    live.copy_(start)
        return StepReport(norm, level_norms, rates)

    def _forget(self, level: Level) -> None:
        """Drop the gradients that a level holds: its context ends now, and theta0 has them."""
        for parameter in level.parameters.values():
            self.state.pop(parameter, None)
        level.empty()

    def _accumulate(self, level: Level, contributions: Contributions) -> None:
        """Add to the accumulators; they may keep the tensors given."""
        for parameter, given in zip(level.parameters.values(), contributions, strict=True):
            if given is None:
                continue
            held = self.state.get(parameter)
            if held is None:
                device = "cpu" if level.accumulator_device == "cpu" else given.device
                self.state[parameter] = {ACCUMULATOR: given.to(device, torch.float32)}
            else:
                held[ACCUMULATOR].add_(given.to(held[ACCUMULATOR].device))

    def _ready(self, level: Level, contributions: Contributions, alone: bool) -> None:
        """Put the mean gradient over everything pending into `.grad`, and empty the accumulator."""
        parameters: list[nn.Parameter] = []
        totals: list[Tensor] = []
        for parameter, given in zip(level.parameters.values(), contributions, strict=True):
            held = self.state.pop(parameter, None)
            total = given if held is None else held[ACCUMULATOR].to(parameter.device)
            if total is None:
                continue
            if held is not None and given is not None:
                total.add_(given)
            parameters.append(parameter)
            totals.append(total)
        if _sums_every_step(level) and not alone:
            totals = self.reduction.gather(totals, [parameter.shape for parameter in parameters])
        else:
            (self.reduction if _sums_every_step(level) else self._late).add(totals)
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total.div_(level.tokens).to(parameter.dtype)

    def _clip(self, moving: list[Level]) -> tuple[float, dict[str, float]]:
        """Clip each level that has a norm of its own, then all to one norm of at most clip_norm.

        Returns the one norm, and each level's before any clipping.
        """
        norms = self.norms.of(p for level in moving for p in level.parameters.values())
        level_norms = {}
        for level in moving:
            own = {p: norms[p] for p in level.parameters.values() if p in norms}
            level_norms[level.name] = norm = self.norms.total(own)
            if level.clip_norm is not None and norm > level.clip_norm:
                shrink(own, level.clip_norm, norm)
                norms |= self.norms.of(own)
        parameters = [parameter for parameter in self._ordered if parameter in norms]
        norm = self.norms.total({parameter: norms[parameter] for parameter in parameters})
        if norm > self.clip_norm:
            shrink(parameters, self.clip_norm, norm)
        return norm, level_norms

    def _parts(self) -> Iterator[tuple[str, Level]]:
        """Every level by its name, and its start as `NAME@start`."""
        for level in self.levels:
            yield level.name, level
            if level.start is not None:
                yield level.name + START, level.start

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by `parameter name/key`, plain data): optimizer states, accumulators, starts.

        An accumulator that is summed every step is one tensor whatever the ranks; one that is
        summed at the update is saved as each rank has it, so that a resume is exact to the bit.
        """
        tensors: dict[str, Tensor] = {}
        for key, level in self._parts():
            for name, parameter in level.parameters.items():
                held = level.optimizer_state(parameter)
                if parameter in self.state:
                    pending = self.state[parameter][ACCUMULATOR]
                    if _sums_every_step(level) or not self._late.is_shared(pending):
                        held[ACCUMULATOR] = self.reduction.as_dtensor(pending, parameter.shape)
                    else:
                        held[f"{ACCUMULATOR}.rank{self._late.ranks.rank}"] = pending
                if key.endswith(START):
                    held[VALUE] = parameter.detach()
                tensors |= {f"{name}/{part}": value for part, value in held.items()}
        return tensors, {"tokens": {key: level.tokens for key, level in self._parts()}}

    @torch.no_grad()
    def load_state_dict(
        self,
        tensors: Mapping[str, Tensor | Stored],
        plain: dict[str, Any],
        elsewhere: Container[str] = (),
    ) -> None:
        """Take back what `state_dict` gave, whole, on any number of ranks and with any `reduce`.

        elsewhere: names of parameters of the model that other ranks have. A level that the state
        does not know begins with nothing. Raises ValueError for state of unknown parameters and for
        a start that is missing.
        """
        self.state.clear()
        remaining: dict[str, dict[str, Tensor | Stored]] = {}
        for full_name, value in tensors.items():
            name, _, part = full_name.rpartition("/")
            remaining.setdefault(name, {})[part] = value
        for key, level in self._parts():
            level.tokens, level.bound = plain["tokens"].get(key, 0), None
            for optimizer in level.optimizers:
                optimizer.state.clear()
            for name, parameter in level.parameters.items():
                held = remaining.pop(name, {})
                if key.endswith(START):
                    if VALUE not in held:
                        raise ValueError(f"checkpoint holds no {name}: it is not of a nested CMS")
                    parameter.copy_(placed(held.pop(VALUE), parameter))
                pending = {k: held.pop(k) for k in list(held) if k.startswith(ACCUMULATOR)}
                if pending:
                    self._take_up(level, parameter, pending)
                if held:
                    state = {k: placed(value, parameter) for k, value in held.items()}
                    level.set_optimizer_state(parameter, state)
        unknown = sorted(n for n in remaining if n.removesuffix(START) not in elsewhere)
        if unknown:
            raise ValueError(f"checkpoint holds state of unknown parameters: {unknown}")

    def _take_up(
        self, level: Level, parameter: nn.Parameter, saved: dict[str, Tensor | Stored]
    ) -> None:
        """Make this rank's accumulator of what one or several ranks had in theirs."""
        ranks = self._late.ranks
        by_rank = {int(k.rpartition("rank")[2]): v for k, v in saved.items() if "rank" in k}
        if self._late.is_shared(parameter) and not _sums_every_step(level):
            if len(saved) == len(by_rank) == ranks.size:
                own = placed(by_rank[ranks.rank], parameter)
            else:
                own = _sum([placed(saved[key], parameter) for key in _in_order(saved)])
                own = own if ranks.rank == 0 else torch.zeros_like(own)
        else:
            parts = [placed(saved[key], parameter) for key in _in_order(saved)]
            own = self.reduction.share(_sum(parts))
        device = "cpu" if level.accumulator_device == "cpu" else parameter.device
        self.state[parameter] = {ACCUMULATOR: own.to(device)}


def _pending(level: Level) -> bool:
    return level.tokens > 0 or (level.start is not None and level.start.tokens > 0)


def _sums_every_step(level: Level) -> bool:
    return level.reduce == "every_step"


def _in_order(saved: dict[str, Tensor | Stored]) -> list[str]:
    """The keys of the ranks' accumulators, in the order of their ranks."""
    return sorted(saved, key=lambda key: (len(key), key))


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for other in parts[1:]:
        total.add_(other)
    return total
