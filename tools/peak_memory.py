"""The peak memory of real training steps in this process: the resident set's high-water mark.

Linux counts the most that was ever resident (VmHWM) and lets a process reset it. What was resident
before the model was built is subtracted; large tensors are given back to the system as soon as they
are freed (mallopt), so that what is resident is what is alive. Memory that was allocated and never
touched is not counted, and neither should it be.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from data_pipeline import Batch
from tools.processes import run
from train.clock import TokenClock
from train.config import RunConfig, validate_config
from train.dry_run.build import dry_run
from train.engines import open_engine
from train.optim.levels import periods
from train.parallel.ranks import Ranks

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names, malloc.h
_SMALL = 128 * 1024  # smaller tensors stay in malloc's arenas


def peak_of_training(rank: int, raw: dict[str, Any], warm_up: dict[str, Any], steps: int) -> int:
    """Bytes at the peak of `steps` training steps of `raw`, as one of the ranks that the
    environment tells of.

    warm_up: a small configuration of the same layout, trained first, so that libraries and
    connections are there before memory is counted.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_MMAP_THRESHOLD, _SMALL)
    libc.mallopt(_TRIM_THRESHOLD, _SMALL)
    _train(validate_config(warm_up, "warm-up"), steps)
    gc.collect()
    libc.malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _train(validate_config(raw, "measured"), steps)
    return _resident("VmHWM") - before


def _train(config: RunConfig, steps: int) -> None:
    engine = open_engine(config, Ranks())
    cadence = engine.make_cadence()
    clock, carried = TokenClock(periods(config.model)), None
    rows, length = config.batch_rows // engine.mesh.data.size, config.data.seq_len
    assert config.model.vocab_size is not None
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, config.model.vocab_size, (rows, length + 1), generator=generator)
        starts = torch.zeros(rows, length, dtype=torch.bool)
        batch = Batch(ids[:, :-1], ids[:, 1:].contiguous(), starts)
        loss, carried = engine.forward_backward(batch, carried)
        cadence.agree([loss])
        tokens = config.training.batch_tokens
        cadence.step(clock.advance(tokens), tokens, lambda _: 1e-3, clock.tokens)


