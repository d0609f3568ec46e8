"""DeepSpeed against one process of our own engine: ZeRO, tensor parallelism, its pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.loader import rows_of_rank
from tools.parity import (
    ROWS,
    STEP,
    Trace,
    alone,
    deepspeed_config,
    make_batch,
    make_config,
    several,
    take_up,
    trained,
    whole,
    worst_error,
)
from tools.processes import run
from train.checkpoint.store import CheckpointStore
from train.clock import TokenClock
from train.config import RunConfig
from train.engines import open_engine
from train.optim.levels import periods
from train.parallel.ranks import Ranks

EXACT, BF16 = 1e-5, 0.05
"""Float32: round-off. Bfloat16: eight steps against float32's; one lost gradient costs 0.28."""

Case = tuple[str, int, dict[str, Any]]

CASES: list[Case] = [
    ("transformer", 2, {"tp": 2, "sequence_parallel": True}),
    ("hope", 1, {"precision": "bf16", "micro_batches": 2}),
    ("hope", 2, {"micro_batches": 2}),
    ("hope-attention", 3, {}),
    ("transformer", 1, {"pp": 2, "micro_batches": 4}),
]
MORE: list[Case] = [
    ("hope", 2, {"precision": "bf16"}),
    ("hope", 3, {"precision": "bf16", "micro_batches": 4}),
    ("hope", 1, {"pp": 2, "micro_batches": 2, "precision": "bf16"}),
    ("hope", 1, {"tp": 2, "precision": "bf16"}),
    ("hope", 3, {"tp": 2, "precision": "bf16", "sequence_parallel": True}),
]
"""Beside `tools.parity.DEEPSPEED_LAYOUTS`, which test_parity.py goes through."""


def phases(rank: int, config: RunConfig) -> list[str]:
    """What this rank enters between reading a batch and adding up its gradients."""
    engine, found = open_engine(config, Ranks()), list[str]()
    engine.mesh.world.pulse.listeners.append(found.append)
    engine.forward_backward(make_batch(0, 0, ROWS), None)
    return found


@pytest.mark.parametrize("engine", [make_config, partial(deepspeed_config, stage=1)])
def test_a_pipelines_step_has_the_phases_that_faults_are_aimed_at(engine: Any) -> None:
    config = engine("transformer", parallel={"pp": 2, "micro_batches": 2})
    assert run(2, phases, config) == [["forward", "backward"]] * 2


def check(ranks: int, cases: list[Case]) -> None:
    found = run(ranks, several, [deepspeed_config(*case) for case in cases], seconds=600)
    errors = {}
    for number, case in enumerate(cases):
        allowed = BF16 if case[2].get("precision") == "bf16" else EXACT
        error = worst_error([one[number] for one in found], alone(case[0]))
        if not error <= allowed:
            errors[str(case)] = error
    assert not errors


def test_two_ranks() -> None:
    check(2, CASES)


def test_what_gets_no_gradient_does_not_decay() -> None:
    """With the memories' writes off their parameters stay as they were, as in our own engine."""
    off = {"model.titans.writes": False, "model.num_layers": 2}
    expected = trained(0, make_config("hope", **off), ranks=Ranks.alone())
    found = run(2, several, [deepspeed_config("hope", 2, **off)], seconds=300)
    assert worst_error([traces[0] for traces in found], expected) <= EXACT


NESTED: dict[str, Any] = {
    "model.cms.mode": "nested",
    "model.cms.levels": [
        {"name": "a", "hidden_size": 16},
        {"name": "b", "hidden_size": 8, "update_every_tokens": 2 * STEP},
        {"name": "c", "hidden_size": 8, "update_every_tokens": 4 * STEP},
    ],
}
NESTED_CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"pp": 2, "micro_batches": 2}),
    (2, {"micro_batches": 2}),
    (3, {}),
    (3, {"tp": 2}),
]


@pytest.mark.slow
def test_levels_set_back_to_their_starts() -> None:
    """Eq. 72: the starts are partitions, too, with moments of their own."""
    expected = trained(0, make_config("hope", **NESTED), ranks=Ranks.alone())
    sequential = make_config("hope", **{**NESTED, "model.cms.mode": "sequential"})
    other = trained(0, sequential, ranks=Ranks.alone())
    assert other.losses[-1] != pytest.approx(expected.losses[-1], rel=EXACT)
    configs = [deepspeed_config("hope", *case, **NESTED) for case in NESTED_CASES]
    found = run(2, several, configs, seconds=600)
    errors = [worst_error([one[n] for one in found], expected) for n in range(len(configs))]
    assert max(errors) <= EXACT, errors


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_in_bfloat16() -> None:
    check(2, MORE)


