"""Layouts and models, and training a few steps of one under the other: what parity is checked on.

The tests and `tools.bench_parallel` go through the same table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_pipeline import IGNORE, Batch
from data_pipeline.loader import rows_of_rank
from tools.processes import run
from train.checkpoint import CheckpointStore
from train.clock import TokenClock
from train.config import RunConfig, validate_config
from train.engines import open_engine
from train.engines.parts import Engine
from train.optim.cadence import Cadence
from train.optim.levels import periods
from train.parallel.ranks import Ranks

ROWS, LENGTH, VOCABULARY = 8, 32, 48
STEP = ROWS * LENGTH
STEPS = 8

MODELS: dict[str, dict[str, Any]] = {
    "hope": {},
    "hope-attention": {"pattern": ["titans", "attention"], "attention": {"conv_width": 4}},
    "transformer": {"mixer": "attention"},
}


Case = tuple[int, dict[str, Any]]

SP: dict[str, Any] = {"sequence_parallel": True}
FULL: dict[str, Any] = {"activation_checkpointing": "full"}
LAYOUTS: list[Case] = [
    (2, {}),
    (2, {"micro_batches": 2}),
    (2, {"dp_replicate": 1, "dp_shard": 2}),
    (2, {"dp_replicate": 1, "dp_shard": 2, "micro_batches": 2, "cpu_offload": True}),
    (2, {"tp": 2}),
    (2, {"tp": 2, **SP}),
    (2, {"tp": 2, "micro_batches": 4, **FULL}),
    (2, {"tp": 2, "activation_checkpointing": "selective", **SP}),
    (2, {"pp": 2, "micro_batches": 2}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "gpipe"}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "interleaved"}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "zero-bubble"}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "zbv"}),
    (2, {"pp": 2, "micro_batches": 2, **FULL}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "zero-bubble", **FULL}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "zbv", "activation_checkpointing": "selective"}),
    (2, {"cp": 2}),
    (2, {"cp": 2, "micro_batches": 4}),
    (4, {}),
    (4, {"dp_replicate": 1, "dp_shard": 4}),
    (4, {"dp_replicate": 2, "dp_shard": 2, **FULL}),
    (4, {"tp": 4, **SP}),
    (4, {"tp": 2}),
    (4, {"tp": 2, "dp_replicate": 1, "dp_shard": 2, **SP}),
    (4, {"tp": 2, "pp": 2, "micro_batches": 2, **SP}),
    (4, {"tp": 2, "cp": 2, "micro_batches": 2}),
    (4, {"pp": 4, "micro_batches": 4}),
    (4, {"pp": 2, "micro_batches": 2}),
    (4, {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "micro_batches": 2}),
    (4, {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "micro_batches": 2, "schedule": "zero-bubble"}),
    (4, {"pp": 2, "cp": 2, "micro_batches": 2}),
    (4, {"pp": 2, "cp": 2, "micro_batches": 2, "schedule": "interleaved"}),
    (4, {"cp": 4, "micro_batches": 2}),
    (4, {"cp": 2}),
    (4, {"cp": 2, "dp_replicate": 1, "dp_shard": 2, "micro_batches": 2}),
    (8, {"pp": 2, "tp": 2, "dp_replicate": 1, "dp_shard": 2, "micro_batches": 2, **SP}),
    (8, {"pp": 2, "tp": 2, "cp": 2, "micro_batches": 2}),
    (8, {"tp": 2, "dp_replicate": 2, "dp_shard": 2, **SP}),
    (8, {"pp": 4, "tp": 2, "micro_batches": 4}),
    (8, {"dp_replicate": 2, "dp_shard": 2, "cp": 2}),
]
"""Ranks and the section `parallel`: every layout that is compared with one process."""

ZeroCase = tuple[int, int, dict[str, Any]]

DEEPSPEED_LAYOUTS: list[ZeroCase] = [
    *((2, stage, {}) for stage in (1, 2, 3)),
    (2, 1, {"micro_batches": 2}),
    (2, 2, {"micro_batches": 4}),
    (2, 3, {"micro_batches": 2}),
    (2, 1, {"micro_batches": 2, "activation_checkpointing": "selective"}),
    (2, 2, {**FULL}),
    (2, 3, {"micro_batches": 2, **FULL}),
    (2, 1, {"tp": 2, "micro_batches": 2}),
    (2, 2, {"tp": 2}),
    (2, 2, {"tp": 2, "micro_batches": 4, **SP}),
    (2, 3, {"tp": 2, **SP}),
    (2, 3, {"tp": 2, "activation_checkpointing": "selective", **SP}),
    (2, 1, {"pp": 2, "micro_batches": 2}),
    (2, 1, {"pp": 2, "micro_batches": 4}),
    (2, 1, {"pp": 2, "micro_batches": 4, **FULL}),
    *((4, stage, {}) for stage in (1, 2, 3)),
    (4, 2, {"micro_batches": 2}),
    (4, 3, {"micro_batches": 2, "activation_checkpointing": "selective"}),
    (4, 1, {"tp": 2, **SP}),
    (4, 2, {"tp": 2, "micro_batches": 2}),
    (4, 3, {"tp": 2}),
    (4, 1, {"tp": 4}),
    (4, 2, {"tp": 4, **SP}),
    (4, 1, {"pp": 2, "micro_batches": 2}),
    (4, 1, {"pp": 4, "micro_batches": 4}),
    (4, 1, {"pp": 2, "tp": 2, "micro_batches": 2}),
    (4, 1, {"pp": 2, "tp": 2, "micro_batches": 4, **SP}),
    (8, 3, {}),
    (8, 2, {"tp": 2, "micro_batches": 2, **SP}),
    (8, 3, {"tp": 4}),
    (8, 1, {"pp": 2, "tp": 2, "micro_batches": 2}),
    (8, 1, {"pp": 4, "tp": 2, "micro_batches": 4, **SP}),
]
"""Ranks, ZeRO's stage and the section `parallel`, under DeepSpeed. It has no cp, FSDP or schedule
of ours: what varies is the stage, tp, its pipeline and the micro-batches."""

TOLERANCE = 1e-5


@dataclass
class Trace:
    """What a run did: per step the loss and every norm; at the end every parameter, whole."""

    losses: list[float]
    norms: list[dict[str, float]]
    parameters: dict[str, Tensor]
    held_out: float


def make_config(model: str, parallel: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """A tiny model of four layers whose levels fire every 1, 3 and 5 steps."""
    levels = [
        {"name": "a", "hidden_size": 16},
        {"name": "b", "hidden_size": 8, "update_every_tokens": 3 * STEP},
        {"name": "c", "hidden_size": 8, "update_every_tokens": 5 * STEP},
    ]
    raw: dict[str, Any] = {
        "run_dir": "nowhere",
        "model": {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "num_layers": 4,
            "num_heads": 4,
            "titans": {
                "initial_eta": 0.1,
                "scan": {"memory_chunk": 4, "projection_chunk": 8},
            },
            "cms": {"levels": levels},
            **MODELS[model],
        },
        "data": {
            "train": [{"path": "nowhere"}],
            "validation": "nowhere",
            "seq_len": LENGTH,
            "order": "stream",
        },
        "training": {
            "total_tokens": 100 * STEP,
            "batch_tokens": STEP,
            "state_carry": "stream",
        },
        # eps above what rounding leaves of a gradient: Adam would turn its sign into a whole step.
        "optimizer": {"lr": 0.005, "clip_norm": 0.5, "eps": 1e-5},
        "parallel": parallel or {},
    }
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = raw
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return validate_config(raw, "test")


def make_batch(step: int, first: int, last: int) -> Batch:
    """Rows first to last of the step's batch; documents begin and padding lies here and there."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE
    starts = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    starts[:, ::8] = torch.rand(ROWS, LENGTH // 8, generator=generator) < 0.2
    rows = slice(first, last)
    return Batch(ids[rows, :-1], labels[rows], starts[rows])


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, on every rank; a collective call of its ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(
    rank: int,
    config: RunConfig | dict[str, Any],
    steps: int = STEPS,
    ranks: Ranks | None = None,
) -> Trace:
    """Train `steps` steps as one of `ranks`: by default those that the environment tells of."""
    if isinstance(config, dict):
        config = validate_config(config, "test")
    ranks = ranks or Ranks()
    engine = open_engine(config, ranks)
    cadence = engine.make_cadence()
    clock = TokenClock(periods(config.model))
    data = engine.mesh.data
    first, last = rows_of_rank(ROWS, data.rank, data.size)
    carried, losses, norms = None, [], []
    for step in range(steps):
        batch = make_batch(step, first, last)
        loss, carried = engine.forward_backward(batch, carried)
        counted = engine.spoken_for(batch.labels).numel()
        (total, valid), problem = cadence.agree([loss, counted])
        assert problem is None
        report = cadence.step(clock.advance(STEP), int(valid), lambda _: 0.005, clock.tokens)
        losses.append(total / valid)
        norms.append({**report.level_norms, "all": report.grad_norm})
        if step == steps // 2:  # training goes on as if nothing had been evaluated
            engine.held_out(make_batch(998, first, last))
    batch = make_batch(999, first, last)
    counts = [engine.held_out(batch), engine.spoken_for(batch.labels).numel()]
    total, valid = ranks.sum(counts)
    parameters = {name: whole(p).clone() for name, p in engine.saved_parameters().items()}
    return Trace(losses, norms, parameters, total / valid)


def take_up(
    engine: Engine, cadence: Cadence, store: CheckpointStore, folder: Any, elsewhere: set[str]
) -> None:
    """Parameters and optimizer state of a checkpoint, as the trainer takes them."""
    reader = store.reader(folder)
    engine.load_parameters(reader.all_stored("model/"), elsewhere)
    state = reader.all_stored("optimizer/")
    cadence.load_state_dict(
        {name.removeprefix("optimizer/"): tensor for name, tensor in state.items()},
        store.plain(folder),
        elsewhere,
    )


def relative(one: float, other: float) -> float:
    """|one - other| / |other|; infinite where one is NaN, which max would pass over."""
    error = abs(one - other) / max(abs(other), 1e-12)
    return math.inf if math.isnan(error) else error


def worst_error(found: list[Trace], expected: Trace) -> float:
    """The largest relative difference over losses, norms and parameters of every rank.

    A parameter's is that of its norm: |difference| / |expected|.
    """
    errors = []
    names: set[str] = set()
    for trace in found:
        errors += [relative(a, b) for a, b in zip(trace.losses, expected.losses, strict=True)]
        for mine, theirs in zip(trace.norms, expected.norms, strict=True):
            assert mine.keys() == theirs.keys()
            errors += [relative(mine[key], theirs[key]) for key in theirs]
        errors.append(relative(trace.held_out, expected.held_out))
        for name, tensor in trace.parameters.items():
            wanted = expected.parameters[name]
            assert tensor.shape == wanted.shape
            norm = float(wanted.norm())
            errors.append(relative(norm + float((tensor - wanted).norm()), norm))
        names |= trace.parameters.keys()
    assert names == expected.parameters.keys()
    return max(errors)


@cache
def alone(model: str) -> Trace:
    """What one process does; in this process, once."""
    return trained(0, make_config(model), ranks=Ranks.alone())


def several(rank: int, configs: list[RunConfig]) -> list[Trace]:
    """Every configuration in turn, as one of the ranks that the environment tells of."""
    return [trained(rank, one) for one in configs]


def table(engine: str, model: str, world: int) -> dict[str, RunConfig]:
    """The layouts of so many ranks for one of the engines, by what they are called."""
    if engine == "native":
        return {str(raw): make_config(model, raw) for size, raw in LAYOUTS if size == world}
    return {
        f"ZeRO {stage}, {raw}": deepspeed_config(model, stage, raw)
        for size, stage, raw in DEEPSPEED_LAYOUTS
        if size == world
    }


def deepspeed_config(
    model: str, stage: int, parallel: dict[str, Any] | None = None, **changes: Any
) -> RunConfig:
    """`make_config` for DeepSpeed."""
    changes = {"engine": "deepspeed", "deepspeed.zero_stage": stage, **changes}
    return make_config(model, parallel, **changes)


def errors_of(
    model: str, world: int, configs: dict[str, RunConfig], seconds: int
) -> dict[str, float]:
    """The worst relative error of each configuration on so many ranks against one process."""
    found = run(world, several, list(configs.values()), seconds=seconds)
    return {
        name: worst_error([traces[number] for traces in found], alone(model))
        for number, name in enumerate(configs)
    }
