"""A run saved under any layout goes on under any other: the same losses, the same weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tools.processes import run
from train.callbacks.metrics import read_metrics
from train.checkpoint import CheckpointStore
from train.config import validate_config
from train.parallel.ranks import Ranks
from train.run import train
from train.run_files import CHECKPOINTS, METRICS

STEP = 256
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "shard2": (2, {"dp_replicate": 1, "dp_shard": 2}),
    "tp2": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2, "micro_batches": 4, "schedule": "interleaved"}),
    "cp2": (2, {"cp": 2, "micro_batches": 2}),
    "tp2shard2": (4, {"tp": 2, "dp_replicate": 1, "dp_shard": 2}),
    "pp2tp2": (4, {"pp": 2, "tp": 2, "micro_batches": 2}),
}
DEEPSPEED: dict[str, tuple[int, dict[str, Any], int]] = {
    "zero1": (2, {"micro_batches": 2}, 1),
    "zero2tp2": (4, {"tp": 2, "sequence_parallel": True}, 2),
    "zero3": (2, {}, 3),
    "zero1pp2": (2, {"pp": 2, "micro_batches": 2}, 1),
}


def part(rank: int, world: int, raw: dict[str, Any], resume: bool) -> int:
    """One call of the trainer as one of the ranks that the test has connected already."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "__enter__", lambda self: self)
        patch.setattr(Ranks, "__exit__", lambda self, *_: None)
        return train(validate_config(raw, "test"), resume)


def call(name: str, raw: dict[str, Any], stop: int | None, resume: bool) -> None:
    training = {**raw["training"], "stop_at_tokens": stop}
    raw = {**raw, "training": training}
    if name in DEEPSPEED:
        world, parallel, stage = DEEPSPEED[name]
        raw |= {"engine": "deepspeed", "deepspeed": {"zero_stage": stage}}
    else:
        world, parallel = LAYOUTS[name]
    raw["parallel"] = parallel
    assert run(world, part, world, raw, resume, seconds=250) == [0] * world


def outcome(run_dir: Path) -> tuple[dict[int, float], dict[str, Tensor]]:
    """The loss of every step, by its number, and all that the last checkpoint holds."""
    rows = read_metrics(run_dir / METRICS)
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
    store = CheckpointStore(run_dir / CHECKPOINTS, Ranks.alone(), 9)
    return losses, store.tensors(store.newest())


@pytest.fixture
def straight(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run of one process to the end; levels fire every 1, 3 and 5 steps of 12."""
    raw_config["model"]["num_layers"] = 4
    raw_config["model"]["tie_embeddings"] = True
    raw_config["data"]["order"] = "stream"
    raw_config["training"]["state_carry"] = "stream"
    raw_config["optimizer"]["eps"] = 1e-5
    raw_config["checkpoint"] = {"every_tokens": 10**9, "keep_last": 9}
    raw = {**raw_config, "run_dir": str(tmp_path / "straight")}
    call("one", raw, None, resume=False)
    return raw_config


def same(found: Path, expected: Path) -> None:
    (losses, tensors), (wanted_losses, wanted) = outcome(found), outcome(expected)
    assert losses.keys() == wanted_losses.keys()
    for step, loss in losses.items():
        assert loss == pytest.approx(wanted_losses[step], rel=1e-5)
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == wanted[name].shape, name
        error = (tensor.double() - wanted[name].double()).norm()
        scale = wanted[name].double().norm()
        assert error <= 2e-5 * scale + 1e-9, (name, float(error / scale))


@pytest.mark.timeout(600)
def test_a_chain_of_layouts(straight: dict[str, Any], tmp_path: Path) -> None:
    """Saved and taken up four times on the way, also inside periods."""
    raw = {**straight, "run_dir": str(tmp_path / "chain")}
    order = ["one", "tp2shard2", "pp2", "cp2", "dp2"]
    for number, name in enumerate(order):
        stop = None if number == len(order) - 1 else (number + 1) * STEP
        call(name, raw, stop, resume=number > 0)
    same(tmp_path / "chain", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("first", [*LAYOUTS, *DEEPSPEED])
def test_every_layout_takes_up_every_other(
    straight: dict[str, Any], tmp_path: Path, first: str
) -> None:
    """All 144 pairs: four steps under the first, the rest, with two firings, under the second."""
    raw = {**straight, "run_dir": str(tmp_path / first)}
    call(first, raw, 4 * STEP, resume=False)
    for second in (*LAYOUTS, *DEEPSPEED):
        folder = tmp_path / f"{first}-{second}"
        shutil.copytree(tmp_path / first, folder)
        call(second, {**raw, "run_dir": str(folder)}, None, resume=True)
        same(folder, tmp_path / "straight")
        shutil.rmtree(folder)
