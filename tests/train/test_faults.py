"""Faults on purpose: what they hit, and those that could hit nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.test_trainer import store_of
from train.__main__ import train
from train.callbacks.faults import FIRED, read_fired
from train.callbacks.metrics import read_metrics
from train.checkpoint.manifest import damage
from train.config import ConfigError, load_config

QUICK = {"model.mixer": "attention", "training.total_tokens": 6 * 256}


@pytest.mark.parametrize(
    "changes",
    [{}, {"engine": "deepspeed"}, {"engine": "deepspeed", "deepspeed.zero_stage": 3}],
    ids=["native", "zero-1", "zero-3"],
)
@pytest.mark.parametrize("kind", ["nan_gradient", "nan_loss"])
def test_what_is_not_a_number_is_seen_in_either_engine(
    make_config, changes: dict[str, Any], kind: str
) -> None:
    config = make_config(**QUICK, **changes, faults=[{"kind": kind, "step": 3}])
    assert train(config, resume=False) == 0
    (skip,) = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if r["kind"] == "skip"]
    assert skip["tokens"] == 2 * 256
    assert "not finite on rank 0" in skip["why"]


def test_damage_to_a_checkpoint_waits_for_one(make_config, tmp_path: Path) -> None:
    """Nothing else of the run folder is touched."""
    fault = {"kind": "flip_checkpoint", "step": 1, "phase": "data"}
    every = {"checkpoint.every_tokens": 512, "checkpoint.asynchronous": False}
    config = make_config(**QUICK, **every, **{"checkpoint.keep_last": 9}, faults=[fault])
    assert train(config, resume=False) == 0
    assert load_config(config.run_dir / "config.yaml").faults == config.faults
    assert [row["at_step"] for row in read_fired(config.run_dir / FIRED)] == [3]
    found = [damage(one) is None for one in store_of(config).complete()]
    assert found == [False, True, True]


def test_faults_that_can_not_happen(
    make_config, corpora: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    far = [{"kind": "kill", "rank": 3, "step": 2}, {"kind": "kill", "rank": 0, "step": 99}]
    assert train(make_config(**QUICK, faults=far), resume=False) == 0
    told = capsys.readouterr().err
    assert "faults.0 is of rank 3, and there are 1 ranks" in told
    assert "faults.1 is of step 99, and the last one is 6" in told
    url = {"checkpoint.url": "memory://bucket"}
    with pytest.raises(ConfigError, match=r"damages local files, and checkpoint.url is a URL"):
        make_config(**url, faults=[{"kind": "truncate_checkpoint"}])
    away = {"checkpoint.url": None, "data.train": [{"path": f"file://{corpora['train']}"}]}
    with pytest.raises(ConfigError, match=r"damages local files, and data.train.0.path is a URL"):
        make_config(**away, faults=[{"kind": "remove_shard"}])
