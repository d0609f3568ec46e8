"""A disk that takes nothing for a while: training goes on, and nothing that it says is lost."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_trainer import assert_same_run, store_of
from train.callbacks.metrics import read_metrics
from train.line_file import LineFile
from train.run import train
from train.trainer import Trainer


def test_lines_wait_for_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    lines = LineFile(path)
    lines.add("one")
    path.rename(tmp_path / "aside")
    path.symlink_to("/dev/full")
    lines.add("two")
    lines.add("three")
    path.unlink()
    (tmp_path / "aside").rename(path)
    assert lines.text() == "one\ntwo\nthree\n"
    assert path.read_text() == "one\n"
    lines.add("four")
    assert path.read_text() == lines.text() == "one\ntwo\nthree\nfour\n"
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 1


def test_lines_that_take_the_place_of_all_wait_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = LineFile(tmp_path / "lines.jsonl")
    lines.add("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        lines.replace("new\n")
        lines.add("more")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines.path.read_text() == "old\n"
    assert lines.text() == "new\nmore\n"
    assert capsys.readouterr().err.count("training goes on") == 1
    lines.add("last")
    assert lines.path.read_text() == lines.text() == "new\nmore\nlast\n"


@pytest.mark.filterwarnings("ignore:checkpoint tokens")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_goes_on_while_its_disk_is_full(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Full in steps 4 to 9 of 12; a checkpoint is due after every second."""
    changes = {
        "model.mixer": "attention",
        "checkpoint.every_tokens": 512,
        "checkpoint.asynchronous": asynchronous,
        "checkpoint.keep_last": 9,
        "mlflow": {"every_steps": 1},
    }
    straight = make_config(**changes, run_dir=str(tmp_path / "straight"))
    assert train(straight, resume=False) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    honest = Trainer.step

    def step(self: Trainer) -> Any:
        full = 4 <= self.clock.steps + 1 < 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 if full else soft, hard))
        return honest(self)

    monkeypatch.setattr(Trainer, "step", step)
    config = make_config(run_dir=str(tmp_path / "full"))
    try:
        assert train(config, resume=False) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same_run(straight, config)
    saved = [int(folder.name.removeprefix("tokens-")) for folder in store_of(config).complete()]
    assert saved[0] == 512
    assert saved[-2:] == [2560, 3072]
    assert 1536 not in saved
    steps = [r["step"] for r in read_metrics(config.run_dir / "metrics.jsonl") if "step" in r]
    assert steps == list(range(1, 13))
    sent = [(run.run_dir / "mlflow_backlog.jsonl").read_text() for run in (straight, config)]
    assert sent[0].count('"metrics"') == sent[1].count('"metrics"')
