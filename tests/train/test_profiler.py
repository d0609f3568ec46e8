"""`profiler:`, a trace of some steps, which changes nothing of them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tools.processes import run
from train.callbacks.metrics import read_metrics
from train.callbacks.profiler import profilers
from train.config import RunConfig
from train.corpora import open_corpora, with_vocabulary
from train.engines import open_engine
from train.parallel.ranks import Ranks
from train.run import train
from train.signals import StopSignals
from train.trainer import Trainer

FEW = {
    "training.total_tokens": 5 * 256,
    "mlflow.enabled": False,
    "checkpoint.asynchronous": False,
    "evaluation.max_tokens": 256,
}


def events_of(trace: Path) -> list[dict[str, Any]]:
    """The spans of a trace, in the order of their beginnings."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted((one for one in events if one.get("ph") == "X"), key=lambda one: one["ts"])


def losses(config: RunConfig) -> list[float]:
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "step"]


def test_the_steps_that_were_asked_for_phase_by_phase(make_config: Any, tmp_path: Path) -> None:
    plain = make_config(**FEW)
    assert train(plain, resume=False) == 0
    config = make_config(run_dir=str(tmp_path / "seen"), profiler={"first_step": 3, "steps": 2})
    assert train(config, resume=False) == 0
    assert losses(config) == losses(plain)
    folder = config.run_dir / "profiles"
    assert sorted(os.listdir(folder)) == ["step3-rank0.json.gz", "step3-rank0.txt"]
    events = events_of(folder / "step3-rank0.json.gz")
    names = [one["name"] for one in events if one.get("cat") == "user_annotation"]
    phases = ["train/data", "train/forward", "train/backward", "train/reduce", "train/optimizer"]
    assert [name for name in names if name.startswith("train/")] == 2 * phases
    assert [name.startswith("ProfilerStep") for name in names].count(True) == 2
    forward = next(one for one in events if one["name"] == "train/forward")
    inside = {
        one["name"]
        for one in events
        if forward["ts"] <= one["ts"] <= forward["ts"] + forward["dur"]
    }
    assert any(name.startswith("hope::") for name in inside)
    assert "Self CPU" in (folder / "step3-rank0.txt").read_text()


def test_a_run_that_ends_within_the_steps_leaves_those_it_took(make_config: Any) -> None:
    config = make_config(**FEW, profiler={"first_step": 4, "steps": 9})
    assert train(config, resume=False) == 0
    events = events_of(config.run_dir / "profiles" / "step4-rank0.json.gz")
    assert [one["name"] for one in events].count("train/optimizer") == 2


def test_steps_that_never_come_are_said_not_to(
    make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for first, told in ((5, False), (6, True), (7, True), (9, True)):
        config = make_config(**FEW, profiler={"first_step": first})
        config = config.model_copy(update={"run_dir": config.run_dir.with_name(f"run{first}")})
        assert train(config, resume=False) == 0
        assert (config.run_dir / "profiles").exists() is not told
        line = f"profiler.first_step={first} never came: the run ended after step 5"
        assert (line in capsys.readouterr().err) is told


def test_steps_that_are_past_are_said_to_be(
    make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(make_config(**FEW | {"training.stop_at_tokens": 3 * 256}), resume=False) == 0
    config = make_config(
        **{"training.stop_at_tokens": None, "profiler": {"first_step": 3, "ranks": [0, 7]}}
    )
    assert train(config, resume=True) == 0
    assert not (config.run_dir / "profiles").exists()
    told = capsys.readouterr().err
    assert "profiler.first_step=3 is behind this run, which goes on after step 3" in told
    assert "profiler.ranks names rank 7, and there are 1 ranks" in told


def test_a_folder_that_takes_no_profile_ends_nothing(
    make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**FEW, profiler={"first_step": 1, "steps": 1})
    config.run_dir.mkdir()
    (config.run_dir / "profiles").write_text("in the way")
    assert train(config, resume=False) == 0
    assert len(losses(config)) == 5
    assert "step1-rank0.json.gz can't be written (" in capsys.readouterr().err


def trained(rank: int, config: RunConfig) -> None:
    ranks, corpora = Ranks(), open_corpora(config)
    config = with_vocabulary(config, corpora)
    engine = open_engine(config, ranks)
    trainer = Trainer(config, corpora, StopSignals(), engine, profilers(config, ranks))
    assert trainer.fit() is None
    trainer.loader.close()


def test_another_rank(make_config: Any) -> None:
    config = make_config(**FEW, profiler={"first_step": 2, "steps": 1, "ranks": [1]})
    run(2, trained, config)
    folder = config.run_dir / "profiles"
    assert sorted(os.listdir(folder)) == ["step2-rank1.json.gz", "step2-rank1.txt"]
    names = [one["name"] for one in events_of(folder / "step2-rank1.json.gz")]
    assert any("all_reduce" in name or "allreduce" in name for name in names)
