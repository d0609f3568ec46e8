"""What a run folder remembers of its run, without training one."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from train.config import RunConfig, load_config
from train.parallel.ranks import Ranks
from train.run_folder import (
    RunFolderError,
    check_fresh,
    check_same_run,
    claim,
    goes_back_to,
    run_lock,
    save_config,
    went_back,
)

ALONE = Ranks.alone()
CONSTANT = "optimizer.schedule={name: constant}"


def config(run_dir: Path, *overrides: str) -> RunConfig:
    return load_config("configs/quickstart.yaml", [f"run_dir={run_dir}", *overrides])


@pytest.mark.parametrize(
    ("saved", "now", "refused"),
    [
        ([CONSTANT], ["training.total_tokens=1048576"], ""),
        (["training.flush=true", CONSTANT], ["training.total_tokens=1048576"], "total_tokens"),
        (["optimizer.clip_norm=1"], ["optimizer.clip_norm=2"], "optimizer.clip_norm (1.0 -> 2.0)"),
        (["data.order=stream"], ["training.batch_tokens=4096"], "training.batch_tokens"),
        (["data.order=window"], ["training.batch_tokens=4096"], ""),
        (["data.on_corrupt=raise"], ["data.on_corrupt=skip", "parallel.precision=bf16"], ""),
        (["seed=1"], ["seed=2"], "seed (1 -> 2)"),
    ],
)
def test_what_a_resume_may_change(
    tmp_path: Path, saved: list[str], now: list[str], refused: str
) -> None:
    save_config(config(tmp_path, *saved))
    changed = config(tmp_path, *saved, *now)
    if not refused:
        told = check_same_run(changed)
        assert [line.split()[0] for line in told] == sorted(one.split("=")[0] for one in now)
        return
    with pytest.raises(RunFolderError) as caught:
        check_same_run(changed)
    assert refused in str(caught.value)


def test_what_ends_before_it_wrote_anything_leaves_no_folder(tmp_path: Path) -> None:
    def fails(folder: Path, writes: str | None = None) -> None:
        with claim(config(folder), ALONE, resume=False, auto=False):
            if writes is not None:
                (folder / writes).touch()
            raise KeyError(writes)

    with pytest.raises(KeyError):
        fails(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with claim(config(tmp_path / "stopped"), ALONE, resume=False, auto=False):
        assert (tmp_path / "stopped/.lock").exists()
    assert not (tmp_path / "stopped").exists()
    with claim(config(tmp_path / "gone"), ALONE, resume=False, auto=False):
        shutil.rmtree(tmp_path / "gone")  # by somebody else: no error at the end
    with pytest.raises(KeyError):
        fails(tmp_path / "writes", "metrics.jsonl")
    assert (tmp_path / "writes/metrics.jsonl").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyError):
        fails(tmp_path / "old")
    assert (tmp_path / "old").exists()


def test_a_lock_that_was_taken_away_with_its_folder_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that did not begin, between this one's opening it and locking it."""
    folder, lock, taken = tmp_path / "run", fcntl.flock, []

    def slow(file: int, how: int) -> None:
        if not taken:
            taken.append(file)
            (folder / ".lock").unlink()
            folder.rmdir()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with run_lock(folder), pytest.raises(RunFolderError, match="is in use"), run_lock(folder):
        pass


def test_a_fresh_start_keeps_nothing_of_a_run_that_saved_nothing(tmp_path: Path) -> None:
    """What MLflow was sent of it, too: its count would be taken for the new backlog's."""
    for name in ("metrics.jsonl", "mlflow_run_id", "mlflow_backlog.jsonl", "mlflow_sent"):
        (tmp_path / name).write_text("7")
    check_fresh(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_job_goes_back_once_to_each_checkpoint_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert goes_back_to(tmp_path, "tokens-1", ALONE) == "tokens-1"
    went_back(tmp_path, "tokens-1")
    assert goes_back_to(tmp_path, "tokens-1", ALONE) == "tokens-1"  # by hand
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert goes_back_to(tmp_path, "tokens-1", ALONE) is None
    assert goes_back_to(tmp_path, "tokens-2", ALONE) == "tokens-2"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert goes_back_to(tmp_path, "tokens-1", ALONE) == "tokens-1"