def story(rank: int, configs: list[RunConfig], folder: str) -> Trace:
    """Four steps under each configuration, from the checkpoint of the one before. The second step
    of all is spoiled, and dropped; at the end every level fires on what it has."""
    ranks = Ranks()
    clock = TokenClock(periods(configs[0].model))
    losses: list[float] = []
    norms: list[dict[str, float]] = []
    for leg, config in enumerate(configs):
        engine = open_engine(config, ranks)
        cadence = engine.make_cadence()
        data = engine.mesh.data
        first, last = rows_of_rank(ROWS, data.rank, data.size)
        store = CheckpointStore(Path(folder), ranks, keep_last=9)
        carried = None
        if leg > 0:
            saved = store.newest()
            elsewhere = alone(MODEL).parameters.keys() - engine.parameters.keys()
            take_up(engine, cadence, store, saved, set(elsewhere))
            rows = [store.tensors(saved, f"stream/{row}/") for row in range(first, last)]
            carried = engine.take_up_rows(rows, range(first, last))
        honest = engine.loss  # type: ignore[attr-defined]
        for step in range(4 * leg, 4 * leg + 4):
            batch = make_batch(step, first, last)
            spoiled = step == 1
            set_loss(engine, partial(scaled, honest, float("nan") if spoiled else 1.0))
            loss, after = engine.forward_backward(batch, carried)
            counted = engine.spoken_for(batch.labels).numel()
            (total, valid), problem = cadence.agree([loss, counted])
            assert (problem is not None) == spoiled
            if spoiled:
                cadence.drop()
                continue
            carried = after
            report = cadence.step(clock.advance(STEP), int(valid), lambda _: 0.005, clock.tokens)
            losses.append(total / valid)
            norms.append({**report.level_norms, "all": report.grad_norm})
        set_loss(engine, honest)
        optimizer, plain = cadence.state_dict()
        tensors: dict[str, Tensor] = {
            **{f"model/{name}": one for name, one in engine.saved_parameters().items()},
            **{f"optimizer/{name}": one for name, one in optimizer.items()},
            **engine.carried_rows(carried, range(first, last)),
        }
        store.save(leg, tensors, plain)
    report = cadence.flush(lambda _: 0.005, clock.tokens)
    assert report is not None
    norms.append({**report.level_norms, "all": report.grad_norm})
    batch = make_batch(999, first, last)
    total, valid = ranks.sum([engine.held_out(batch), engine.spoken_for(batch.labels).numel()])
    parameters = {name: whole(p).clone() for name, p in engine.saved_parameters().items()}
    return Trace(losses, norms, parameters, total / valid)


def scaled(loss: Any, by: float, *arguments: Tensor) -> Tensor:
    return loss(*arguments) * by


def set_loss(engine: Any, loss: Any) -> None:
    engine.loss = loss
    if getattr(engine, "_pipeline", None) is not None:
        engine._pipeline.engine.module.loss_fn = loss


MODEL = "hope-attention"
LEGS: dict[str, list[RunConfig]] = {
    "native, ZeRO 2": [
        make_config(MODEL, {"dp_shard": 2, "dp_replicate": 1}),
        deepspeed_config(MODEL, 2, {}),
    ],
    "ZeRO 3, native": [deepspeed_config(MODEL, 3, {}), make_config(MODEL)],
}
MORE_LEGS: dict[str, list[RunConfig]] = {
    "pipeline, ZeRO 1": [
        deepspeed_config(MODEL, 1, {"pp": 2, "micro_batches": 2}),
        deepspeed_config(MODEL, 1, {}),
    ],
    "native tp, ZeRO 3 tp": [make_config(MODEL, {"tp": 2}), deepspeed_config(MODEL, 3, {"tp": 2})],
    "ZeRO 1 tp, native": [deepspeed_config(MODEL, 1, {"tp": 2}), make_config(MODEL, {"tp": 2})],
}


def check_legs(tmp_path: Path, table: dict[str, list[RunConfig]], **changes: Any) -> None:
    plain = make_config(MODEL, **changes)
    expected = story(0, [plain, plain], str(tmp_path / "alone"))
    folders = [str(tmp_path / str(number)) for number in range(len(table))]
    found = run(2, stories, list(table.values()), folders, seconds=600)
    errors = {
        name: worst_error([one[number] for one in found], expected)
        for number, name in enumerate(table)
    }
    assert max(errors.values()) <= EXACT, errors


def stories(rank: int, legs: list[list[RunConfig]], folders: list[str]) -> list[Trace]:
    return [story(rank, configs, folder) for configs, folder in zip(legs, folders, strict=True)]


def test_checkpoints_pass_from_engine_to_engine(tmp_path: Path) -> None:
    check_legs(tmp_path, LEGS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_pass_between_more_layouts(tmp_path: Path) -> None:
    check_legs(tmp_path, MORE_LEGS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_starts_pass_from_engine_to_engine(tmp_path: Path) -> None:
    legs = {
        "native, ZeRO 2": [make_config(MODEL, **NESTED), deepspeed_config(MODEL, 2, **NESTED)],
        "ZeRO 3, native": [deepspeed_config(MODEL, 3, **NESTED), make_config(MODEL, **NESTED)],
    }
    check_legs(tmp_path, legs, **NESTED)


@pytest.mark.slow
def test_accumulated_gradients_are_float32_in_bf16() -> None:
    """What waits in an accumulator was never rounded to bfloat16."""
    config = deepspeed_config("hope", 1, {"precision": "bf16", "micro_batches": 2})
    (kept,) = run(1, pending, config)
    assert all(one.dtype == torch.float32 for one in kept.values())
    assert any(not torch.equal(one, one.bfloat16().float()) for one in kept.values())


def pending(rank: int, config: RunConfig) -> dict[str, Tensor]:
    engine = open_engine(config, Ranks())
    cadence = engine.make_cadence()
    batch = make_batch(0, 0, ROWS)
    engine.forward_backward(batch, None)
    cadence.step({"fast"}, STEP, lambda _: 0.0)
    tensors, _ = cadence.state_dict()
    return {name: one for name, one in tensors.items() if name.endswith("accumulated_grad")}
