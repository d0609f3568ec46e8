"""Levels with reduce: at_update where ranks have shares or parts of the parameters: FSDP2 with
replicas, tensor parallelism, pipelines. Plain ranks: test_reductions.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.loader import rows_of_rank
from tools.parity import (
    ROWS,
    SP,
    STEP,
    TOLERANCE,
    alone,
    errors_of,
    make_batch,
    make_config,
    take_up,
    whole,
)
from tools.processes import run
from train.checkpoint import CheckpointStore
from train.clock import TokenClock
from train.config import ConfigError, RunConfig
from train.engines import layout_of, open_engine
from train.optim.levels import periods
from train.parallel.ranks import Ranks

MODEL = "hope-attention"
SLOW: dict[str, Any] = {"optimizer.levels": {name: {"reduce": "at_update"} for name in "bc"}}
ALL: dict[str, Any] = {"optimizer.reduce": "at_update"}
BUT_ONE: dict[str, Any] = {**ALL, "optimizer.levels": {"b": {"reduce": "every_step"}}}
HSDP: dict[str, Any] = {"dp_replicate": 2, "dp_shard": 2}
FULL: dict[str, Any] = {"micro_batches": 2, "activation_checkpointing": "full"}

Case = tuple[dict[str, Any], dict[str, Any]]
FOUR: list[Case] = [
    (HSDP, SLOW),
    (HSDP | FULL, BUT_ONE),
    ({"tp": 2, **SP}, SLOW),
    ({"tp": 2}, ALL),
    ({"pp": 2, "micro_batches": 2}, SLOW),
]
EIGHT: list[Case] = [
    (HSDP | {"tp": 2, **SP}, SLOW),
    (HSDP | {"pp": 2, "micro_batches": 2}, SLOW),
    (HSDP | {"cp": 2}, ALL),
    ({"pp": 2, "tp": 2, "micro_batches": 2}, BUT_ONE),
    ({"pp": 2, "dp_replicate": 2, "cp": 2, "micro_batches": 2}, SLOW),
]


def check(world: int, cases: list[Case]) -> None:
    configs = {str(case): make_config(MODEL, case[0], **case[1]) for case in cases}
    errors = errors_of(MODEL, world, configs, seconds=600)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.slow
def test_four_ranks_follow_one_process() -> None:
    check(4, FOUR)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_ranks_follow_one_process() -> None:
    check(8, EIGHT)


def leg(rank: int, config: RunConfig, number: int, folder: str) -> dict[str, Tensor]:
    """Four steps from the checkpoint of the leg before, and a checkpoint; all parameters."""
    ranks = Ranks()
    engine = open_engine(config, ranks)
    cadence = engine.make_cadence()
    clock, carried = TokenClock(periods(config.model)), None
    data = engine.mesh.data
    first, last = rows_of_rank(ROWS, data.rank, data.size)
    store = CheckpointStore(Path(folder), ranks, keep_last=9)
    if number > 0:
        saved = store.newest()
        elsewhere = alone(MODEL).parameters.keys() - engine.parameters.keys()
        take_up(engine, cadence, store, saved, set(elsewhere))
        clock.load_state_dict(store.plain(saved)["clock"])
        rows = [store.tensors(saved, f"stream/{row}/") for row in range(first, last)]
        carried = engine.take_up_rows(rows, range(first, last))
    for step in range(4 * number, 4 * number + 4):
        batch = make_batch(step, first, last)
        loss, carried = engine.forward_backward(batch, carried)
        (_, valid), _ = cadence.agree([loss, engine.spoken_for(batch.labels).numel()])
        cadence.step(clock.advance(STEP), int(valid), lambda _: 0.005, clock.tokens)
    optimizer, plain = cadence.state_dict()
    tensors: dict[str, Tensor] = {
        **{f"model/{name}": one for name, one in engine.saved_parameters().items()},
        **{f"optimizer/{name}": one for name, one in optimizer.items()},
        **engine.carried_rows(carried, range(first, last)),
    }
    store.save(number, tensors, {**plain, "clock": clock.state_dict()})
    return {name: whole(p).clone() for name, p in engine.saved_parameters().items()}


Run = tuple[int, RunConfig]
SHARDED: Run = (4, make_config(MODEL, HSDP, **SLOW))
LEGS: dict[str, list[Run]] = {
    "the same": [SHARDED, SHARDED],
    "every step": [SHARDED, (4, make_config(MODEL, HSDP))],
    "one process": [SHARDED, (1, make_config(MODEL))],
    "from plain ranks": [(2, make_config(MODEL, **SLOW)), SHARDED],
    "more replicas": [
        (2, make_config(MODEL, {"tp": 2})),
        (4, make_config(MODEL, {"tp": 2}, **ALL)),
    ],
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "the same" else pytest.mark.slow) for name in LEGS],
)
def test_what_is_pending_passes_to_other_ranks_and_policies(name: str, tmp_path: Path) -> None:
    """Stopped after four steps: the level of three has one pending, that of five four."""
    one = (1, make_config(MODEL))
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for number, ((size, config), (alone_size, alone_config)) in enumerate(
        zip(LEGS[name], [one, one], strict=True)
    ):
        (expected,) = run(alone_size, leg, alone_config, number, str(tmp_path / "alone"))
        found = run(size, leg, config, number, str(tmp_path / "found"), seconds=300)[0]
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=2e-6, msg=key)


def test_shares_without_replicas_are_refused() -> None:
    """Their gradients are cut, and so added up, after every micro-batch."""
    for layout in ({"dp_replicate": 1, "dp_shard": 4}, {"tp": 2, "dp_replicate": 1, "dp_shard": 2}):
        with pytest.raises(ConfigError, match=r"at_update of level b, c needs replicas"):
            layout_of(make_config(MODEL, layout, **SLOW), 4)
