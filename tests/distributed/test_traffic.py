"""Bytes that a rank sends in a step: counted at the collectives, and by the formulas."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tools.parity import (
    FULL,
    LENGTH,
    ROWS,
    SP,
    STEP,
    deepspeed_config,
    make_batch,
    make_config,
)
from tools.processes import run
from train.clock import TokenClock
from train.config import RunConfig, validate_config
from train.corpora import open_corpora
from train.dry_run.build import dry_run
from train.dry_run.traffic import TRAINERS_NUMBERS, column_products
from train.engines import open_engine
from train.optim.levels import periods
from train.parallel.counting import CollectiveBytes
from train.parallel.part import cut_layers
from train.parallel.ranks import Ranks
from train.signals import StopSignals
from train.trainer import Trainer

PERIOD = 2
"""Steps after which every level has fired a whole number of times."""
LEVELS = [
    {"name": "a", "hidden_size": 16},
    {"name": "b", "hidden_size": 8, "update_every_tokens": 2 * STEP},
]
SMALL = {"model.num_layers": 2}
TWO: list[tuple[str, dict[str, Any]]] = [
    ("hope", {}),
    ("hope", {"tp": 2}),
    ("hope", {"tp": 2, **SP}),
    ("hope", {"tp": 2, "micro_batches": 2, **FULL}),
    ("hope", {"tp": 2, **SP, **FULL}),
    ("hope", {"tp": 2, **SP, "activation_checkpointing": "selective"}),
    ("hope", {"tp": 2, "precision": "bf16"}),
    ("hope", {"pp": 2, "micro_batches": 2}),
    ("hope", {"cp": 2, "micro_batches": 4}),
    ("hope-attention", {"cp": 2}),
    ("hope", {"dp_replicate": 1, "dp_shard": 2}),
    ("hope", {"dp_replicate": 1, "dp_shard": 2, "micro_batches": 2, **FULL}),
]
EIGHT: list[tuple[str, dict[str, Any]]] = [
    ("hope", {"pp": 2, "tp": 2, "dp_replicate": 1, "dp_shard": 2, "micro_batches": 2, **SP}),
    ("hope", {"pp": 2, "tp": 2, "cp": 2, "micro_batches": 2}),
    ("hope", {"tp": 2, "dp_replicate": 2, "dp_shard": 2, "micro_batches": 2}),
    ("hope", {"pp": 4, "dp_replicate": 2, "micro_batches": 4}),
    ("transformer", {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "micro_batches": 2}),
]


def counted(rank: int, configs: list[RunConfig]) -> list[dict[str, float]]:
    """Of each configuration the bytes by collective over a period of all levels."""
    return [one(config) for config in configs]


def one(config: RunConfig) -> dict[str, float]:
    engine = open_engine(config, Ranks())
    cadence = engine.make_cadence()
    clock, carried = TokenClock(periods(config.model)), None
    rows = ROWS // engine.mesh.data.size
    first = engine.mesh.data.rank * rows
    for _ in range(2):  # pipelines shake hands, and ZeRO 3 learns the order of layers
        engine.forward_backward(make_batch(0, first, first + rows), None)
        cadence.agree()
        cadence.drop()
    with CollectiveBytes() as found:
        for step in range(PERIOD):
            batch = make_batch(step, first, first + rows)
            loss, carried = engine.forward_backward(batch, carried)
            valid = engine.spoken_for(batch.labels).numel()
            cadence.agree([loss, valid, *[0.0] * (TRAINERS_NUMBERS - 2)])
            cadence.step(clock.advance(STEP), STEP, lambda _: 0.0, clock.tokens)
    return {name: size for name, size in found.bytes.items() if size}


def of_a_run(rank: int, config: RunConfig) -> list[float]:
    """Bytes that had been sent when each step of a training run began."""
    found: list[float] = []
    step = Trainer.step

    def noted(trainer: Trainer) -> Any:
        found.append(sum(counting.bytes.values()))
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch, CollectiveBytes() as counting:
        patch.setattr(Trainer, "step", noted)
        engine = open_engine(config, Ranks())
        trainer = Trainer(config, open_corpora(config), StopSignals(), engine)
        assert trainer.fit() is None
    trainer.loader.close()
    return found


def test_a_run_sends_what_a_dry_run_says(raw_config: dict[str, Any]) -> None:
    """With all that the trainer tells beside the cadence: whether to stop, for one."""
    raw_config["training"]["total_tokens"] = 8 * 256
    raw_config["evaluation"]["every_tokens"] = raw_config["checkpoint"]["every_tokens"] = 10**6
    raw_config["model"]["vocab_size"] = 400
    raw_config["model"]["cms"]["levels"] = [
        LEVELS[0],
        {**LEVELS[1], "update_every_tokens": PERIOD * 256},
    ]
    config = validate_config(raw_config, "test")
    expected = sum(dry_run(config, 2, 0).traffic.values())
    sent = run(2, of_a_run, config)[0]
    assert (sent[7] - sent[1]) / 6 == pytest.approx(expected, rel=1e-9)


def check(world: int, configs: dict[str, RunConfig]) -> None:
    """What every rank counts is what a dry run says of it."""
    answers = run(world, counted, list(configs.values()), seconds=300)
    for number, (name, config) in enumerate(configs.items()):
        for rank in range(world):
            expected: Counter[str] = Counter()
            for (_, collective), size in dry_run(config, world, rank).traffic.items():
                expected[collective] += PERIOD * size  # type: ignore[assignment]
            assert answers[rank][number] == pytest.approx(dict(+expected)), (name, rank)


def compare(world: int, model: str, layouts: list[dict[str, Any]], **changes: Any) -> None:
    changes = {"model.cms.levels": LEVELS, **changes}
    check(world, {str(layout): make_config(model, layout, **changes) for layout in layouts})


@pytest.mark.parametrize("model", ["hope-attention", pytest.param("hope", marks=pytest.mark.slow)])
def test_formula_of_each_axis_on_two_ranks(model: str) -> None:
    compare(2, model, [layout for name, layout in TWO if name == model], **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), EIGHT)
def test_formula_of_axes_together_on_eight_ranks(model: str, layout: dict[str, Any]) -> None:
    compare(8, model, [layout])


@pytest.mark.parametrize("mode", ["nested", pytest.param("independent", marks=pytest.mark.slow)])
def test_formula_of_other_modes(mode: str) -> None:
    compare(2, "hope", [{}, {"tp": 2, **SP, **FULL}], **SMALL, **{"model.cms.mode": mode})


def test_formula_of_memories_that_are_not_written() -> None:
    """Some of their parameters get no gradient, and none is added up."""
    layouts = [{}, {"dp_replicate": 1, "dp_shard": 2}]
    compare(2, "hope", layouts, **SMALL, **{"model.titans.writes": False})


def test_megatrons_layers_add_up_before_each_column_parallel_product() -> None:
    """Three a mixer (frozen memories: two) and two a level, in one layer with three levels."""
    frozen = make_config("hope", **{"model.titans.writes": False})
    for config, mixer in ((make_config("hope"), 3), (make_config("transformer"), 3), (frozen, 2)):
        assert column_products(cut_layers(config.model, range(1, 2))) == mixer + 2 * 3


@pytest.mark.slow
def test_formula_of_megatrons_layers() -> None:
    layout = {"tp": 2, "tensor_backend": "megatron"}
    compare(2, "hope-attention", [layout, {**layout, **FULL}], **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero-bubble", "zbv"])
def test_formula_of_schedules(schedule: str) -> None:
    compare(2, "hope", [{"pp": 2, "micro_batches": 4, "schedule": schedule}])


BF16: dict[str, Any] = {"precision": "bf16"}
ZERO: list[tuple[int, dict[str, Any]]] = [
    *((stage, {"micro_batches": 2, **one}) for stage in (1, 2, 3) for one in ({}, BF16)),
    (2, {"tp": 2, **SP}),
    (3, {"tp": 2, **BF16}),
    (1, {"pp": 2, "micro_batches": 2}),
]
"""ZeRO's stage and the section `parallel`."""
ZERO_ON_FOUR: list[tuple[int, dict[str, Any]]] = [
    (1, {"pp": 2, "tp": 2, "micro_batches": 2}),
    (1, {"pp": 2, "tp": 2, "micro_batches": 2, **SP, **BF16}),
    (1, {"pp": 2, "micro_batches": 4, **BF16}),
    (1, {"tp": 2, **SP}),
    (1, {"tp": 2, **BF16}),
    (2, {"tp": 2, **BF16}),
    (3, {"tp": 2, **SP}),
    (3, {}),
]


