"""metrics.jsonl and the loss curve of a run folder, written as the run goes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.callbacks.base import Callback
from train.line_file import LineFile, tell
from train.run_folder import METRICS, PLOTS

if TYPE_CHECKING:
    from train.evaluate.perplexity import HeldOut
    from train.optim.cadence import StepReport
    from train.records import SkippedStep, StepRecord
    from train.spikes import Rollback
    from train.trainer import Trainer

LOSS_CURVE = "loss.png"
DRAWN_EVERY_S = 300.0


class Metrics(Callback):
    """One JSON object a line: {"kind": "step" | "skip" | "rollback" | "flush" | "evaluation" |
    "domain_evaluation", "tokens": n, ...}.

    On resume and on a return to a checkpoint, lines past it are dropped: those steps are about to
    happen again. "position": the row of the stream with which a skipped batch begins. The curve is
    drawn with a checkpoint, every five minutes at most, and at the end.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS
        self.plot_path = run_dir / PLOTS / LOSS_CURVE
        self._lines = LineFile(self.path)
        self._drawn = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:
        rows = [row for row in _rows(self._lines.text()) if _stays(row, trainer)]
        self._lines.replace("".join(json.dumps(row) + "\n" for row in rows))

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._append(
            {
                "kind": "step",
                "step": record.step,
                "tokens": record.tokens,
                "loss": record.loss,
                "grad_norm": record.grad_norm,
                "level_norms": record.level_norms,
                "lr": record.learning_rates,
                "tokens_per_second": record.tokens_per_second,
                "trained_seconds": trainer.trained_seconds,
            }
        )

    def on_skip(self, trainer: Trainer, record: SkippedStep) -> None:
        self._append(
            {
                "kind": "skip",
                "tokens": record.tokens,
                "step_tokens": record.step_tokens,
                "skipped_tokens": trainer.clock.skipped_tokens,
                "position": record.position,
                "why": str(record.problem),
                "ranks": getattr(record.problem, "ranks", []),
                "levels": getattr(record.problem, "levels", []),
            }
        )

    def on_rollback(self, trainer: Trainer, rollback: Rollback) -> None:
        self.on_start(trainer)
        self._append(
            {
                "kind": "rollback",
                "tokens": trainer.clock.tokens,
                "skipped_tokens": trainer.clock.skipped_tokens,
                "number": rollback.number,
                "checkpoint": rollback.checkpoint,
                "from_tokens": rollback.from_tokens,
                "left_out_positions": rollback.positions,
                "why": str(rollback.spike),
            }
        )

    def on_flush(self, trainer: Trainer, pending: dict[str, int], report: StepReport) -> None:
        self._append(
            {
                "kind": "flush",
                "tokens": trainer.clock.tokens,
                "pending_tokens": {name: count for name, count in pending.items() if count},
                "grad_norm": report.grad_norm,
                "level_norms": report.level_norms,
                "lr": report.learning_rates,
            }
        )

    def on_evaluation(self, trainer: Trainer, held_out: HeldOut) -> None:
        self._append(
            {
                "kind": "evaluation",
                "tokens": trainer.clock.tokens,
                "loss": held_out.loss,
                "perplexity": held_out.perplexity,
                "bits_per_byte": held_out.bits_per_byte,
                "predicted_tokens": held_out.tokens,
                "trained_seconds": trainer.trained_seconds,
            }
        )

    def on_domain_evaluation(self, trainer: Trainer, domain: str, held_out: HeldOut) -> None:
        assert trainer.domains is not None
        self._append(
            {
                "kind": "domain_evaluation",
                "tokens": trainer.clock.tokens,
                "domain": domain,
                "domains_trained": trainer.domains.names[: trainer.domains_evaluated],
                "loss": held_out.loss,
                "perplexity": held_out.perplexity,
                "bits_per_byte": held_out.bits_per_byte,
                "predicted_tokens": held_out.tokens,
            }
        )

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        if time.monotonic() - self._drawn > DRAWN_EVERY_S:
            self._draw()

    def on_end(self, trainer: Trainer) -> None:
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        try:
            plot_loss({self.path.parent.name: _rows(self._lines.text())}, self.plot_path)
        except OSError as error:
            tell(f"{self.plot_path} can't be written ({error.strerror})")

    def _append(self, row: dict[str, Any]) -> None:
        self._lines.add(json.dumps(row))


def _stays(row: dict[str, Any], trainer: Trainer) -> bool:
    """Whether a line tells of something that the trainer, as it is now, has behind it."""
    clock = trainer.clock
    if row["kind"] == "evaluation":
        return bool(row["tokens"] <= trainer.evaluated_tokens)
    if row["kind"] == "domain_evaluation":
        return len(row["domains_trained"]) <= trainer.domains_evaluated
    if row["kind"] == "rollback" and row["number"] > trainer.spikes.rollbacks:
        return False
    at = (row["tokens"], row.get("skipped_tokens", 0))
    return at <= (clock.tokens, clock.skipped_tokens)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl. One that a crash cut short is left out, and so is what
    something else wrote there. Raises OSError where the file can't be read."""
    return _rows(path.read_text()) if path.exists() else []


def _rows(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"kind", "tokens"} <= row.keys():
            rows.append(row)
    return rows


def plot_loss(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw training (thin) and held-out (dots) loss of each run, over tokens and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    # matplotlib's own layouts draw everything twice, which takes as long as the picture.
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.14, top=0.97, wspace=0.04)
    for color, (name, rows) in enumerate(runs.items()):
        for axis, key in zip(axes, ("tokens", "trained_seconds"), strict=True):
            steps = [row for row in rows if row["kind"] == "step"]
            held_out = [row for row in rows if row["kind"] == "evaluation"]
            axis.plot(
                [row[key] for row in steps],
                _smooth([row["loss"] for row in steps]),
                color=f"C{color}",
                linewidth=0.8,
                alpha=0.6,
            )
            axis.plot(
                [row[key] for row in held_out],
                [row["loss"] for row in held_out],
                "o-",
                color=f"C{color}",
                markersize=3,
                linewidth=1.5,
                label=name,
            )
    axes[0].set(xlabel="tokens", ylabel="loss, nats per token")
    axes[1].set(xlabel="seconds of training")
    axes[0].legend(
        loc="upper right", title="dots: held out, thin: training", fontsize=8, title_fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else keep * smooth[-1] + (1 - keep) * value)
    return smooth
