"""What the trainer is given to read, and what it tells of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_pipeline import Corpus
from train.evaluate.perplexity import HeldOut
from train.optim.finite import NonFinite, Overflow
from train.spikes import LeftOut, Spike


class NonFiniteError(RuntimeError):
    """Too many steps were skipped or undone: infinite or NaN numbers, or spikes of the loss."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did. Rates and counts are over all ranks.

    level_norms, learning_rates: of the levels that fired; level_norms before clipping.
    """

    step: int
    tokens: int
    loss: float  # nats per token that counts
    grad_norm: float
    level_norms: dict[str, float]
    learning_rates: dict[str, float]
    tokens_per_second: float


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


@dataclass
class Corpora:
    """The opened data of a run."""

    train: list[Corpus]
    validation: Corpus
    domains: dict[str, Corpus] = field(default_factory=dict)  # held out, of a continual run

    def fingerprints(self) -> dict[str, Any]:
        """What the corpora hold, whatever their folders are called."""
        return {
            "train": [corpus.fingerprint for corpus in self.train],
            "validation": self.validation.fingerprint,
            "domains": {name: corpus.fingerprint for name, corpus in self.domains.items()},
        }

    def held_out_is_whole(self, evaluation: HeldOut | None) -> bool:
        """Whether an evaluation was over all held-out text: over every token that is predicted,
        which is all but the first of each document."""
        text = self.validation
        return evaluation is not None and evaluation.tokens == text.num_tokens - text.num_documents

    def held_out_changes(self, saved: dict[str, Any]) -> list[str]:
        """One line for each held-out corpus that was another when `saved`, the fingerprints of a
        checkpoint, were taken; training data that changed is refused by the loader."""
        now, domains = self.fingerprints(), saved.get("domains", {})
        changed = [("validation", saved.get("validation"), now["validation"])]
        changed += [(name, domains.get(name), one) for name, one in now["domains"].items()]
        return [
            f"held-out data ({name}) is not what it was at the checkpoint: losses over it do not "
            "compare with those before"
            for name, before, after in changed
            if before is not None and before != after
        ]
