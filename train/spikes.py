"""Loss spikes: found by a robust statistic, then left out, or undone by going back.

A loss is a spike when it lies more than `threshold` robust deviations (1.4826 times the median
absolute deviation) above the median of the last `window` losses of the same domain that were none.
It is the loss over all ranks, so all of them find the same spikes; window and findings are in the
checkpoint.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field

from train.section import Section

SMALLEST_DEVIATION = 0.005  # of the median: losses that agree by chance make no spikes


class SpikesConfig(Section):
    """What happens when the loss of a step jumps.

    action: "none": it is not looked for; "skip": the batch is not trained on; "rollback": training
        goes on from the newest checkpoint that lies before the last skip_batches batches, and
        leaves those out; where there is none, as "skip".
    window: how many losses it is compared with; before there are so many nothing is a spike;
        threshold: in robust deviations.
    max_rollbacks: after more than so many the run stops with a checkpoint, exit status 1.
    """

    action: Literal["none", "skip", "rollback"] = "none"
    window: int = Field(64, ge=8, le=1 << 20)
    threshold: float = Field(10.0, gt=0)
    skip_batches: int = Field(4, ge=1)
    max_rollbacks: int = Field(5, ge=0)


@dataclass(frozen=True)
class Spike:
    """A loss far above its predecessors."""

    loss: float
    median: float
    deviations: float
    undo: bool  # whether to go back for it

    def __str__(self) -> str:
        return (
            f"the loss {self.loss:.4f} lies {self.deviations:.1f} robust deviations above the "
            f"median {self.median:.4f}"
        )


@dataclass(frozen=True)
class LeftOut:
    """A batch that a rollback leaves out."""

    rollback: int  # which one, from 1

    def __str__(self) -> str:
        return f"its batch is left out since rollback {self.rollback}"


@dataclass(frozen=True)
class Rollback:
    """A return to a checkpoint. positions: first rows of the batches left out from now on."""

    number: int
    checkpoint: str
    from_tokens: int
    positions: tuple[int, ...]
    spike: Spike


class SpikeWatch:
    """The losses of a run as they come.

    left_out: {(first row, row after the last) of what a rollback leaves out: which one}. Rows, not
    batches: a resume may have batches of another size.
    """

    def __init__(self, config: SpikesConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.domain = 0  # whose losses they are
        self.left_out: dict[tuple[int, int], int] = {}
        self.rollbacks = 0

    def leaves_out(self, position: int, rows: int) -> LeftOut | None:
        """Whether the batch of so many rows that begins at this row of the stream is not to be
        trained on, because any of them is left out."""
        found = [
            rollback
            for (first, after), rollback in self.left_out.items()
            if first < position + rows and position < after
        ]
        return LeftOut(max(found)) if found else None

    def check(self, loss: float, domain: int = 0) -> Spike | None:
        """Compare a loss with those before it; one that is no spike joins them. Those of another
        domain say nothing of it, and are forgotten."""
        if self.config.action == "none":
            return None
        if domain != self.domain:
            self.losses.clear()
            self.domain = domain
        if len(self.losses) == self.config.window:
            middle = median(self.losses)
            spread = 1.4826 * median(abs(value - middle) for value in self.losses)
            spread = max(spread, SMALLEST_DEVIATION * abs(middle), sys.float_info.min)
            deviations = (loss - middle) / spread
            if deviations > self.config.threshold:
                return Spike(loss, middle, deviations, self.config.action == "rollback")
        self.losses.append(loss)
        return None

    def leave_out(self, positions: tuple[int, ...], rows: int) -> int:
        """From now on these batches, of so many rows, are left out; returns the number of the
        rollback."""
        self.rollbacks += 1
        self.left_out |= {(first, first + rows): self.rollbacks for first in positions}
        return self.rollbacks

    def state_dict(self) -> dict[str, Any]:
        """The losses compared with, and what is left out, as plain data."""
        return {
            "losses": list(self.losses),
            "domain": self.domain,
            "left_out": [[*span, rollback] for span, rollback in sorted(self.left_out.items())],
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; what has been left out since then stays left out."""
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.domain = state.get("domain", 0)  # older ones looked at no domain
        for first, *after, rollback in state["left_out"]:  # older ones have the first row alone
            self.left_out[first, after[0] if after else first + 1] = rollback
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
