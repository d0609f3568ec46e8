"""Whole runs: exact resume, signals, ranks, carried state, the run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from train.__main__ import main
from train.callbacks.metrics import read_metrics
from train.checkpoint import CheckpointError, CheckpointStore
from train.checkpoint.load import load_run
from train.config import RunConfig
from train.corpora import open_corpora, with_vocabulary
from train.parallel.ranks import Ranks
from train.run import train
from train.run_folder import run_lock, save_config

STREAM = {
    "training.state_carry": "stream",
    "data.order": "stream",
    "data.seq_len": 32,
}

NESTED = {
    "model.cms": {
        "mode": "nested",
        "levels": [
            {"name": "a", "hidden_size": 8, "update_every_tokens": "step"},
            {"name": "b", "hidden_size": 8, "update_every_tokens": 3 * 256},
            {"name": "c", "hidden_size": 8, "update_every_tokens": 6 * 256},
        ],
    }
}


def store_of(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(config.run_dir / "checkpoints", Ranks(), 2)


def final_tensors(config: RunConfig) -> dict[str, Tensor]:
    store = store_of(config)
    return store.tensors(store.newest())


def losses(config: RunConfig) -> list[tuple[str, int, float]]:
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    return [(row["kind"], row["tokens"], row["loss"]) for row in rows]


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    first, second = final_tensors(one), final_tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert losses(one) == losses(other)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        STREAM,
        pytest.param({"model.mixer": "attention"}, marks=pytest.mark.slow),
        pytest.param({"model.titans.writes": False}, marks=pytest.mark.slow),
        NESTED,
    ],
)
def test_a_stopped_run_resumes_to_the_bit(make_config, tmp_path: Path, changes: dict) -> None:
    """Stopped twice, both times inside the periods of both slow levels."""
    straight = make_config(**changes)
    assert train(straight, resume=False) == 0
    parts = make_config(run_dir=str(tmp_path / "parts"))
    for number, stop in enumerate((4 * 256, 7 * 256, None)):
        part = make_config(**{"training.stop_at_tokens": stop})
        assert train(part, resume=number > 0) == 0
    assert_same_run(straight, parts)


def test_micro_batches_change_only_round_off(make_config, tmp_path: Path) -> None:
    whole, split = make_config(), make_config(**{"run_dir": str(tmp_path / "split")})
    split = make_config(**{"parallel.micro_batches": 3})
    train(whole, resume=False)
    train(split, resume=False)
    for (kind, tokens, a), (_, _, b) in zip(losses(whole), losses(split), strict=True):
        assert a == pytest.approx(b, rel=1e-5), (kind, tokens)


def test_levels_fire_as_the_clock_says(make_config) -> None:
    config = make_config()
    train(config, resume=False)
    store = store_of(config)
    clock = store.plain(store.newest())["clock"]
    assert (clock["tokens"], clock["steps"], clock["skipped_tokens"]) == (3072, 12, 0)
    assert clock["firings"] == {"fast": 12, "a": 12, "b": 4, "c": 2}
    fired = {"b": [], "c": []}
    for row in read_metrics(config.run_dir / "metrics.jsonl"):
        for name in fired:
            if row["kind"] == "step" and name in row["lr"]:
                fired[name].append(row["step"])
    assert fired == {"b": [3, 6, 9, 12], "c": [5, 10]}


def test_documents_that_start_anywhere_are_not_told_apart(make_config) -> None:
    """packing: concat puts document starts where no memory could be reset."""
    config = make_config(
        **{
            "data.packing": "concat",
            "data.order": "stream",
            "training.batch_tokens": 4096,
            "training.total_tokens": 14 * 4096,
        }
    )
    lengths = open_corpora(config).train[0].document_lengths(0)
    assert lengths[0] % config.model.titans.scan.projection_chunk  # the second starts elsewhere
    assert sum(lengths) < config.training.total_tokens  # and is reached
    assert train(config, resume=False) == 0


def test_training_learns(make_config) -> None:
    config = make_config(**{"training.total_tokens": 60 * 256})
    train(config, resume=False)
    steps = [loss for kind, _, loss in losses(config) if kind == "step"]
    assert sum(steps[-5:]) / 5 < steps[0] - 1.0


def test_carried_state_is_used_and_saved_by_row(make_config, tmp_path: Path) -> None:
    carried = make_config(**STREAM)
    train(carried, resume=False)
    fresh = make_config(**{"training.state_carry": "none", "run_dir": str(tmp_path / "fresh")})
    train(fresh, resume=False)
    first, second = losses(carried), losses(fresh)
    assert first[0] == second[0]  # the first step has nothing to carry
    assert first[1] != second[1]
    rows = {name.split("/")[1] for name in final_tensors(carried) if name.startswith("stream/")}
    assert rows == {str(row) for row in range(8)}
    assert not any(name.startswith("stream/") for name in final_tensors(fresh))


def test_train_loss_equals_evaluation_loss(make_config) -> None:
    """With rate 0 the model stands still: one pass over the same tokens gives the same loss."""
    config = make_config(
        **{
            "optimizer.lr": 0.0,
            "data.train": [{"path": str(make_config().data.validation)}],
            "data.order": "stream",
            "data.packing": "concat",
        }
    )
    corpora = open_corpora(config)
    config = with_vocabulary(config, corpora)
    windows = corpora.validation.num_tokens // 64 // 4
    config = make_config(
        **{
            "training.total_tokens": windows * 256,
            "training.batch_tokens": 256,
            "evaluation.every_tokens": 10**6,
        }
    )
    train(config, resume=False)
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    trained = [row["loss"] for row in rows if row["kind"] == "step"]
    held_out = next(row["loss"] for row in rows if row["kind"] == "evaluation")
    assert sum(trained) / len(trained) == pytest.approx(held_out, rel=2e-3)


def command(config_file: Path, *more: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "-m"]
    return [*launcher, "train", str(config_file), *more]


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    return path


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluation.batch_rows=1"],  # fewer than ranks
        pytest.param(["model.mixer=attention"], marks=pytest.mark.slow),
        pytest.param(["training.state_carry=stream", "data.order=stream"], marks=pytest.mark.slow),
        pytest.param(["model.titans.writes=false"], marks=pytest.mark.slow),
        pytest.param(
            ["model.cms.mode=nested", "model.cms.levels.2.update_every_tokens=1536"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["hope", "attention", "stream", "writes_off", "nested"],
)
def test_two_ranks_give_the_losses_of_one(
    config_file: Path, tmp_path: Path, overrides: list[str]
) -> None:
    runs = {}
    for ranks in (1, 2):
        run_dir = tmp_path / f"ranks{ranks}"
        arguments = [*overrides, "optimizer.lr=0.002", f"run_dir={run_dir}"]
        subprocess.run(
            command(config_file, *arguments, ranks=ranks),
            check=True,
            env=ENVIRONMENT,
            capture_output=True,
        )
        runs[ranks] = read_metrics(run_dir / "metrics.jsonl")
    assert len(runs[1]) == len(runs[2]) > 12
    for one, two in zip(runs[1], runs[2], strict=True):
        assert (one["kind"], one["tokens"]) == (two["kind"], two["tokens"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        if one["kind"] == "step":
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "overrides"),
    [
        (1, 2, ["training.state_carry=stream", "data.order=stream"]),
        (2, 1, []),
        (2, 1, ["optimizer.reduce=at_update"]),
        (2, 2, ["optimizer.reduce=at_update"]),
    ],
)
def test_a_run_is_taken_up_by_other_ranks(
    config_file: Path, tmp_path: Path, before: int, after: int, overrides: list[str]
) -> None:
    """Stopped inside the periods of both slow levels; beside one process that never stopped."""
    whole = [*overrides, f"run_dir={tmp_path / 'whole'}"]
    parts = [*overrides, f"run_dir={tmp_path / 'parts'}"]
    for arguments, ranks in (
        (whole, 1),
        ([*parts, "training.stop_at_tokens=1792"], before),
        ([*parts, "--resume"], after),
    ):
        subprocess.run(
            command(config_file, *arguments, ranks=ranks),
            check=True,
            env=ENVIRONMENT,
            capture_output=True,
        )
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    for one, two in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


@pytest.mark.slow  # in any phase, on two ranks: tests/distributed/test_failures.py
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_that_resumes_to_the_bit(
    config_file: Path, make_config, tmp_path: Path, number: int, code: int
) -> None:
    long = ["training.total_tokens=25600", "checkpoint.every_tokens=100000"]
    process = subprocess.Popen(
        command(config_file, *long), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    interrupted = make_config(**{"training.total_tokens": 25600})
    store = store_of(interrupted)
    assert 0 < store.plain(store.newest())["clock"]["tokens"] < 25600
    assert main([str(config_file), *long, "--resume"]) == 0
    straight = make_config(
        **{"run_dir": str(tmp_path / "straight"), "checkpoint.every_tokens": 100_000}
    )
    train(straight, resume=False)
    assert_same_run(interrupted, straight)


def test_what_a_run_folder_refuses(
    make_config, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"training.stop_at_tokens": 512})
    assert main([str(config_file), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert not config.run_dir.exists()
    config.run_dir.mkdir()
    save_config(with_vocabulary(config, open_corpora(config)))  # killed before a checkpoint
    assert main([str(config_file), "--resume"]) == 2
    assert "holds no checkpoint; begin the run again without --resume" in capsys.readouterr().err
    train(config, resume=False)
    before = sorted(path.name for path in config.run_dir.rglob("*"))
    capsys.readouterr()
    cases = [
        ([], "already holds a run"),
        (["--resume", "optimizer.lr=0.5"], "optimizer.lr (0.01 -> 0.5)"),
        (["--resume", "model.titans.writes=false"], "model.titans.writes (True -> False)"),
    ]
    for arguments, message in cases:
        assert main([str(config_file), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert sorted(path.name for path in config.run_dir.rglob("*")) == before


def test_a_second_job_on_the_same_folder_is_refused(make_config, config_file: Path) -> None:
    config = make_config()
    with run_lock(config.run_dir):
        result = subprocess.run(
            command(config_file), capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
    assert result.returncode == 2
    assert "in use by another training process" in result.stderr
    assert not (config.run_dir / "config.yaml").exists()


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(make_config) -> None:
    config = make_config(**{"checkpoint.every_tokens": 512})
    train(config, resume=False)
    store = store_of(config)
    older, newest = store.complete()[-2:]
    victim = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{newest.name}: {victim.name} does not match"):
        assert store.newest() == older
    (older / "trainer.json").unlink()
    with (
        pytest.warns(UserWarning, match="trainer.json is missing"),
        pytest.raises(CheckpointError, match="no usable checkpoint"),
    ):
        store.newest()


def test_only_the_newest_checkpoints_are_kept_and_they_load(make_config) -> None:
    config = make_config(**{"checkpoint.every_tokens": 512})
    train(config, resume=False)
    names = [folder.name for folder in store_of(config).complete()]
    assert names == ["tokens-000000000002560", "tokens-000000000003072"]
    loaded, model = load_run(config.run_dir)
    assert loaded.model.vocab_size == model.embedding.weight.shape[0]
    saved = final_tensors(config)
    assert all(torch.equal(p, saved[f"model/{name}"]) for name, p in model.named_parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU can't run")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.titans.scan.implementation": "triton"}, "model.titans.scan.implementation=triton"),
        (
            {"model.mixer": "attention", "model.attention.backend": "flash"},
            "model.attention.backend=flash",
        ),
    ],
)
def test_kernels_that_can_not_run_here_are_bad_input(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, words: str
) -> None:
    file = tmp_path / "config.yaml"
    config = make_config(**change)
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not config.run_dir.exists()
