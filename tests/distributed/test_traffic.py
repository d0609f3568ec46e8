"""Bytes that a rank sends in a step: counted at the collectives, and by the formulas."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import pytest

from tools.parity import FULL, LENGTH, ROWS, SP, STEP, make_batch, make_config
from tools.processes import run
from train.clock import TokenClock
from train.dry_run.traffic import predict_traffic
from train.engines import open_engine
from train.optim.levels import periods
from train.parallel.counting import CollectiveBytes
from train.parallel.ranks import Ranks

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


def counted(
    rank: int, model: str, layouts: list[dict[str, Any]], changes: dict[str, Any]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(counted, predicted) of each layout: bytes by collective over a period of all levels."""
    return [one(model, parallel, changes) for parallel in layouts]


def one(
    model: str, parallel: dict[str, Any], changes: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    config = make_config(model, parallel, **{"model.cms.levels": LEVELS, **changes})
    ranks = Ranks()
    engine = open_engine(config, ranks)
    cadence = engine.make_cadence()
    clock, carried = TokenClock(periods(config.model)), None
    rows = ROWS // engine.mesh.data.size
    first = engine.mesh.data.rank * rows
    engine.forward_backward(make_batch(0, first, first + rows), None)  # pipelines shake hands once
    cadence.drop()
    with CollectiveBytes() as found:
        for step in range(PERIOD):
            batch = make_batch(step, first, first + rows)
            loss, carried = engine.forward_backward(batch, carried)
            valid = engine.spoken_for(batch.labels).numel()
            cadence.agree([loss, valid])
            cadence.step(clock.advance(STEP), STEP, lambda _: 0.0, clock.tokens)
    expected: Counter[str] = Counter()
    for (_, collective), size in predict_traffic(config, engine.mesh, numbers=2).items():
        expected[collective] += PERIOD * size
    return dict(found.bytes), dict(expected)


def compare(world: int, model: str, layouts: list[dict[str, Any]], **changes: Any) -> None:
    for answers in run(world, counted, model, layouts, changes, seconds=300):
        for layout, (found, expected) in zip(layouts, answers, strict=True):
            assert found == pytest.approx(expected), layout


@pytest.mark.parametrize("model", ["hope", "hope-attention"])
def test_formula_of_each_axis_on_two_ranks(model: str) -> None:
    compare(2, model, [layout for name, layout in TWO if name == model], **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), EIGHT)
def test_formula_of_axes_together_on_eight_ranks(model: str, layout: dict[str, Any]) -> None:
    compare(8, model, [layout])


@pytest.mark.parametrize("mode", ["independent", "nested"])
def test_formula_of_other_modes(mode: str) -> None:
    compare(2, "hope", [{}, {"tp": 2, **SP, **FULL}], **SMALL, **{"model.cms.mode": mode})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero-bubble", "zbv"])
def test_formula_of_schedules(schedule: str) -> None:
    compare(2, "hope", [{"pp": 2, "micro_batches": 4, "schedule": schedule}])


def test_adding_up_at_the_update_saves_what_the_formula_says() -> None:
    """A level of period N: 2 / N passes over its gradient and not 1 + 1 / N."""
    compare(2, "hope", [{}], **SMALL, **{"optimizer.reduce": "at_update"})


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
