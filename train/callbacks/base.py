"""The contract of a callback: it may read everything of the trainer and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.evaluate.perplexity import HeldOut
    from train.optim.cadence import StepReport
    from train.records import SkippedStep, StepRecord
    from train.spikes import Rollback
    from train.trainer import Trainer


class Callback:
    """Every hook does nothing unless a subclass says otherwise. Runs on the first rank only,
    the profiler and faults on purpose excepted."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After every training step."""

    def on_skip(self, trainer: Trainer, record: SkippedStep) -> None:
        """After a step that was skipped: something was not finite, or its loss was a spike."""

    def on_rollback(self, trainer: Trainer, rollback: Rollback) -> None:
        """After the run went back to an earlier checkpoint because of a loss spike."""

    def on_flush(self, trainer: Trainer, pending: dict[str, int], report: StepReport) -> None:
        """After levels fired at the end of training; pending: the tokens that each still had."""

    def on_evaluation(self, trainer: Trainer, held_out: HeldOut) -> None:
        """After every evaluation."""

    def on_domain_evaluation(self, trainer: Trainer, domain: str, held_out: HeldOut) -> None:
        """At the end of each domain of a continual run, for every domain."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """When a checkpoint is complete: of one written beside training, at the next save."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, evaluation and save."""
