"""Levels through whole runs: when they fire, how they end, and what each has of its own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_trainer import final_tensors, store_of
from train.callbacks.metrics import read_metrics
from train.config import RunConfig
from train.optim.build import build_cadence
from train.run import train
from train.trainer import Trainer

BATCH = 256


def rows_of(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("slowest", [4097, pytest.param(4096, marks=pytest.mark.slow)])
def test_four_levels_until_the_slowest_has_fired_five_times(make_config, slowest: int) -> None:
    """Periods that do not divide the batch; each firing where the clock's definition puts it."""
    periods = {"a": "step", "b": 300, "c": 1100, "d": slowest}
    config = make_config(
        **{
            "model.cms.levels": [
                {"name": name, "hidden_size": 8, "update_every_tokens": period}
                for name, period in periods.items()
            ],
            "training.total_tokens": 81 * BATCH,
            "checkpoint.every_tokens": 10**6,
            "evaluation.every_tokens": 10**6,
        }
    )
    train(config, resume=False)
    steps = rows_of(config, "step")
    assert len(steps) == 81
    for name, period in periods.items():
        fired = [row["tokens"] for row in steps if name in row["lr"]]
        counts = range(0, 82 * BATCH, BATCH)
        every = 1 if period == "step" else period
        assert fired == [now for before, now in pairwise(counts) if now // every > before // every]
    assert sum("d" in row["lr"] for row in steps) == 5
    pending = store_of(config).plain(store_of(config).newest())["cadence"]["tokens"]
    last = {name: [row["tokens"] for row in steps if name in row["lr"]][-1] for name in periods}
    assert pending == {"fast": 0} | {name: 81 * BATCH - last[name] for name in periods}


def test_flush_fires_what_is_pending_once(make_config, tmp_path: Path) -> None:
    """12 steps: b ends with a whole period, c two steps into its third."""
    config = make_config(**{"training.flush": True})
    assert train(config, resume=False) == 0
    (flush,) = rows_of(config, "flush")
    assert flush["tokens"] == 12 * BATCH
    assert flush["pending_tokens"].keys() == {"c"}
    assert flush["pending_tokens"]["c"] == sum_of_valid(config, 2)
    assert set(flush["lr"]) == set(flush["level_norms"]) == {"c"}
    assert not any("accumulated_grad" in name for name in final_tensors(config))
    before = final_tensors(config)
    assert train(config, resume=True) == 0  # a finished run: nothing is left to fire
    after = final_tensors(config)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(rows_of(config, "flush")) == 1
    plain = make_config(**{"training.flush": False, "run_dir": str(tmp_path / "plain")})
    train(plain, resume=False)
    kept = final_tensors(plain)
    for name in (name for name in kept if name.startswith("model/")):
        assert torch.equal(kept[name], before[name]) == ("cms.levels.2." not in name), name


def test_a_finished_run_can_be_flushed_later(make_config, tmp_path: Path) -> None:
    at_once = make_config(**{"training.flush": True, "run_dir": str(tmp_path / "at_once")})
    train(at_once, resume=False)
    later = make_config(**{"training.flush": False, "run_dir": str(tmp_path / "later")})
    train(later, resume=False)
    later = make_config(**{"training.flush": True})
    train(later, resume=True)
    first, second = final_tensors(at_once), final_tensors(later)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected = rows_of(at_once, "evaluation")[-1]
    before, after = rows_of(later, "evaluation")[-2:]
    assert before["tokens"] == after["tokens"] == 12 * BATCH
    assert before["loss"] != after["loss"] == expected["loss"]
    plain = store_of(later).plain(store_of(later).newest())
    assert plain["evaluation"]["loss"] == after["loss"]


def test_a_stop_before_the_end_flushes_nothing(make_config) -> None:
    config = make_config(**{"training.flush": True, "training.stop_at_tokens": 4 * BATCH})
    train(config, resume=False)
    assert rows_of(config, "flush") == []


def sum_of_valid(config: RunConfig, last: int) -> int:
    """Tokens that counted in the last steps; every position does in these corpora."""
    return last * config.training.batch_tokens


def test_each_level_has_what_its_own_words_say(make_config) -> None:
    config = make_config(
        **{
            "optimizer.levels": {
                "b": {"name": "sgd", "lr_scale": 3.0, "weight_decay": 0.0},
                "c": {
                    "schedule": {"name": "constant"},
                    "clip_norm": 1e-3,
                    "weight_decay": 0.5,
                },
            },
            "optimizer.schedule": {"name": "wsd", "warmup_tokens": 512, "decay_tokens": 1024},
        }
    )
    train(config, resume=False)
    kinds = {
        name.rpartition("/")[2]
        for name in final_tensors(config)
        if "cms.levels.1." in name and name.startswith("optimizer/")
    }
    assert kinds <= {"accumulated_grad"}  # plain SGD keeps nothing
    for row in rows_of(config, "step"):
        left = 12 * BATCH - row["tokens"]
        shape = min(1.0, row["tokens"] / 512, 0.1 + 0.9 * left / 1024)
        assert row["lr"]["fast"] == pytest.approx(0.01 * shape)
        if "b" in row["lr"]:
            assert row["lr"]["b"] == pytest.approx(0.03 * shape)
        if "c" in row["lr"]:
            assert row["lr"]["c"] == 0.01
            assert row["level_norms"]["c"] > 1e-3
            others = [norm for name, norm in row["level_norms"].items() if name != "c"]
            assert row["grad_norm"] == pytest.approx(
                torch.tensor([*others, 1e-3]).norm().item(), rel=1e-4
            )


def test_weight_decay_of_a_level_is_its_own(make_config) -> None:
    config = make_config(**{"optimizer.levels": {"c": {"weight_decay": 0.5}}}).optimizer
    model_config = make_config(**{"model.vocab_size": 64}).model
    from hope import HopeModel

    cadence = build_cadence(HopeModel(model_config), model_config, config)
    found = {
        level.name: {
            group["weight_decay"] for one in level.optimizers for group in one.param_groups
        }
        for level in cadence.levels
    }
    assert found == {"fast": {0.0, 0.1}, "a": {0.0, 0.1}, "b": {0.0, 0.1}, "c": {0.0, 0.5}}


def test_skipped_levels_cost_no_optimizer_work(make_config) -> None:
    """The optimizers of a level are called when it fires, and at no other time."""
    config = make_config()
    calls: dict[str, int] = {}
    honest = Trainer.__post_init__

    def counted(self: Trainer) -> None:
        honest(self)
        for level in self.cadence.levels:
            for optimizer in level.optimizers:
                count_calls(optimizer, level.name)

    def count_calls(optimizer: torch.optim.Optimizer, name: str) -> None:
        step = optimizer.step

        def counting(*arguments: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return step(*arguments)

        optimizer.step = counting  # type: ignore[method-assign]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__post_init__", counted)
        train(config, resume=False)
    assert calls == {"fast": 12, "a": 12, "b": 4, "c": 2}