def compare_zero(world: int, cases: list[tuple[int, dict[str, Any]]], **changes: Any) -> None:
    changes = {"model.cms.levels": LEVELS, **SMALL, **changes}
    configs = {str(case): deepspeed_config("hope", *case, **changes) for case in cases}
    check(world, configs)


@pytest.mark.slow
def test_formula_of_deepspeed_on_two_ranks() -> None:
    compare_zero(2, ZERO)
    compare_zero(2, [(2, {})], **{"model.cms.mode": "nested"})


@pytest.mark.slow
def test_formula_of_deepspeed_on_four_ranks() -> None:
    compare_zero(4, ZERO_ON_FOUR)


KNOBS: list[tuple[int, dict[str, Any]]] = [
    (2, {"reduce_bucket_size": 3000}),
    (2, {"use_multi_rank_bucket_allreduce": False}),
    (2, {"reduce_scatter": False}),
    (3, {"reduce_bucket_size": 3000}),
    (3, {"reduce_scatter": False}),
    (3, {"param_persistence_threshold": 200}),
    (3, {"param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}),
    (3, {"param_persistence_threshold": 200, "max_reuse_distance": 0, "prefetch_bucket_size": 0}),
    (3, {"param_persistence_threshold": 0, "max_reuse_distance": 9000, "prefetch_bucket_size": 99}),
    (3, {"param_persistence_threshold": 0, "max_reuse_distance": 0, "max_live_parameters": 12000}),
]
"""ZeRO's stage and what a user's DeepSpeed file says of its buckets."""


@pytest.mark.slow
def test_formula_of_deepspeed_with_buckets_of_a_users_own(tmp_path: Path) -> None:
    """Layers are 8,664 numbers each; what ZeRO 3 lets go of after forward it gathers again."""
    changes: dict[str, Any] = {"model.cms.levels": LEVELS, **SMALL}
    configs = {}
    for number, (stage, keys) in enumerate(KNOBS):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"zero_optimization": keys}))
        configs[str(keys)] = deepspeed_config(
            "hope", stage, {"micro_batches": 2}, **changes, **{"deepspeed.config": str(path)}
        )
    path.write_text(json.dumps({"zero_optimization": {"param_persistence_threshold": 0}}))
    untied = {**changes, "model.tie_embeddings": False}
    configs["untied"] = deepspeed_config("hope", 3, **untied, **{"deepspeed.config": str(path)})
    check(2, configs)


