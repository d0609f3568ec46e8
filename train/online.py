"""Online adaptation: levels of a trained model that go on learning from the stream they read.

The cadence of training (Eq. 71) at test time: chosen CMS levels step every so many tokens on the
next-token loss of what has just been read, so that a later token sees the earlier updates, while
the memories carry on through the stream. Everything else stands still.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hope import HopeModel, ModelState
from hope.config import HopeConfig
from train.clock import TokenClock
from train.optim.build import build_cadence
from train.optim.cadence import Cadence
from train.optim.config import OptimizerConfig, ScheduleConfig
from train.optim.finite import OverflowedError
from train.parallel.ranks import Ranks
from train.parallel.reduction import GradientReduction


class OnlineAdapter:
    """Feeds a stream to a trained model and lets chosen levels of its CMS step as it reads.

    model: adapted in place; `reset` gives its trained weights back. every_tokens: the period, in
    tokens of a row, of each CMS level that learns; the others, and everything outside the CMS, do
    not move. lr: learning rate of all of them. optimizer: another choice than AdamW without weight
    decay at a constant rate; its lr, schedule and levels' lr_scale then hold (total_tokens: where
    a schedule ends).

    The stream is read in segments of as many tokens as divide every period, wherever `feed` cuts
    it: losses and weights do not depend on the cuts, to the bit. A segment is predicted before its
    tokens teach anything. A segment whose loss, gradient or carried state is not finite teaches
    nothing, and `clock.skipped_tokens` counts it; the memories go on from before it. It learns
    under `torch.no_grad` and `torch.inference_mode` too, and whatever `requires_grad` says.

    A context manager: leaving it resets the model. Raises ValueError for unknown levels, periods
    that are not whole tokens, and a nested CMS, in which one level's step sets another back.
    """

    def __init__(
        self,
        model: HopeModel,
        config: HopeConfig,
        every_tokens: Mapping[str, int],
        *,
        lr: float = 1e-3,
        optimizer: OptimizerConfig | None = None,
        total_tokens: int = 1,
    ) -> None:
        _check(config, every_tokens)
        constant = ScheduleConfig(name="constant")
        self.settings = optimizer or OptimizerConfig(lr=lr, weight_decay=0.0, schedule=constant)
        self.model, self.config = model, config
        self.every_tokens = dict(every_tokens)
        self.segment = math.gcd(*self.every_tokens.values())
        self.total_tokens = total_tokens
        self._build()
        self._trained = {
            name: parameter.detach().clone()
            for level in self.cadence.levels
            for name, parameter in level.parameters.items()
        }

    def _build(self) -> None:
        """The beginning of a stream: nothing read, nothing accumulated, no moments."""
        everything = build_cadence(self.model, self.config, self.settings)
        chosen = [level for level in everything.levels if level.name in self.every_tokens]
        own = {parameter for level in chosen for parameter in level.parameters.values()}
        ordered = [parameter for parameter in self.model.parameters() if parameter in own]
        reduction = GradientReduction(Ranks.alone())
        self.cadence = Cadence(chosen, ordered, self.settings.clip_norm, reduction)
        self.clock = TokenClock(self.every_tokens)
        self.state: ModelState | None = None
        self._waiting: Tensor | None = None  # read, and not yet predicted from

    @torch.inference_mode(False)
    @torch.enable_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Read on; returns the losses of the predictions that this completes.

        tokens: int of any size [B, T], the same B rows in every call; T may be anything. Returns
        nats [B, n], of consecutive tokens from the second of the stream on: n is a multiple of
        `segment`, and what is left waits for more, or for `rest`. Raises ValueError for another
        shape.
        """
        if tokens.ndim != 2 or tokens.shape[0] == 0:
            raise ValueError(f"feed takes tokens [rows, length], got {list(tokens.shape)}")
        tokens = tokens.to(torch.int64, copy=True)  # also out of inference mode
        waiting = tokens if self._waiting is None else self._waiting
        if waiting.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"the stream has {waiting.shape[0]} rows, got {tokens.shape[0]}; reset to begin "
                "another"
            )
        if self._waiting is not None:
            waiting = torch.cat([waiting, tokens], dim=1)
        losses = [tokens.new_zeros((tokens.shape[0], 0), dtype=torch.float32)]
        while waiting.shape[1] > self.segment:
            losses.append(self._learn(waiting[:, : self.segment + 1]))
            waiting = waiting[:, self.segment :]
        self._waiting = waiting.clone()
        return torch.cat(losses, dim=1)

    def rest(self) -> Tensor:
        """Losses [B, n] of what waits for a whole segment; teaches nothing and changes nothing."""
        if self._waiting is None or self._waiting.shape[1] < 2:
            rows = 0 if self._waiting is None else self._waiting.shape[0]
            return torch.zeros(rows, 0)
        with torch.no_grad():
            return self._predict(self._waiting)[0]

    def reset(self) -> None:
        """The trained weights, bit for bit, and the beginning of a stream."""
        self._put(self._trained)
        self._build()

    def __enter__(self) -> OnlineAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()

    def _predict(self, tokens: Tensor) -> tuple[Tensor, ModelState]:
        """Loss of each token from the second on, given those before, and the state after them."""
        state = self.state
        if state is None:
            state = self.model.initial_state(tokens.shape[0], decoding=True).detach()
        logits, after = self.model(tokens[:, :-1], state)
        labels = tokens[:, 1:]
        nats = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return nats.view(labels.shape), after.detach()

    def _learn(self, tokens: Tensor) -> Tensor:
        self.cadence.drop()  # a gradient that was there is not of this stream
        with self._only_chosen_learn():
            losses, after = self._predict(tokens)
            total = losses.sum()
            total.backward()
        carried = 0.0 if after.is_finite() else math.nan
        _, problem = self.cadence.agree([float(total.detach()), carried])
        if problem:
            self.cadence.drop()
            self.clock.skip(self.segment)
            return losses.detach()
        before = self.clock.state_dict()
        firing = self.clock.advance(self.segment)
        try:
            self.cadence.step(firing, losses.numel(), self._rate, self.clock.tokens)
        except OverflowedError:
            self.clock.load_state_dict(before)
            self.cadence.drop()
            self.clock.skip(self.segment)
            return losses.detach()
        self.state = after
        return losses.detach()

    def _rate(self, level: str) -> float:
        return self.clock.learning_rate(self.settings.level(level), self.total_tokens)

    @contextmanager
    def _only_chosen_learn(self) -> Iterator[None]:
        """Nothing else gets a gradient, and none that was there is touched."""
        own = {p for level in self.cadence.levels for p in level.parameters.values()}
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(parameter in own)
        try:
            yield
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for level in self.cadence.levels:
            for name, parameter in level.parameters.items():
                parameter.copy_(weights[name])
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the stream has left behind: tensors and plain data, for torch.save."""
        optimizer, plain = self.cadence.state_dict()
        weights = {
            name: parameter
            for level in self.cadence.levels
            for name, parameter in level.parameters.items()
        }
        carried = {} if self.state is None else self.state.named_tensors()
        return {
            "every_tokens": dict(self.every_tokens),
            "weights": {name: tensor.detach().clone() for name, tensor in weights.items()},
            "optimizer": {name: tensor.clone() for name, tensor in optimizer.items()},
            "carried": {name: tensor.clone() for name, tensor in carried.items()},
            "waiting": None if self._waiting is None else self._waiting.clone(),
            "cadence": plain,
            "clock": self.clock.state_dict(),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a stream where `state_dict` left it, to the bit.

        Raises ValueError when it was left by an adapter with other levels or periods.
        """
        if state["every_tokens"] != self.every_tokens:
            raise ValueError(
                f"the stream was adapted with every_tokens={state['every_tokens']}, "
                f"not {self.every_tokens}"
            )
        self._build()
        self._put(state["weights"])
        kept = {name: tensor.clone() for name, tensor in state["optimizer"].items()}
        self.cadence.load_state_dict(kept, state["cadence"])
        self.clock.load_state_dict(state["clock"])
        self._waiting = state["waiting"]
        if state["carried"]:
            rows = self._waiting.shape[0] if self._waiting is not None else 1
            empty = self.model.initial_state(rows, decoding=True)
            self.state = empty.map(lambda name, _: state["carried"][name].clone())


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _check(config: HopeConfig, every_tokens: Mapping[str, int]) -> None:
    known = [level.name for level in config.cms.levels]
    if not every_tokens:
        raise ValueError(f"choose at least one CMS level to adapt; the model has {_listed(known)}")
    if unknown := sorted(set(every_tokens) - set(known)):
        what = "level" if len(unknown) == 1 else "levels"
        raise ValueError(f"no CMS {what} {_listed(unknown)}; the model has {_listed(known)}")
    for name, every in every_tokens.items():
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"level {name!r} must step every 1 or more tokens, got {every}")
    if config.cms.mode == "nested" and len(known) > 1:
        raise ValueError(
            "a nested CMS can't be adapted online: a level that steps would set the next faster "
            "one back to its learned start"
        )
