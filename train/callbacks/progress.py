"""Progress on the terminal: a bar where there is one, a line now and then where there is not.

When the levels fire next does not fit beside the bar into 80 columns; it stands below.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_pipeline.redaction import redact
from train.callbacks.base import Callback

if TYPE_CHECKING:
    from train.evaluate.perplexity import HeldOut
    from train.optim.cadence import StepReport
    from train.records import SkippedStep, StepRecord
    from train.spikes import Rollback
    from train.trainer import Trainer

LINE_EVERY_SECONDS = 15.0


class Progress(Callback):
    """Loss, tokens/s, ETA and, for each slow level, how many tokens are left to its next firing."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._below: Any = None
        self._smooth: float | None = None
        self._last_line = 0.0
        self._began: tuple[float, int] | None = None  # when the first step ended, tokens at it

    def on_start(self, trainer: Trainer) -> None:
        for change in trainer.level_changes:
            self._write(f"resumed: {change}")
        if trainer.finished:
            self._write(f"all {trainer.clock.tokens:,} tokens of this run are trained already")
        elif trainer.clock.tokens >= trainer.target_tokens:
            self._write(
                f"nothing to train: {trainer.clock.tokens:,} tokens are trained already, and "
                f"training.stop_at_tokens is {trainer.target_tokens:,}"
            )
        if sys.stderr.isatty() and _columns():
            self._bar = tqdm(
                total=trainer.target_tokens,
                initial=trainer.clock.tokens,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                desc="train",
            )
            self._below = tqdm(bar_format="{desc}", dynamic_ncols=True, position=1, leave=False)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        smooth = self._smooth
        self._smooth = record.loss if smooth is None else 0.9 * smooth + 0.1 * record.loss
        waits = " ".join(
            f"{name} in {_short(trainer.clock.tokens_to_next(name))}"
            for name, period in trainer.clock.periods.items()
            if period > 0
        )
        domain = f"{trainer.domains.name} | " if trainer.domains else ""
        loss, levels = f"loss {self._smooth:.3f}", f"next: {waits}" if waits else ""
        if self._bar is not None:
            self._bar.set_postfix_str(loss, refresh=False)
            self._below.set_description_str(domain + levels, refresh=False)
            if self._bar.update(record.tokens - self._bar.n):
                self._below.refresh()
        elif time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            left = max(trainer.target_tokens - record.tokens, 0) / self._rate(record)
            self._write(
                f"{record.tokens:,}/{trainer.target_tokens:,} tokens | "
                f"{record.tokens_per_second:,.0f} tok/s | "
                + ("" if record.mfu is None else f"MFU {record.mfu:.1%} | ")
                + f"ETA {tqdm.format_interval(left)} | "
                + domain
                + " | ".join(filter(None, (loss, levels)))
            )

    def _rate(self, record: StepRecord) -> float:
        """Tokens a second since the first step, with all that lies between steps (evaluations,
        checkpoints); that of the step where none has gone by, as after a return to a checkpoint."""
        now = time.monotonic()
        if self._began is None or record.tokens <= self._began[1]:
            self._began = now, record.tokens
            return record.tokens_per_second
        return (record.tokens - self._began[1]) / (now - self._began[0])

    def on_skip(self, trainer: Trainer, record: SkippedStep) -> None:
        self._write(
            f"step skipped after {record.tokens:,} tokens: {record.problem} "
            f"({trainer.clock.skipped_tokens:,} tokens skipped so far)"
        )

    def on_rollback(self, trainer: Trainer, rollback: Rollback) -> None:
        self._write(
            f"back from {rollback.from_tokens:,} tokens to checkpoint {rollback.checkpoint}: "
            f"{rollback.spike}; {len(rollback.positions)} batches will be left out, from row "
            f"{rollback.positions[0]:,} on"
        )

    def on_flush(self, trainer: Trainer, pending: dict[str, int], report: StepReport) -> None:
        waited = ", ".join(f"{name} {_short(count)}" for name, count in pending.items() if count)
        self._write(f"flushed at {trainer.clock.tokens:,} tokens, pending until then: {waited}")

    def on_evaluation(self, trainer: Trainer, held_out: HeldOut) -> None:
        self._write(
            f"held out at {trainer.clock.tokens:,} tokens: loss {held_out.loss:.4f} | "
            f"perplexity {held_out.perplexity:.2f} | {held_out.bits_per_byte:.4f} bits per byte"
        )

    def on_domain_evaluation(self, trainer: Trainer, domain: str, held_out: HeldOut) -> None:
        self._write(
            f"held out of {domain} at {trainer.clock.tokens:,} tokens: loss {held_out.loss:.4f}"
        )

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        self._write(f"checkpoint {folder}")

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._below.close()
            self._bar.close()

    def _write(self, line: str) -> None:
        with suppress(OSError):  # the log may lie on a full disk
            tqdm.write(redact(line), file=sys.stderr)


def _columns() -> int:
    """Of the terminal; none where it has no size, as in some containers, and tqdm shows nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # not known: tqdm takes $COLUMNS
        return 80


def _short(tokens: int) -> str:
    """Tokens in at most five characters: 512, 12.3K, 4.0M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.1f}{unit}"
    return str(tokens)