def _resident(what: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (at most, since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}")


def configuration(
    parallel: dict[str, Any],
    small: bool = False,
    zero_stage: int = 0,
    state_carry: str = "stream",
    **model: Any,
) -> dict[str, Any]:
    """A run whose memory is some 100 to 300 MiB, far above what a process wavers by; small: the
    same layout with a model of next to nothing. zero_stage: DeepSpeed's; 0: our own engine.
    state_carry: of the training. model: keys that differ."""
    if small:
        model = {key: value for key, value in model.items() if key not in ("dim", "vocab_size")}
    seq_len, rows, hidden = (64, 4, 16) if small else (256, 4, 256)
    levels = [
        {"name": "fast_level", "hidden_size": 2 * hidden},
        {"name": "slow", "hidden_size": hidden, "update_every_tokens": 2 * rows * seq_len},
    ]
    engine: dict[str, Any] = {}
    if zero_stage > 0:
        engine = {"engine": "deepspeed", "deepspeed": {"zero_stage": zero_stage}}
    return {
        **engine,
        "run_dir": "nowhere",
        "num_threads": 1,
        "model": {
            "vocab_size": 64 if small else 2048,
            "dim": 32 if small else 256,
            "num_layers": 2 * parallel.get("pp", 1),
            "num_heads": 4,
            "titans": {
                "initial_eta": 0.0078,
                "scan": {"memory_chunk": 32, "projection_chunk": 32, "eta_max": 0.0156},
            },
            "cms": {"levels": levels},
            **model,
        },
        "data": {
            "train": [{"path": "nowhere"}],
            "validation": "nowhere",
            "seq_len": seq_len,
            "order": "stream",
        },
        "training": {
            "total_tokens": 100 * rows * seq_len,
            "batch_tokens": rows * seq_len,
            "state_carry": state_carry,
        },
        "parallel": parallel,
    }


def prediction_errors(
    world: int, parallel: dict[str, Any], zero_stage: int = 0, **model: Any
) -> list[float]:
    """On each rank: predicted over measured peak memory, less one."""
    big, small = (configuration(parallel, one, zero_stage, **model) for one in (False, True))
    measured = run(world, peak_of_training, big, small, 2, seconds=600)
    config = validate_config(big, "measured")
    errors = []
    for rank, found in enumerate(measured):
        errors.append(dry_run(config, world, rank).memory.peak / found - 1)
    return errors


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {}),
    (1, {"activation_checkpointing": "selective"}, {}),
    (1, {"activation_checkpointing": "full"}, {}),
    (1, {"micro_batches": 4}, {}),
    (1, {"micro_batches": 4}, {"state_carry": "none"}),
    (1, {}, {"mixer": "attention"}),
    (2, {}, {}),
    (2, {"tp": 2}, {}),
    (2, {"tp": 2, "sequence_parallel": True}, {}),
    (2, {"tp": 2, "micro_batches": 2, "activation_checkpointing": "full"}, {"mixer": "attention"}),
    (2, {"pp": 2, "micro_batches": 4}, {}),
    (2, {"pp": 2, "micro_batches": 4}, {"mixer": "attention", "vocab_size": 8192}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "interleaved"}, {}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "zero-bubble"}, {}),
    (2, {"pp": 2, "micro_batches": 4, "schedule": "zbv"}, {}),
    (2, {"dp_replicate": 1, "dp_shard": 2}, {}),
    (2, {"dp_replicate": 1, "dp_shard": 2, "micro_batches": 2, "precision": "bf16"}, {}),
    (2, {"dp_replicate": 1, "dp_shard": 2, "activation_checkpointing": "full"}, {}),
    (2, {"cp": 2}, {}),
    (2, {"cp": 2, "micro_batches": 2}, {"pattern": ["titans", "attention"]}),
    (4, {"dp_replicate": 2, "dp_shard": 2}, {}),
    (4, {"tp": 2, "dp_replicate": 1, "dp_shard": 2, "sequence_parallel": True}, {}),
    (4, {"tp": 2, "cp": 2}, {}),
    (4, {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "micro_batches": 2}, {}),
]
"""Ranks, the section `parallel`, and what differs in the model or is carried: every case that is
measured."""

BF16: dict[str, Any] = {"precision": "bf16"}
WIDE: dict[str, Any] = {"mixer": "attention", "dim": 1024, "vocab_size": 512}
"""A model whose parameters are more than its activations, when those are recomputed."""
FULL: dict[str, Any] = {"micro_batches": 2, "activation_checkpointing": "full"}
PIPELINE: dict[str, Any] = {"pp": 2, "micro_batches": 2}

DEEPSPEED_CASES: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    *((1, stage, parallel, {}) for stage in (1, 2, 3) for parallel in ({}, BF16)),
    *((2, stage, parallel, {}) for stage in (1, 2, 3) for parallel in ({}, BF16)),
    *((2, stage, FULL | one, WIDE) for stage in (1, 2, 3) for one in ({}, BF16)),
    (2, 2, {"activation_checkpointing": "full"}, WIDE),
    (2, 2, {"micro_batches": 2}, {}),
    (2, 3, {"micro_batches": 2}, {}),
    (2, 1, {"tp": 2, **BF16}, {}),
    (2, 2, {"tp": 2, "sequence_parallel": True}, {}),
    (2, 3, {"tp": 2}, {}),
    (2, 1, PIPELINE, {}),
    (2, 1, {"pp": 2, "micro_batches": 4, **BF16}, {}),
    *((4, stage, parallel, {}) for stage in (1, 2, 3) for parallel in ({}, BF16)),
    (4, 3, {"activation_checkpointing": "full"}, WIDE),
    (4, 2, {"tp": 2}, {}),
    (4, 3, {"tp": 2, "sequence_parallel": True}, {}),
    (4, 1, {**PIPELINE, "tp": 2}, {}),
    (4, 1, PIPELINE, {}),
]
"""Ranks, ZeRO's stage, the section `parallel` and what differs in the model, under DeepSpeed."""
