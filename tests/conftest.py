"""A small real corpus (Python's own sources) and configurations that train on it in seconds."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipeline import train_tokenizer
from data_pipeline.tokenizing import tokenize
from train.callbacks import metrics
from train.config import RunConfig, validate_config

torch.set_num_threads(1)

SOURCES = (random, statistics, textwrap)
IMPORTED = ["train.__main__", "torch._dynamo", "torch.distributed.tensor", "deepspeed"]
"""What the processes that tests fork have from the start; deepspeed takes seconds."""

draw, metrics.plot_loss = metrics.plot_loss, lambda *_: None
"""The picture takes longer than the steps: tests of it ask for `pictures`. In forked processes
too, which begin with this module."""


@pytest.fixture(scope="session", autouse=True)
def forked_processes_begin_with_imports() -> None:
    """Whatever the modules that are tested have asked for when they were collected."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*IMPORTED, __name__])


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss curves are drawn."""
    monkeypatch.setattr(metrics, "plot_loss", draw)


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """One that stays is in the way of any that a later test makes in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail(
            "left a torch.distributed process group behind: run it in `tools.processes.run`"
        )


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of token shards: `train` (two documents) and `validation` (one)."""
    base = tmp_path_factory.mktemp("corpora")
    texts = [Path(module.__file__ or "").read_text() for module in SOURCES]
    tokenizer = train_tokenizer(texts, 400)
    folders = {}
    for split, part in (("train", texts[:2]), ("validation", texts[2:])):
        folder = base / "text" / split
        folder.mkdir(parents=True)
        for number, text in enumerate(part):
            (folder / f"{number}.txt").write_text(text)
        folders[split] = base / split
        tokenize([str(folder)], tokenizer, folders[split])
    return folders


@pytest.fixture
def raw_config(corpora: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A tiny Hope with three levels that fire every 1, 3 and 5 steps, as plain data."""
    return tiny_config(corpora, tmp_path / "run")


def tiny_config(corpora: dict[str, Path], run_dir: Path) -> dict[str, Any]:
    """See `raw_config`."""
    return {
        "run_dir": str(run_dir),
        "num_threads": 1,
        "model": {
            "dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "tie_embeddings": False,
            "titans": {"scan": {"memory_chunk": 8, "projection_chunk": 16}},
            "cms": {
                "levels": [
                    {"name": "a", "hidden_size": 8, "update_every_tokens": "step"},
                    {"name": "b", "hidden_size": 8, "update_every_tokens": 3 * 256},
                    {"name": "c", "hidden_size": 8, "update_every_tokens": 5 * 256},
                ]
            },
        },
        "data": {
            "train": [{"path": str(corpora["train"])}],
            "validation": str(corpora["validation"]),
            "seq_len": 64,
        },
        "training": {"total_tokens": 12 * 256, "batch_tokens": 256},
        "optimizer": {"lr": 0.01, "schedule": {"warmup_tokens": 512}},
        "evaluation": {"every_tokens": 1024, "max_tokens": 512, "batch_rows": 4},
        "checkpoint": {"every_tokens": 1024},
        "mlflow": {"enabled": False},
    }


@pytest.fixture
def make_config(raw_config: dict[str, Any]):
    """make_config(**{"training.total_tokens": 512}): the tiny configuration with changes."""

    def make(**changes: Any) -> RunConfig:
        for key, value in changes.items():
            *parents, last = key.split(".")
            node = raw_config
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        return validate_config(raw_config, "test")

    return make
