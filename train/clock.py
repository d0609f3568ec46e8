"""The token clock: the one source of truth for what fires when, and at which learning rate.

With n the tokens consumed so far by all ranks together, a level of period C fires at the end of
the step in which floor(n / C) grows (Eq. 71).
"""

from __future__ import annotations

import math
from typing import Any

from train.config import ScheduleConfig


class TokenClock:
    """Counts tokens and steps, and tells which levels fire.

    periods: tokens between firings by level name; 0 for a level that fires every step.
    """

    def __init__(self, periods: dict[str, int]) -> None:
        self.periods = dict(periods)
        self.tokens = 0
        self.steps = 0
        self.firings = dict.fromkeys(self.periods, 0)

    def advance(self, step_tokens: int) -> set[str]:
        """End a step of `step_tokens` tokens; return the names of the levels that fire now."""
        before, self.tokens = self.tokens, self.tokens + step_tokens
        self.steps += 1
        firing = {
            name
            for name, period in self.periods.items()
            if period == 0 or self.tokens // period > before // period
        }
        for name in firing:
            self.firings[name] += 1
        return firing

    def tokens_to_next(self, name: str) -> int:
        """Tokens until level `name` fires next; 0 for a level that fires every step."""
        period = self.periods[name]
        return 0 if period == 0 else period - self.tokens % period

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "steps": self.steps, "firings": dict(self.firings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to other levels."""
        if set(state["firings"]) != set(self.periods):
            raise ValueError(
                f"checkpoint has the levels {sorted(state['firings'])}, "
                f"this model {sorted(self.periods)}"
            )
        self.tokens, self.steps = state["tokens"], state["steps"]
        self.firings = dict(state["firings"])


def learning_rate(schedule: ScheduleConfig, peak: float, tokens: int, total_tokens: int) -> float:
    """Learning rate at token count `tokens`: linear warm-up from 0, then the schedule's shape."""
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    if schedule.name == "constant":
        return peak
    span = max(1, total_tokens - schedule.warmup_tokens)
    progress = min(1.0, (tokens - schedule.warmup_tokens) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * cosine)
