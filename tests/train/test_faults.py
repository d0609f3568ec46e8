"""Faults on purpose: what they hit, and those that could hit nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.test_trainer import store_of
from tools.processes import run
from train.callbacks.faults import FIRED, read_fired
from train.callbacks.metrics import read_metrics
from train.checkpoint.manifest import damage
from train.config import ConfigError, RunConfig, load_config
from train.run import train

QUICK = {"model.mixer": "attention", "training.total_tokens": 6 * 256}


def trained(rank: int, configs: list[RunConfig]) -> list[int]:
    return [train(config, resume=False) for config in configs]


@pytest.mark.parametrize(
    "engines",
    [[("native", 1)], pytest.param([("deepspeed", 1), ("deepspeed", 3)], marks=pytest.mark.slow)],
    ids=["native", "deepspeed"],
)
def test_what_is_not_a_number_is_seen_in_either_engine(
    make_config, tmp_path: Path, engines: list[tuple[str, int]]
) -> None:
    """In a process of its own: DeepSpeed's group and what it keeps of it last as long as that."""
    few = {"training.total_tokens": 4 * 256, "checkpoint.asynchronous": False}
    configs = [
        make_config(
            **QUICK | few,
            **{"engine": engine, "deepspeed.zero_stage": stage},
            run_dir=str(tmp_path / f"{kind}-{engine}-{stage}"),
            faults=[{"kind": kind, "step": 3}],
        )
        for kind in ("nan_gradient", "nan_loss")
        for engine, stage in engines
    ]
    assert run(1, trained, configs, seconds=240) == [[0] * len(configs)]
    for config in configs:
        (skip,) = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if r["kind"] == "skip"]
        assert skip["tokens"] == 2 * 256, config.run_dir
        assert "not finite on rank 0" in skip["why"], config.run_dir


def test_damage_to_a_checkpoint_waits_for_one(make_config) -> None:
    """Nothing else of the run folder is touched."""
    fault = {"kind": "flip_checkpoint", "step": 1, "phase": "data"}
    every = {"checkpoint.every_tokens": 512, "checkpoint.asynchronous": False}
    config = make_config(**QUICK, **every, **{"checkpoint.keep_last": 9}, faults=[fault])
    assert train(config, resume=False) == 0
    assert load_config(config.run_dir / "config.yaml").faults == config.faults
    assert [row["at_step"] for row in read_fired(config.run_dir / FIRED)] == [3]
    found = [damage(one) is None for one in store_of(config).complete()]
    assert found == [False, True, True]


@pytest.mark.parametrize("phase", ["open", "start"])
def test_what_is_before_the_steps_needs_no_number_of_one(make_config, phase: str) -> None:
    """A number that was drawn would be of a step that is never in such a phase."""
    config = make_config(**QUICK, faults=[{"kind": "term", "phase": phase}])
    assert train(config, resume=False) == 143
    assert [row["at_step"] for row in read_fired(config.run_dir / FIRED)] == [0]


def test_faults_that_can_not_happen(
    make_config, corpora: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    far = [{"kind": "kill", "rank": 3, "step": 2}, {"kind": "kill", "rank": 0, "step": 99}]
    assert train(make_config(**QUICK, faults=far), resume=False) == 0
    told = capsys.readouterr().err
    assert "faults.0 is of rank 3, and there are 1 ranks" in told
    assert "faults.1 is of step 99, and the last one is 6" in told
    with pytest.raises(ConfigError, match=r"save-before-marker happen in another process"):
        make_config(faults=[{"kind": "disk_full"}])
    with pytest.raises(ConfigError, match="phase open comes before any step"):
        make_config(faults=[{"kind": "kill", "phase": "open", "step": 2}])
    url = {"checkpoint.url": "s3://bucket"}
    with pytest.raises(ConfigError, match=r"damages local files, and checkpoint.url is a URL"):
        make_config(**url, faults=[{"kind": "truncate_checkpoint"}])
    away = {"checkpoint.url": None, "data.train": [{"path": f"file://{corpora['train']}"}]}
    with pytest.raises(ConfigError, match=r"damages local files, and data.train.0.path is a URL"):
        make_config(**away, faults=[{"kind": "remove_shard"}])
