"""The dry run's formulas of memory, by hand on small numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hope import HopeModel
from tools.parity import STEP, deepspeed_config, make_config
from train.dry_run import memory
from train.dry_run.build import dry_run
from train.dry_run.memory import Memory, fsdp_buffers, held_bytes, order_of_one_stage
from train.dry_run.traffic import steps_of_periods
from train.dry_run.zero import DEFAULTS, Lines, buckets_of
from train.dry_run.zero_memory import Zero
from train.parallel.mesh import Mesh, alone
from train.parallel.ranks import Ranks
from train.zero.cadence import Group


def test_the_peak_is_in_backward_or_in_the_update() -> None:
    held = Memory(1, 2, 4, 8, 16, activations=32, step_buffers=64, update=90)
    assert held.peak == 31 + 96
    assert replace(held, update=97).peak == 31 + 97


@pytest.mark.parametrize(("micro_batches", "passes"), [(1, "FB"), (2, "FFBB"), (5, "FFFFBFBBBB")])
def test_a_first_stage_of_four(micro_batches: int, passes: str) -> None:
    actions = order_of_one_stage(micro_batches, 4, 0, "1f1b")
    assert "".join(action.kind for action in actions) == passes


def test_what_fsdp2_buffers() -> None:
    assert fsdp_buffers([10, 30, 20], 5, 2, False) == (2 * (5 + 30 + 30), 30 * (2 + 4))
    assert fsdp_buffers([10, 30, 20], 5, 2, True) == (2 * (60 + 5 + 30), 0)


def several(size: int) -> Mesh:
    ranks = Ranks.alone()
    ranks.size = size
    return replace(alone(), reduce=ranks)


def test_what_gradients_need_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket, and of a level that does not fire every step the shares."""
    level = {"name": "slow", "hidden_size": 1024, "update_every_tokens": 2 * STEP}
    config = make_config("transformer", **{"model.cms.levels": [level]})
    named = {name: p.detach() for name, p in HopeModel(config.model).named_parameters()}
    every, numbers = steps_of_periods(config), 4 * (3 * 1024 * 32 + 32)
    assert memory.update_buffers(config, several(2), named, every) == 4 * numbers * 3 // 2
    assert memory.update_buffers(config, several(1), named, every) == 0
    monkeypatch.setattr(memory, "BUCKET_ELEMENTS", 100)
    needed = memory.update_buffers(config, several(2), named, every)
    assert needed == 4 * (1024 * 32 + numbers // 2)


@pytest.mark.parametrize(
    ("reduce", "rows"), [("every_step", (2, 11, 8)), ("at_update", (5, 32, 23))]
)
def test_accumulators_are_divided_by_rows(reduce: str, rows: tuple[int, int, int]) -> None:
    """Over three ranks: of matrices of 5 and 32 rows 2 and 11, of 23 entries 8."""
    level = {"name": "slow", "hidden_size": 5, "update_every_tokens": 2 * STEP}
    changes = {"model.cms.levels": [level], "optimizer.levels": {"slow": {"reduce": reduce}}}
    config = make_config("transformer", **changes)
    named = {name: p.detach() for name, p in HopeModel(config.model).named_parameters()}
    few = {n: p for n, p in named.items() if n.startswith("layers.0.cms.levels.0.")}
    norms = [n for n, p in few.items() if p.ndim == 1]
    few[norms[0]] = few[norms[0]][:23]
    found = held_bytes(config, several(3), few, steps_of_periods(config))
    assert found["accumulators"] == 4 * (2 * rows[0] * 32 + rows[1] * 5 + rows[2])


SIZES = {"a": 5, "b": 2}


def lines(stage: int, ranks: int, rank: int) -> Lines:
    return Lines([Group("fast", 0.0, list(SIZES))], SIZES, set(), stage, ranks, rank)


def test_where_zero_puts_parameters() -> None:
    """7 numbers over 4 ranks: in one line pieces of 2; one by one pieces of 2 and of 1."""
    found = [lines(1, 4, rank).fragments() for rank in range(4)]
    assert found == [{"a": 2, "b": 0}, {"a": 2, "b": 0}, {"a": 1, "b": 1}, {"a": 0, "b": 1}]
    assert [lines(1, 4, rank).touched for rank in range(4)] == [5, 5, 7, 2]
    assert (lines(1, 4, 0).padded, lines(1, 3, 0).padded, lines(3, 4, 0).padded) == (8, 12, 12)
    found = [lines(3, 4, rank).fragments() for rank in range(4)]
    assert found == [{"a": 2, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 0}, {"a": 0, "b": 0}]


@pytest.mark.parametrize(
    ("stage", "itemsize", "micro_batches", "device", "weights", "left", "reducing", "updating"),
    [
        (1, 4, 1, "cpu", 4 * 8 + 4 * 4, 4 * 7, 8 * 7, 4 * 5 + 2 * 16),
        (1, 2, 1, "cpu", 2 * 8 + 4 * 4, 4 * 8 + 2 * 7, 8 * 8 + 2 * 7, 4 * 8 + 2 * 7 + 16),
        (2, 4, 1, "cpu", 4 * 8 + 4 * 4, 4 * 5, 8 * 7, 4 * 5 + 2 * 16),
        (2, 4, 2, "cpu", 4 * 8 + 4 * 4, 4 * 5, 8 * 7 + 4 * 5, 4 * 5 + 2 * 16),
        (2, 2, 1, "cpu", 2 * 8 + 4 * 4, 4 * 4, 8 * 7 + 16, 2 * 16),
        (3, 4, 1, "cpu", 8 * 4 + 4 * 2, 4 * (4 + 7), 4 * (4 + 7) + 8 * 7, 4 * (4 + 7) + 2 * 16),
        (3, 4, 1, "cuda", 8 * 4 + 4 * 2, 4 * (4 + 7), 4 * (4 + 7) + 4 * 7, 4 * (4 + 7) + 2 * 16),
    ],
)
def test_what_zero_holds(
    stage: int,
    itemsize: int,
    micro_batches: int,
    device: str,
    weights: int,
    left: int,
    reducing: int,
    updating: int,
) -> None:
    """The table of docs/deepspeed.md: P = 7 numbers, F = 8, S = 4 and T = 5 on the first of two
    ranks; the 2 of the small parameter stay whole."""
    buckets = {**DEFAULTS, "param_persistence_threshold": 2}
    zero = Zero(lines(stage, 2, 0), buckets, itemsize, micro_batches, device)
    assert (zero.weights, zero.left, zero.reducing) == (weights, left, reducing)
    assert zero.updating == updating


def test_zero_2_keeps_gradients_between_micro_batches() -> None:
    runs = [dry_run(deepspeed_config("hope", 2, {"micro_batches": n}), 2, 0) for n in (1, 2)]
    once, twice = (run.memory.gradients for run in runs)
    assert once == 0
    assert twice > 4 * runs[1].own_parameters // 2


def test_buckets_are_those_of_the_users_file(tmp_path: Path) -> None:
    own = {"stage3_param_persistence_threshold": 7, "reduce_bucket_size": 9}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": own}))
    changes = {"deepspeed.config": str(tmp_path / "ds.json")}
    found = buckets_of(deepspeed_config("hope", 3, **changes), alone())
    assert found == {**DEFAULTS, "param_persistence_threshold": 7, "reduce_bucket_size": 9}


@pytest.mark.parametrize(
    ("parallel", "share"),
    [({"tp": 2}, (2, 2)), ({"cp": 2}, (1, 0)), ({"pp": 2, "micro_batches": 2}, (2, 2))],
)
def test_carried_state_lies_where_it_is_carried(
    parallel: dict[str, Any], share: tuple[int, int]
) -> None:
    """Heads and layers are divided; of the pieces of a sequence the first carries it."""
    whole = dry_run(make_config("hope"), 1, 0).memory.fast_state
    config = make_config("hope", parallel)
    found = tuple(dry_run(config, 2, rank).memory.fast_state for rank in (0, 1))
    assert found == tuple(whole // n if n else 0 for n in share)
