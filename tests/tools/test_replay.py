"""python -m tools.replay: the batch that was skipped, its numbers, and the text to blame."""

from __future__ import annotations

import re
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.test_skipping import count_batches, poison
from tests.train.test_trainer import STREAM
from tools.processes import run
from tools.replay import main
from train.config import RunConfig
from train.continual import open_loader
from train.corpora import open_corpora
from train.engines.native import NativeEngine
from train.parallel.part import Part
from train.parallel.ranks import Ranks
from train.run import train
from train.run_files import CONFIG, METRICS

ROW, TOKEN = 2, 10


def spoil(patch: pytest.MonkeyPatch, batches: set[int]) -> None:
    """In these batches the logits of one row are NaN from one token on."""
    honest, last_read = Part.forward, count_batches(patch)

    def spoiled(self: Part, x: Tensor, rows: Tensor, starts: Tensor | None = None) -> Tensor:
        logits = honest(self, x, rows, starts)
        if last_read() in batches:
            for place in (rows == ROW).nonzero().flatten().tolist():
                factor = torch.ones_like(logits)
                factor[place, TOKEN:] = float("nan")
                logits = logits * factor
        return logits

    patch.setattr(Part, "forward", spoiled)


def train_without_the_sixth(_: int, config: RunConfig) -> int:
    """Train a run that skips its batch 6."""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, {6})
        return train(config, resume=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_not_finite_is_told_with_its_text(
    make_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"checkpoint.keep_last": 9})
    spoil(monkeypatch, {4, 6})
    assert train(config, resume=False) == 0
    metrics = config.run_dir / METRICS
    metrics.write_text('5\n["kind"]\n{"kind": "skip"}\n' + metrics.read_text())  # not ours
    before = contents(config.run_dir)
    capsys.readouterr()
    assert main([str(config.run_dir), "--rows", "2"]) == 0
    out, error = capsys.readouterr()
    assert "row/s" not in error  # a bar is for terminals
    assert contents(config.run_dir) == before
    assert "skipped after 1,280 tokens: the gradient of level fast, a, b, c is not finite" in out
    assert "rows 24 to 27, with the weights of tokens-000000000001024; 2 steps between" in out
    assert "loss nan nats per token, of 256 tokens that count" in out
    assert re.search(r"^c +nan +8/8$", out, re.MULTILINE)
    assert re.search(r"^not finite: \S+.* and \d+ more$", out, re.MULTILINE)
    corpora = open_corpora(config)
    loader = open_loader(config, corpora.train, Ranks.alone())
    loader.seek(24)
    text = corpora.validation.tokenizer.decode(next(loader).tokens[ROW, : TOKEN + 16].tolist())
    loader.close()
    first, second = out.splitlines()[-2:]
    assert re.match(
        rf"row {ROW}: loss nan, \d+ gradients not finite; most at token {TOKEN}, ", first
    )
    assert first.endswith(f": {text!r}")
    assert re.match(r"row [013]: loss \d\.\d+; most at token \d+, ", second)


@pytest.mark.parametrize("changes", [{}, STREAM, {"engine": "deepspeed"}])
def test_repeated_steps_lead_to_the_loss_that_the_run_saw(
    make_config, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    config = make_config(**changes, **{"checkpoint.keep_last": 9})
    seen: list[float] = []
    if changes.get("engine") == "deepspeed":
        # In a process of its own: DeepSpeed leaves a process group behind.
        assert run(1, train_without_the_sixth, config) == [0]
    else:
        with pytest.MonkeyPatch.context() as patch:
            poison(patch, {6}, "gradient")
            spoiled, last_read = NativeEngine.forward_backward, count_batches(patch)

            def remember(self: NativeEngine, batch: Any, carried: Any) -> Any:
                result = spoiled(self, batch, carried)
                if last_read() == 6:
                    seen.append(result[0] / batch.num_valid)
                return result

            patch.setattr(NativeEngine, "forward_backward", remember)
            assert train(config, resume=False) == 0
    capsys.readouterr()
    position = 6 * config.batch_rows
    assert main([str(config.run_dir), "--position", str(position), "--repeat"]) == 0
    out = capsys.readouterr().out
    assert "2 steps between were repeated" in out
    assert "everything is finite here" in out
    found = re.search(r"^loss (\d+\.\d+) nats per token", out, re.MULTILINE)
    assert found
    if seen:
        assert float(found[1]) == pytest.approx(seen[0], abs=6e-5)


def test_what_it_can_not_do_is_one_line(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"model.mixer": "attention"})
    calm = config.model_copy(update={"run_dir": tmp_path / "calm"})
    assert train(calm, resume=False) == 0
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {0, 7}, "loss")
        assert train(config, resume=False) == 0
    capsys.readouterr()
    rows = config.batch_rows
    (tmp_path / "odd" / METRICS).mkdir(parents=True)
    copy(calm.run_dir / CONFIG, tmp_path / "odd")
    for arguments, message in (
        ([str(tmp_path)], "holds no run"),
        ([str(calm.run_dir)], "skipped no step"),
        ([str(tmp_path / "odd")], "Is a directory"),
        ([str(config.run_dir), "--position", "1"], f"those skipped are at 0, {7 * rows}"),
        ([str(config.run_dir), "--position", "0"], "there is none of 0 tokens or less; in a run"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert error.startswith("error: ")
