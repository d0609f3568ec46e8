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
from train.clock import TokenClock
from train.config import RunConfig, validate_config
from train.engines import open_engine
from train.optim.build import build_cadence
from train.optim.levels import periods
from train.parallel.data_parallel import DataParallel

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names, malloc.h
_SMALL = 512 * 1024


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
    engine = open_engine(config, DataParallel())
    cadence = build_cadence(engine.parameters, config.model, config.optimizer, engine.mesh)
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
