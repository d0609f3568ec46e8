"""What the trainer tells of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from train.optim.finite import NonFinite, Overflow
from train.spikes import LeftOut, Spike


class NonFiniteError(RuntimeError):
    """Too many steps were skipped or undone: infinite or NaN numbers, or spikes of the loss."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did. Rates and counts are over all ranks.

    level_norms, learning_rates: of the levels that fired; level_norms before clipping.
    data_seconds: that this rank waited for its batch. tflops_per_rank, mfu: see
    `train.utilisation`, mfu None where the device's peak is not known. peak_memory: bytes of this
    rank, since it began.
    """

    step: int
    tokens: int
    loss: float  # nats per token that counts
    grad_norm: float
    level_norms: dict[str, float]
    learning_rates: dict[str, float]
    tokens_per_second: float
    data_seconds: float
    tflops_per_rank: float
    mfu: float | None
    peak_memory: int


@dataclass(frozen=True)
class NothingCounts:
    """A batch without any token that counts in the loss, such as one of damaged frames only."""

    def __str__(self) -> str:
        return "no token of its batch counts in the loss"


Problem = NonFinite | Overflow | Spike | LeftOut | NothingCounts
"""Why a step was skipped."""


@dataclass(frozen=True)
class SkippedStep:
    """A step that was read, and not trained on."""

    tokens: int  # trained on before it
    step_tokens: int
    position: int  # in the stream, of its batch's first row
    problem: Problem
