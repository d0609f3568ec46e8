"""Level stacking end to end: train a Transformer++, stack levels on it, train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from data_pipeline import train_tokenizer
from data_pipeline.tokenizing import tokenize
from hope import HopeModel
from train.__main__ import main
from train.callbacks.metrics import read_metrics
from train.checkpoint.load import load_run

TOKENS = torch.arange(96).remainder(89).view(2, 48)
HIDDEN = 8


@pytest.fixture
def base_file(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    """A Transformer++ of one MLP a layer, trained for twelve steps into runs `base`."""
    raw_config["model"] |= {
        "mixer": "attention",
        "cms": {"levels": [{"name": "mlp", "hidden_size": HIDDEN}]},
    }
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    assert main([str(path), f"run_dir={tmp_path / 'base'}"]) == 0
    return path


def levels(slow: int = HIDDEN) -> str:
    return (
        f"model.cms.levels=[{{name: a, hidden_size: 6}}, "
        f"{{name: b, hidden_size: {HIDDEN}, update_every_tokens: 512}}, "
        f"{{name: c, hidden_size: {slow}, update_every_tokens: 1024}}]"
    )


def logits(run: Path) -> Tensor:
    model: HopeModel = load_run(run)[1]
    with torch.no_grad():
        return model(TOKENS)[0]


@pytest.mark.parametrize("mode", ["sequential", "nested"])
def test_with_every_rate_at_zero_the_pretrained_model_stays(
    base_file: Path, tmp_path: Path, mode: str
) -> None:
    still = [f"optimizer.levels.{name}.lr_scale=0" for name in ("fast", "a", "b", "c")]
    run = tmp_path / "stacked"
    arguments = [str(base_file), levels(), f"model.cms.mode={mode}", *still, f"run_dir={run}"]
    assert main([*arguments, f"init_from.path={tmp_path / 'base'}"]) == 0
    clock = read_metrics(run / "metrics.jsonl")
    assert sum("c" in row.get("lr", {}) for row in clock) == 3  # every level has fired
    assert torch.equal(logits(run), logits(tmp_path / "base"))


def test_with_rates_on_the_loss_falls_from_where_the_pretrained_model_was(
    base_file: Path, tmp_path: Path
) -> None:
    run, base = tmp_path / "stacked", tmp_path / "base"
    arguments = [str(base_file), levels(), f"run_dir={run}", "training.total_tokens=12800"]
    assert main([*arguments, f"init_from.path={base}", "init_from.levels=[b, c]"]) == 0
    fresh = tmp_path / "fresh"
    assert main([*arguments, f"run_dir={fresh}", "training.stop_at_tokens=256"]) == 0
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "step"]
    ended = [row["loss"] for row in read_metrics(base / "metrics.jsonl") if row["kind"] == "step"]
    begun = next(row["loss"] for row in read_metrics(fresh / "metrics.jsonl"))
    assert abs(losses[0] - ended[-1]) < 0.25 < begun - losses[0]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.25
    stacked = load_run(run)[1]
    assert all(level.down.weight.abs().max() > 0 for level in stacked.layers[0].cms.levels)


def test_one_checkpoint_of_a_run_and_a_resume_without_it(base_file: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "stacked"
    older = min((base / "checkpoints").iterdir())
    assert load_run(older)[0] == load_run(base)[0]
    arguments = [str(base_file), levels(), f"run_dir={run}", f"init_from.path={older}"]
    assert main([*arguments, "training.stop_at_tokens=512", "optimizer.lr=0.0"]) == 0
    assert torch.equal(logits(run), logits(older))
    assert not torch.equal(logits(run), logits(base))
    base.rename(tmp_path / "gone")
    assert main([*arguments, "optimizer.lr=0.0", "--resume"]) == 0
    assert torch.equal(logits(run), logits(tmp_path / "gone" / "checkpoints" / older.name))


def test_another_tokenizer_is_refused(
    base_file: Path, tmp_path: Path, corpora: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same size, so that no shape gives it away."""
    text = corpora["train"].parent / "text" / "train"
    tokenizer = train_tokenizer([(text / "1.txt").read_text()], 400)
    tokenize([str(text)], tokenizer, tmp_path / "other")
    data = [f"data.validation={tmp_path / 'other'}", f"data.train.0.path={tmp_path / 'other'}"]
    more = [*data, f"init_from.path={tmp_path / 'base'}", f"run_dir={tmp_path / 'stacked'}"]
    capsys.readouterr()
    assert main([str(base_file), levels(), *more]) == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line_and_exit_code_2(
    base_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = tmp_path / "stacked", tmp_path / "base"
    cases = [
        ([levels(), f"init_from.path={tmp_path}"], "holds no run (config.yaml is missing)"),
        ([levels(12), f"init_from.path={base}"], "level 'c' has hidden_size 12, but it takes MLPs"),
        (
            [levels(), f"init_from.path={base}", "init_from.levels=[a]"],
            "level 'a' has hidden_size 6, but it takes MLPs of hidden size 8",
        ),
        (
            [levels(), f"init_from.path={base}", "init_from.levels=[d]"],
            "init_from.levels names ['d'], but the CMS levels are ['a', 'b', 'c']",
        ),
        (
            [levels(), f"init_from.path={base}", "model.dim=32"],
            "model.dim is 16 in the pretrained model but 32 here",
        ),
        ([levels(), "init_from.levels=[a]"], "missing key 'init_from.path'"),
    ]
    capsys.readouterr()
    for overrides, message in cases:
        assert main([str(base_file), *overrides, f"run_dir={run}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert message in error
        assert not run.exists()
