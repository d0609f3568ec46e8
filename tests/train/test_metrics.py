"""The loss curve of a run, however long it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from train.callbacks import metrics
from train.callbacks.metrics import Curve, Metrics


def step(number: int) -> dict[str, Any]:
    loss = 5 - number % 7 / 10
    return {"kind": "step", "tokens": 4 * number, "loss": loss, "trained_seconds": number / 2}


def test_a_long_run_is_drawn_with_few_points() -> None:
    rows = [step(number) for number in range(1, 100_001)]
    curve, smooth = Curve(rows), {}
    last = rows[0]["loss"]
    for row in rows:
        last = 0.9 * last + 0.1 * row["loss"]
        smooth[row["tokens"]] = row["trained_seconds"], last
    assert metrics.MOST_POINTS // 2 <= len(curve.steps) < metrics.MOST_POINTS
    distances = {b[0] - a[0] for a, b in zip(curve.steps, curve.steps[1:], strict=False)}
    assert distances == {4 * 16}
    for tokens, seconds, loss in curve.steps:
        assert (seconds, loss) == (smooth[tokens][0], pytest.approx(smooth[tokens][1]))
    assert len(Curve(rows[:1000]).steps) == 1000


def test_the_curve_is_drawn_without_reading_the_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million steps that took 39 seconds and two gigabytes, every five minutes."""
    evaluation = {"kind": "evaluation", "tokens": 8, "loss": 4.5, "trained_seconds": 1.0}
    before = [step(1), step(2), evaluation, step(3)]  # a resume after two steps
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    clock = SimpleNamespace(tokens=8, skipped_tokens=0)
    trainer = cast(
        Any,
        SimpleNamespace(clock=clock, evaluations=SimpleNamespace(tokens=8), trained_seconds=1.5),
    )
    drawn: list[Curve] = []
    monkeypatch.setattr(metrics, "plot_loss", lambda runs, _: drawn.extend(runs.values()))
    run = Metrics(tmp_path)
    run.on_start(trainer)
    record = SimpleNamespace(step=3, tokens=12, loss=4.0, grad_norm=1.0, tokens_per_second=1.0)
    record.level_norms = record.learning_rates = {}
    record.data_seconds, record.tflops_per_rank, record.mfu, record.peak_memory = 0.0, 1.0, None, 9
    run.on_step(trainer, cast(Any, record))
    (tmp_path / "metrics.jsonl").unlink()
    run.on_end(trainer)
    (curve,) = drawn
    assert [point[:2] for point in curve.steps] == [(4, 0.5), (8, 1.0), (12, 1.5)]
    assert curve.held_out == [(8, 1.0, 4.5)]


def test_a_picture_is_written(pictures: None, tmp_path: Path) -> None:
    rows = [step(1), step(2), {**step(2), "kind": "evaluation"}]
    metrics.plot_loss({"a": Curve(rows), "b": Curve()}, tmp_path / "plots" / "loss.png")
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
