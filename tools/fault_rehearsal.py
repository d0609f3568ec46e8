"""A tiny run, disturbed and undisturbed, and whether the two end with the same bits."""

from __future__ import annotations

import inspect
import shutil
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline import train_tokenizer
from data_pipeline.tokenizing import tokenize
from tools.fault_processes import Attempt, attempt
from train.callbacks.faults import FIRED, read_fired
from train.callbacks.metrics import read_metrics
from train.checkpoint import CheckpointStore
from train.parallel.pulse import FIRST_RANK_PHASES
from train.parallel.ranks import Ranks
from train.run_files import CHECKPOINTS, METRICS

STEPS = 24
STEP_TOKENS = 4 * 32
EVERY_STEPS = 3  # evaluations and checkpoints
WATCHDOG_S = 4.0

Fault = dict[str, Any]


@dataclass
class Outcome:
    """A run that was started again until it was done.

    fired: what happened, as faults.jsonl tells; wall_s: from the first start to the last end,
    with trained_s of it in steps that count.
    """

    run_dir: Path
    attempts: list[Attempt]
    fired: list[dict[str, Any]]
    finished: bool
    wall_s: float

    @property
    def trained_s(self) -> float:
        """Seconds in steps that are part of the result."""
        store = _store(self.run_dir)
        return float(store.plain(store.newest())["trained_seconds"])

    @property
    def step_s(self) -> float:
        """The median time of a step."""
        rows = read_metrics(self.run_dir / METRICS)
        return statistics.median(
            STEP_TOKENS / row["tokens_per_second"] for row in rows if row["kind"] == "step"
        )


def make_corpora(folder: Path) -> Path:
    """Token shards of two of Python's own modules, `train` and `validation`, in `folder`."""
    if (folder / "validation").exists():
        return folder
    texts = {}
    for name, module in (("train", statistics), ("validation", textwrap)):
        texts[name] = inspect.getsource(module)
    texts["validation"] = texts["validation"][:4000]
    tokenizer = train_tokenizer(list(texts.values()), 400)
    for name, text in texts.items():
        source = folder / "text" / name
        source.mkdir(parents=True, exist_ok=True)
        (source / "0.txt").write_text(text)
        tokenize([str(source)], tokenizer, folder / name)
    return folder


def configuration(
    corpora: Path, run_dir: Path, seed: int, steps: int = STEPS, faults: Sequence[Fault] = ()
) -> dict[str, Any]:
    """A Hope of one layer and two slow levels that trains `steps` steps in a second or so."""
    every = EVERY_STEPS * STEP_TOKENS
    return {
        "run_dir": str(run_dir),
        "seed": seed,
        "num_threads": 1,
        "model": {
            "dim": 16,
            "num_layers": 1,
            "num_heads": 2,
            "titans": {"scan": {"memory_chunk": 16, "projection_chunk": 16, "eta_max": 0.03}},
            "cms": {
                "levels": [
                    {"name": "a", "hidden_size": 8, "update_every_tokens": "step"},
                    {"name": "b", "hidden_size": 8, "update_every_tokens": 2 * STEP_TOKENS},
                    {"name": "c", "hidden_size": 8, "update_every_tokens": 7 * STEP_TOKENS},
                ]
            },
        },
        "data": {
            "train": [{"path": str(corpora / "train")}],
            "validation": str(corpora / "validation"),
            "seq_len": 32,
            "order": "stream",
        },
        "training": {
            "total_tokens": steps * STEP_TOKENS,
            "batch_tokens": STEP_TOKENS,
            "state_carry": "stream",
        },
        "optimizer": {"lr": 0.001, "schedule": {"warmup_tokens": 4 * STEP_TOKENS}},
        "evaluation": {"every_tokens": every, "max_tokens": 256, "batch_rows": 4},
        "checkpoint": {"every_tokens": every, "asynchronous": not _needs_the_last(faults)},
        "mlflow": {"enabled": False},
        "watchdog": {"timeout_s": WATCHDOG_S if _hangs(faults) else 60.0},
        "faults": list(faults),
    }


def rehearse(config: dict[str, Any], ranks: int, limit_s: float = 600.0) -> Outcome:
    """Run to the end, starting again with --resume-or-start after every failure.

    Raises RuntimeError when a run without faults does not come to its end.

    Shards that a fault damaged are put back first, as their owner would. Gives up after three
    starts more than there are faults.
    """
    run_dir, data = Path(config["run_dir"]), Path(config["data"]["train"][0]["path"])
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = run_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    pristine = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    grace_s = 2.0 if _hangs(config["faults"]) else 5.0
    attempts: list[Attempt] = []
    started = time.time()
    while len(attempts) < len(config["faults"]) + 3:
        arguments = [str(file), "--resume-or-start"]
        attempts.append(attempt(arguments, ranks, log, grace_s, limit_s))
        if attempts[-1].succeeded:
            break
        for path, content in pristine.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
    wall_s = time.time() - started
    fired = read_fired(run_dir / FIRED)
    if not config["faults"] and not attempts[-1].succeeded:
        raise RuntimeError(f"the undisturbed run failed, see {log}")
    return Outcome(run_dir, attempts, fired, attempts[-1].succeeded, wall_s)


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs disagree in, bit for bit: tensors of the last checkpoint (parameters,
    optimizer states, accumulators, carried memories) and everything measured."""
    stores = [_store(run) for run in (one, other)]
    first, second = (store.tensors(store.newest()) for store in stores)
    found = [f"only one has {name}" for name in sorted(first.keys() ^ second.keys())]
    found += [
        name
        for name in sorted(first.keys() & second.keys())
        if not torch.equal(first[name], second[name])
    ]
    plain = [store.plain(store.newest()) for store in stores]
    for key in ("clock", "cadence", "loader", "evaluation", "spikes"):
        if plain[0][key] != plain[1][key]:
            found.append(key)
    if _measured(one) != _measured(other):
        found.append("losses in metrics.jsonl")
    return found


def _needs_the_last(faults: Sequence[Fault]) -> bool:
    """Whether a fault can only come where training itself writes, or hits a checkpoint that has to
    be the last of several."""
    return any(
        fault.get("phase") in FIRST_RANK_PHASES or fault["kind"].endswith("checkpoint")
        for fault in faults
    )


def _hangs(faults: Sequence[Fault]) -> bool:
    return any(fault["kind"] == "stop" for fault in faults)


def _measured(run_dir: Path) -> list[tuple[Any, ...]]:
    keys = ("kind", "tokens", "loss", "grad_norm", "position", "why")
    return [tuple(row.get(key) for key in keys) for row in read_metrics(run_dir / METRICS)]


def _store(run_dir: Path) -> CheckpointStore:
    return CheckpointStore(run_dir / CHECKPOINTS, Ranks.alone(), 2)
