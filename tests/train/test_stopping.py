"""The request to stop: signals, the walltime, and starting again after it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.train.test_trainer import assert_same_run, store_of
from train.__main__ import main
from train.checkpoint.manifest import position
from train.config import ConfigError
from train.corpora import open_corpora, with_vocabulary
from train.line_file import write_whole
from train.parallel.ranks import Ranks
from train.run import train
from train.run_folder import RunFolderError, claim
from train.signals import (
    REASONS,
    REQUEUE,
    SAME_REQUEST_S,
    StopSignals,
    agreed_status,
    stop_signals,
    walltime_deadline,
)

ALONE = Ranks.alone()
STATUSES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, REQUEUE)]


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_a_signal_that_comes_twice_at_once_is_one_request(number: int, status: int) -> None:
    before = signal.getsignal(number)
    with stop_signals() as signals:
        assert agreed_status(signals, ALONE) is None
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert agreed_status(signals, ALONE) == status
        os.kill(os.getpid(), signal.SIGUSR1)
        assert agreed_status(signals, ALONE) == status  # the first one counts
    assert signal.getsignal(number) is before


def signalled_early(number: int, *arguments: str) -> int:
    """Exit status of `python -m train` that got a signal among its first imports."""
    command = [sys.executable, "-X", "importtime", "-m", "train", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.split()[-1] == "argparse" for line in process.stderr)
        process.send_signal(number)
        process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize(
    ("number", "status"),
    [*(pytest.param(*one, marks=pytest.mark.slow) for one in STATUSES[:2]), STATUSES[2]],
)
def test_a_signal_that_comes_before_torch_is_a_request_too(
    raw_config, tmp_path: Path, number: int, status: int
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    assert signalled_early(number, str(path)) == status
    assert list(tmp_path.iterdir()) == [path]


def test_a_dry_run_has_nothing_to_save_and_dies_of_it() -> None:
    assert signalled_early(signal.SIGTERM, "configs/340m.yaml", "--dry-run") == -signal.SIGTERM


def test_a_later_ctrl_c_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, before = time.monotonic(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background lacks
    with stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(time, "monotonic", lambda: now + SAME_REQUEST_S + 5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_what_asks_twice_or_from_two_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later SIGUSR1 is no second Ctrl-C; a signal counts before the walltime and after it; of two
    ranks' reasons the one that ends the job."""
    now, usual = time.monotonic(), []
    before = signal.signal(signal.SIGUSR1, lambda number, _: usual.append(number))
    with stop_signals() as signals:
        signals.deadline = now + 600
        assert agreed_status(signals, ALONE) is None
        os.kill(os.getpid(), signal.SIGUSR1)
        monkeypatch.setattr(time, "monotonic", lambda: now + SAME_REQUEST_S + 5)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert agreed_status(signals, ALONE) == REQUEUE
        ended = StopSignals(received=signal.SIGTERM, deadline=now)
        told = [ended.reason == reason for reason in REASONS]
        monkeypatch.setattr(
            ALONE, "sum", lambda own: [sum(one) for one in zip(own, told, strict=True)]
        )
        assert agreed_status(signals, ALONE) == 143
    assert not usual
    signal.signal(signal.SIGUSR1, before)


def test_the_walltime_less_a_margin_is_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert walltime_deadline(None, 60) is None
    assert walltime_deadline(3600.0, 60) == pytest.approx(time.monotonic() + 3540, abs=5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    assert walltime_deadline("slurm", 100) == pytest.approx(time.monotonic() + 500, abs=5)
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    with pytest.raises(ConfigError, match="needs SLURM_JOB_END_TIME"):
        walltime_deadline("slurm", 100)


def test_at_the_walltime_a_run_is_saved_and_asks_to_be_started_again(
    make_config, tmp_path: Path
) -> None:
    quick = {"model.mixer": "attention"}
    straight = make_config(**quick, run_dir=str(tmp_path / "straight"))
    assert train(straight, resume=False) == 0
    slow = [{"kind": "slow", "step": 3, "phase": "optimizer", "seconds": 4.0}]
    limited = {"training.walltime_s": 4.0, "training.walltime_margin_s": 0.0, "faults": slow}
    config = make_config(**quick, run_dir=str(tmp_path / "limited"), **limited)
    assert train(config, resume=False) == REQUEUE
    store = store_of(config)
    assert store.plain(store.newest())["clock"]["steps"] <= 3
    again = make_config(**{"training.walltime_s": None})
    assert train(again, resume=False, or_start=True) == 0
    assert_same_run(straight, again)


def test_no_time_at_all_leaves_nothing_and_or_start_begins(
    make_config, raw_config, tmp_path: Path
) -> None:
    make_config(**{"model.mixer": "attention", "training.total_tokens": 512})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    run = ["training.walltime_s=10", "training.walltime_margin_s=10"]
    assert main([str(path), "--resume-or-start", *run]) == REQUEUE
    assert not (tmp_path / "run").exists()
    assert main([str(path), "--resume-or-start"]) == 0
    assert main([str(path)]) == 2  # without it, a folder that holds a run is refused
    assert main([str(path), "--resume-or-start"]) == 0  # there is nothing left to do


def test_only_the_same_torchrun_job_goes_on_by_itself(
    make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{"model.mixer": "attention", "training.total_tokens": 256})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train(config, resume=False) == 0
    config = with_vocabulary(config, open_corpora(config))
    for job, restarts, goes_on in (("job-1", "1", True), ("job-2", "1", False)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        if goes_on:
            with claim(config, ALONE, resume=False, auto=False) as resume:
                assert resume
        else:
            with (
                pytest.raises(RunFolderError, match="already holds a run"),
                claim(config, ALONE, resume=False, auto=False),
            ):
                pass


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(make_config, tmp_path: Path) -> None:
    quick = {"model.mixer": "attention"}
    straight = make_config(**quick, run_dir=str(tmp_path / "straight"))
    assert train(straight, resume=False) == 0
    fault = [
        {"kind": "usr1", "step": 4, "phase": "evaluation"},
        {"kind": "term", "step": 12, "phase": "evaluation"},
    ]
    config = make_config(**quick, run_dir=str(tmp_path / "parts"), faults=fault)
    assert [train(config, resume=n > 0) for n in range(3)] == [REQUEUE, 143, 0]
    assert_same_run(straight, config)


def test_a_disk_that_takes_no_more_is_one_line_and_loses_nothing(
    make_config, raw_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {"model.mixer": "attention", "checkpoint.every_tokens": 512}
    straight = make_config(**quick, run_dir=str(tmp_path / "straight"))
    assert train(straight, resume=False) == 0
    config = make_config(run_dir=str(tmp_path / "full"), **{"training.stop_at_tokens": 768})
    assert train(config, resume=False) == 0
    config = make_config(**{"training.stop_at_tokens": None})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # of one file; a checkpoint's is more
    try:
        assert main([str(path), "--resume"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "error: the last checkpoint could not be written: " in error
    assert "Traceback" not in error
    assert [position(folder.name) for folder in store_of(config).complete()] == [(512, 0), (768, 0)]
    assert train(config, resume=True) == 0
    assert_same_run(straight, config)


def test_a_kill_while_a_small_file_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_whole(path, "old")

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
