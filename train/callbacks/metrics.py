"""metrics.jsonl and the loss curve of a run folder, written as the run goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.callbacks.base import Callback
from train.line_file import LineFile, tell
from train.run_files import METRICS, PLOTS

if TYPE_CHECKING:
    from train.evaluate.perplexity import HeldOut
    from train.optim.cadence import StepReport
    from train.records import SkippedStep, StepRecord
    from train.spikes import Rollback
    from train.trainer import Trainer

LOSS_CURVE = "loss.png"
DRAWN_EVERY_S = 300.0
KEEP = 0.9  # of a smoothed loss, step by step
MOST_POINTS = 8192  # of a curve; its picture is some 500 pixels wide


class Metrics(Callback):
    """One JSON object a line: {"kind": "step" | "skip" | "rollback" | "flush" | "evaluation" |
    "domain_evaluation", "tokens": n, ...}.

    On resume and on a return to a checkpoint, lines past it are dropped: those steps are about to
    happen again. "position": the row of the stream with which a skipped batch begins. The curve is
    drawn with a checkpoint, every five minutes at most, and at the end, from points in memory: the
    file grows for as long as the run lasts.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS
        self.plot_path = run_dir / PLOTS / LOSS_CURVE
        self._lines = LineFile(self.path)
        self._curve = Curve()
        self._drawn = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:
        self._curve, lines = Curve(), []
        for row in _rows(self._lines.text()):
            if _stays(row, trainer):
                self._curve.add(row)
                lines.append(json.dumps(row) + "\n")
        self._lines.replace("".join(lines))

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
                "data_seconds": record.data_seconds,
                "tflops_per_rank": record.tflops_per_rank,
                "mfu": record.mfu,
                "peak_memory": record.peak_memory,
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
                "domains_trained": trainer.domains.names[: trainer.evaluations.domains],
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
            plot_loss({self.path.parent.name: self._curve}, self.plot_path)
        except OSError as error:
            tell(f"{self.plot_path} can't be written ({error.strerror})")

    def _append(self, row: dict[str, Any]) -> None:
        self._lines.add(json.dumps(row))
        self._curve.add(row)


def _stays(row: dict[str, Any], trainer: Trainer) -> bool:
    """Whether a line tells of something that the trainer, as it is now, has behind it."""
    clock = trainer.clock
    if row["kind"] == "evaluation":
        return bool(row["tokens"] <= trainer.evaluations.tokens)
    if row["kind"] == "domain_evaluation":
        return len(row["domains_trained"]) <= trainer.evaluations.domains
    if row["kind"] == "rollback" and row["number"] > trainer.spikes.rollbacks:
        return False
    at = (row["tokens"], row.get("skipped_tokens", 0))
    return at <= (clock.tokens, clock.skipped_tokens)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl. One that a crash cut short is left out, and so is what
    something else wrote there. Raises OSError where the file can't be read."""
    return list(_rows(path.read_text())) if path.exists() else []


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"kind", "tokens"} <= row.keys():
            yield row


class Curve:
    """The losses of a run as points to draw, (tokens, seconds, loss): of each evaluation, and of
    steps, smoothed; where they are many, of every second, fourth, eighth, ... step."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.steps: list[tuple[int, float, float]] = []
        self.held_out: list[tuple[int, float, float]] = []
        self._smooth: float | None = None
        self._count, self._every = 0, 1
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Take in a line of metrics.jsonl."""
        if row["kind"] == "evaluation":
            self.held_out.append((row["tokens"], row["trained_seconds"], row["loss"]))
        elif row["kind"] == "step":
            smooth, loss = self._smooth, row["loss"]
            self._smooth = loss if smooth is None else KEEP * smooth + (1 - KEEP) * loss
            if self._count % self._every == 0:
                self.steps.append((row["tokens"], row["trained_seconds"], self._smooth))
            self._count += 1
            if len(self.steps) == MOST_POINTS:
                self.steps, self._every = self.steps[::2], 2 * self._every


def plot_loss(runs: dict[str, Curve], path: Path) -> None:
    """Draw training (thin) and held-out (dots) loss of each run, over tokens and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    # matplotlib's own layouts draw everything twice, which takes as long as the picture.
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.14, top=0.97, wspace=0.04)
    for color, (name, curve) in enumerate(runs.items()):
        for number, axis in enumerate(axes):
            axis.plot(
                [point[number] for point in curve.steps],
                [point[2] for point in curve.steps],
                color=f"C{color}",
                linewidth=0.8,
                alpha=0.6,
            )
            axis.plot(
                [point[number] for point in curve.held_out],
                [point[2] for point in curve.held_out],
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
