"""--resume-or-start, for launchers that restart what died."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from train.__main__ import main
from train.callbacks.metrics import read_metrics
from train.checkpoint import CheckpointStore
from train.parallel.ranks import Ranks


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    return str(path)


def parameters(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints", Ranks.alone(), 2)
    return store.tensors(store.newest(), "model/")


def steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "step"]


@pytest.mark.parametrize("by", ["flag", "restart"])
def test_it_starts_then_goes_on_to_the_bit(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([config_file, f"run_dir={whole}"]) == 0
    flag = ["--resume-or-start"] if by == "flag" else []
    assert main([config_file, *flag, f"run_dir={parts}", "training.stop_at_tokens=1792"]) == 0
    assert steps(parts) == list(range(1, 8))
    if by == "restart":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([config_file, *flag, f"run_dir={parts}", "--local_rank=0"]) == 0
    assert steps(parts) == list(range(1, 13))
    first, second = parameters(whole), parameters(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_never_saved_starts_again(config_file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("left by a run that was killed early")
    (run / "metrics.jsonl").write_text('{"kind": "step", "tokens": 256}\n')
    assert main([config_file, "--resume-or-start", "training.stop_at_tokens=512"]) == 0
    assert steps(run) == [1, 2]


def test_what_can_not_be_resumed_is_an_error_and_no_fresh_start(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([config_file, "training.stop_at_tokens=512"]) == 0
    assert main([config_file, "--resume-or-start", "optimizer.lr=0.5"]) == 2
    assert "was trained with another configuration" in capsys.readouterr().err
    (checkpoint,) = (run / "checkpoints").glob("tokens-*")
    (checkpoint / "trainer.json").unlink()
    with pytest.warns(UserWarning, match="trainer.json is missing"):
        assert main([config_file, "--resume-or-start"]) == 2
    assert "no usable checkpoint" in capsys.readouterr().err
    assert steps(run) == [1, 2]


def test_one_of_the_two_ways_to_resume(config_file: str) -> None:
    with pytest.raises(SystemExit) as error:
        main([config_file, "--resume", "--resume-or-start"])
    assert error.value.code == 2


@pytest.mark.parametrize(
    "count",
    ["TORCHELASTIC_RESTART_COUNT", pytest.param("SLURM_RESTART_COUNT", marks=pytest.mark.slow)],
)
def test_a_job_that_is_started_again_does_not_go_back_again(
    config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    def names(pattern: str) -> list[int]:
        return sorted(int(p.name[-15:]) for p in (tmp_path / "run/checkpoints").glob(pattern))

    assert main([config_file, "training.stop_at_tokens=1792"]) == 0
    back = [config_file, "--resume-from", f"tokens-{1024:015d}"]
    with pytest.warns(UserWarning, match="set aside what is after"):
        assert main([*back, "training.stop_at_tokens=1536"]) == 0
    assert (names("aside-*"), names("tokens-*")) == ([1792], [1024, 1536])
    with monkeypatch.context() as patch:
        patch.setenv(count, "1")
        patch.setenv("TORCHELASTIC_RUN_ID", "none")
        assert main([*back, "training.stop_at_tokens=1792"]) == 0
    assert (names("aside-*"), names("tokens-*")) == ([1792], [1536, 1792])
    assert main([config_file, "--resume-from", f"tokens-{1536:015d}"]) == 0  # by hand: it does
    assert names("tokens-*")[-1] == 3072