def test_adding_up_at_the_update_saves_what_the_formula_says() -> None:
    """A level of period N: 2 / N passes over its gradient and not 1 + 1 / N."""
    compare(2, "hope", [{}], **SMALL, **{"optimizer.reduce": "at_update"})


LATE: list[dict[str, Any]] = [
    {"dp_replicate": 2, "dp_shard": 2},
    {"dp_replicate": 2, "dp_shard": 2, "micro_batches": 2, **FULL},
    {"tp": 2, "micro_batches": 2},
    {"pp": 2, "micro_batches": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("levels", [{"b": {"reduce": "at_update"}}, {"a": {"reduce": "at_update"}}])
def test_replicas_add_up_a_level_when_it_fires(levels: dict[str, Any]) -> None:
    """Of shares what a replica's ranks have added up, and nothing between micro-batches."""
    compare(4, "hope", LATE, **SMALL, **{"optimizer.levels": levels})


def test_matrices_that_are_cut_are_gathered_to_be_orthogonalised() -> None:
    """By Muon once each time their level fires, by M3 twice; stacks are cut between matrices."""
    optimizer = {"optimizer.name": "muon", "optimizer.levels": {"b": {"name": "m3"}}}
    compare(2, "hope", [{"tp": 2}, {"dp_replicate": 1, "dp_shard": 2}], **SMALL, **optimizer)


@pytest.mark.slow
def test_matrices_that_are_cut_twice_are_gathered_along_both_axes() -> None:
    layouts = [
        {"tp": 2, "dp_replicate": 1, "dp_shard": 2, **SP},
        {"tp": 2, "dp_replicate": 2},
        {"pp": 2, "tp": 2, "micro_batches": 2},
        {"dp_replicate": 1, "dp_shard": 2, "cp": 2},
    ]
    for name in ("muon", "m3"):
        compare(4, "hope-attention", layouts, **SMALL, **{"optimizer.name": name})


def test_replicas_add_up_no_more_than_they_have_of_what_does_not_come_out_even() -> None:
    """The parameters once: five memories on two ranks are three and two."""
    config = make_config(
        "hope",
        {"dp_replicate": 2, "dp_shard": 2},
        **{"model.cms.levels": LEVELS[:1], "optimizer.reduce": "at_update"},
    )
    runs = [dry_run(config, 4, rank) for rank in (0, 1)]
    sent = [run.traffic["dp", "all-reduce"] for run in runs]
    assert sent[0] > sent[1]
    assert sum(sent) == 4 * runs[0].parameters


def test_tensor_parallel_bytes_are_megatrons() -> None:
    """With one level four all-reduces of [B, T, dim] a layer; fast weights of any size add none."""
    answers = run(2, megatron, seconds=120)
    assert answers[0] == answers[1]
    layers, wider, expected = answers[0]
    assert layers == wider == expected


def megatron(rank: int) -> tuple[float, float, float]:
    """Bytes of two layers more, with memories of width 8 and 32, and what Megatron's cost."""
    level = [{"name": "mlp", "hidden_size": 16}]
    found = []
    for expansion in (1, 4):
        totals = []
        for layers in (2, 4):
            changes = {"model.cms.levels": level, "model.num_layers": layers}
            changes["model.titans.memory_expansion"] = expansion
            engine = open_engine(make_config("hope", {"tp": 2}, **changes), Ranks())
            with CollectiveBytes() as counted:
                engine.forward_backward(make_batch(0, 0, ROWS), None)
            totals.append(counted.bytes["all-reduce"])
        found.append(totals[1] - totals[0])
    activation = prod((ROWS, LENGTH, 32)) * 4
    return found[0], found[1], 2 * 4 * activation
