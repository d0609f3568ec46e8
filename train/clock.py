"""The token clock: the one source of truth for what fires when, and at which learning rate.

With n the tokens trained on so far by all ranks together, a level of period C fires at the end of
the step in which floor(n / C) grows (Eq. 71). Tokens of a skipped step are not trained on: they
are counted, and move nothing.
"""

from __future__ import annotations

import math
from typing import Any

from train.optim.config import LevelSettings, ScheduleConfig


class TokenClock:
    """Counts tokens and steps, and tells which levels fire.

    periods: tokens between firings by level name; 0 for a level that fires every step.
    tokens, steps: trained on; skipped_tokens, skipped_steps: read, and left out;
    skipped_in_a_row: steps skipped since the last one that was not.
    """

    def __init__(self, periods: dict[str, int]) -> None:
        self.periods = dict(periods)
        self.tokens = 0
        self.steps = 0
        self.firings = dict.fromkeys(self.periods, 0)
        self.skipped_tokens = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0

    def advance(self, step_tokens: int) -> set[str]:
        """End a step of `step_tokens` tokens; return the names of the levels that fire now."""
        before, self.tokens = self.tokens, self.tokens + step_tokens
        self.steps += 1
        self.skipped_in_a_row = 0
        firing = {
            name
            for name, period in self.periods.items()
            if period == 0 or self.tokens // period > before // period
        }
        for name in firing:
            self.firings[name] += 1
        return firing

    def skip(self, step_tokens: int) -> None:
        """Count a step of `step_tokens` tokens that was not trained on."""
        self.skipped_tokens += step_tokens
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    @property
    def tokens_read(self) -> int:
        """Tokens taken from the loader, trained on or skipped."""
        return self.tokens + self.skipped_tokens

    def tokens_to_next(self, name: str) -> int:
        """Tokens until level `name` fires next; 0 for a level that fires every step."""
        period = self.periods[name]
        return 0 if period == 0 else period - self.tokens % period

    def learning_rate(self, level: LevelSettings, total_tokens: int) -> float:
        """The learning rate of a level now, in a training of `total_tokens`."""
        return learning_rate(level.schedule, level.peak_lr, self.tokens, total_tokens)

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "steps": self.steps,
            "firings": dict(self.firings),
            "skipped_tokens": self.skipped_tokens,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` was taken; a level that it does not know has not fired yet.

        A period may differ from the one that the state was taken with: the level then fires next
        when a multiple of its new period is passed. Raises ValueError for a level that is gone.
        """
        if gone := sorted(set(state["firings"]) - set(self.periods)):
            raise ValueError(
                f"checkpoint has the levels {gone}, which are not among {sorted(self.periods)}"
            )
        self.tokens, self.steps = state["tokens"], state["steps"]
        self.firings = dict.fromkeys(self.periods, 0) | state["firings"]
        self.skipped_tokens, self.skipped_steps = state["skipped_tokens"], state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]


def learning_rate(schedule: ScheduleConfig, peak: float, tokens: int, total_tokens: int) -> float:
    """Learning rate at token count `tokens`: linear warm-up from 0, then the schedule's shape."""
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    if schedule.name == "constant":
        return peak
    start = schedule.warmup_tokens
    if schedule.name == "wsd":
        start = total_tokens - (schedule.decay_tokens or 0)
    progress = min(1.0, max(0, tokens - start) / max(1, total_tokens - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * shape)
