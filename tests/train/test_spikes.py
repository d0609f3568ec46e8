"""Loss spikes: what is one, and runs that skip it or go back behind it, as if its batches had not
been there."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml

from tests.train.test_skipping import count_batches, leave_out, losses_and_skips
from tests.train.test_trainer import final_tensors, store_of
from tools.processes import run
from train.__main__ import main
from train.callbacks.metrics import Metrics, read_metrics
from train.checkpoint import store as store_module
from train.config import RunConfig, validate_config
from train.corpora import open_corpora, with_vocabulary
from train.engines import open_engine
from train.engines.deepspeed import DeepSpeedEngine
from train.engines.native import NativeEngine
from train.parallel.ranks import Ranks
from train.run import train
from train.signals import StopSignals
from train.spikes import LeftOut, SpikesConfig, SpikeWatch
from train.trainer import Trainer

SPIKES = {"window": 8, "threshold": 8.0, "skip_batches": 2}
CHANGES = {
    "model.mixer": "attention",
    "training.total_tokens": 20 * 256,
    "checkpoint.every_tokens": 4 * 256,
    "evaluation.every_tokens": 5 * 256,
}


def spike(patch: pytest.MonkeyPatch, batches: set[int], engine: Any = NativeEngine) -> None:
    """The loss of the given batches is three times what it is."""
    honest, last_read = engine.forward_backward, count_batches(patch)

    def spoiled(self: Any, batch: Any, carried: Any) -> Any:
        total, state = honest(self, batch, carried)
        return (3 * total if last_read() in batches else total), state

    patch.setattr(engine, "forward_backward", spoiled)


def test_what_is_a_spike() -> None:
    watch = SpikeWatch(SpikesConfig(action="skip", window=8, threshold=8.0))
    noisy = [3.0, 3.2, 2.9, 3.1, 3.05, 2.95, 3.3, 2.8]
    assert [watch.check(loss) for loss in [*noisy[:4], 50.0, *noisy[5:]]] == [None] * 8  # too early
    assert watch.check(4.0) is None
    assert watch.check(2.0) is None  # a fall is none
    found = watch.check(6.0)
    assert found is not None
    assert found.deviations == pytest.approx((6 - 3.025) / (1.4826 * 0.25))  # medians, by hand
    assert not found.undo
    assert 6.0 not in watch.losses
    other = SpikeWatch(watch.config)
    other.load_state_dict(watch.state_dict())
    assert other.check(6.0) == found
    flat = SpikeWatch(SpikesConfig(action="rollback", window=8))
    assert [flat.check(2.0) for _ in range(8)] == [None] * 8
    assert flat.check(2.05) is None  # losses that agree by chance make no spikes
    assert flat.check(2.2) is not None
    assert flat.check(9.0, domain=1) is None  # of which no loss is known
    again = SpikeWatch(flat.config)
    again.load_state_dict(flat.state_dict())
    assert [again.check(9.0, domain=1) for _ in range(7)] == [None] * 7
    assert again.check(20.0, domain=1) is not None
    off = SpikeWatch(SpikesConfig(window=8))
    assert [off.check(x) for x in [1.0] * 9 + [1e6]] == [None] * 10


def test_losses_of_zero_are_none_while_denormals_are_flushed_as_in_a_run() -> None:
    nothing = SpikeWatch(SpikesConfig(action="skip", window=8))
    found: list[Any] = []

    def watched() -> None:  # the setting is a thread's own
        torch.set_flush_denormal(True)
        found.extend(nothing.check(loss) for loss in [0.0] * 9 + [1.0])

    thread = Thread(target=watched)
    thread.start()
    thread.join()
    assert found[:-1] == [None] * 9
    assert found[-1] is not None


def test_rows_stay_left_out_in_batches_of_another_size() -> None:
    watch = SpikeWatch(SpikesConfig(action="rollback"))
    watch.leave_out((44, 48), 4)
    watch.load_state_dict({"losses": [], "left_out": [[80, 1]], "rollbacks": 1})  # as it once was
    resumed = SpikeWatch(watch.config)
    resumed.load_state_dict(watch.state_dict())

    def left_out(rows: int) -> list[int]:
        return [row for row in range(0, 96, rows) if resumed.leaves_out(row, rows)]

    assert left_out(4) == [44, 48, 80]
    assert left_out(2) == [44, 46, 48, 50, 80]
    assert left_out(8) == [40, 48, 80]
    assert left_out(12) == [36, 48, 72]


def test_a_rollback_is_counted_whatever_checkpoint_it_goes_back_to() -> None:
    watch = SpikeWatch(SpikesConfig(action="rollback"))
    before = watch.state_dict()
    for positions in ((40, 44), (44, 48)):
        watch.leave_out(positions, 4)
        watch.load_state_dict(before)
    assert watch.rollbacks == 2
    assert [watch.leaves_out(row, 4) for row in (40, 44, 52)] == [LeftOut(1), LeftOut(2), None]
    assert watch.leaves_out(40, 8) == LeftOut(2)


def same(one: Any, other: Any) -> None:
    first, second = final_tensors(one), final_tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def without(make_config: Any, tmp_path: Path, batches: set[int]) -> Any:
    config = make_config(**CHANGES, run_dir=str(tmp_path / "without"))
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, batches)
        assert train(config, resume=False) == 0
    return config


def test_a_skipped_spike_is_as_if_its_batch_had_not_been_there(make_config, tmp_path: Path) -> None:
    other = without(make_config, tmp_path, {11})
    config = make_config(run_dir=str(tmp_path / "run"), spikes={**SPIKES, "action": "skip"})
    with pytest.MonkeyPatch.context() as patch:
        spike(patch, {11})
        assert train(config, resume=False) == 0
    same(config, other)
    (row,) = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if r["kind"] == "skip"]
    assert row["position"] == 11 * config.batch_rows
    assert "robust deviations above the median" in row["why"]


def test_a_rollback_leaves_out_what_is_blamed_and_resumes_to_the_bit(
    make_config, tmp_path: Path
) -> None:
    """The spike at batch 12 is blamed on 11 and 12; checkpoints lie at 4, 8 and, undone, at 12."""
    other = without(make_config, tmp_path, {11, 12})
    action = {**SPIKES, "action": "rollback"}
    with pytest.MonkeyPatch.context() as patch:
        spike(patch, {12})
        straight = make_config(run_dir=str(tmp_path / "straight"), spikes=action)
        assert train(straight, resume=False) == 0
        kill = [{"kind": "raise", "step": step, "phase": "forward"} for step in (10, 13)]
        parts = make_config(run_dir=str(tmp_path / "parts"), faults=kill)
        for resume in (False, True):
            with pytest.raises(RuntimeError, match="injected"):
                train(parts, resume=resume)
        assert train(parts, resume=True) == 0
    same(straight, other)
    same(straight, parts)
    assert losses_and_skips(straight) == losses_and_skips(parts)
    rows = read_metrics(parts.run_dir / "metrics.jsonl")
    (back,) = [row for row in rows if row["kind"] == "rollback"]
    assert back["checkpoint"] == "tokens-000000000002048"
    assert back["from_tokens"] == 12 * 256
    rows_of_batch = parts.batch_rows
    assert back["left_out_positions"] == [11 * rows_of_batch, 12 * rows_of_batch]
    skipped = [row["position"] for row in rows if row["kind"] == "skip"]
    assert skipped == back["left_out_positions"]
    store = store_of(parts)
    plain = store.plain(store.newest())
    assert plain["clock"]["skipped_tokens"] == 2 * 256
    assert plain["spikes"]["left_out"] == [[p, p + rows_of_batch, 1] for p in skipped]


def train_with_a_spike(rank: int, config: RunConfig) -> int:
    engine = DeepSpeedEngine if config.engine == "deepspeed" else NativeEngine
    with pytest.MonkeyPatch.context() as patch:
        spike(patch, {12}, engine)
        return train(config, resume=False)


@pytest.mark.slow
def test_deepspeed_goes_back_like_our_own_engine(make_config, tmp_path: Path) -> None:
    """A batch that is left out leaves DeepSpeed no gradient that it could forget."""
    found, losses = [], []
    for name in ("native", "deepspeed"):
        changes = {**CHANGES, "run_dir": str(tmp_path / name), "engine": name}
        config = make_config(**changes, spikes={**SPIKES, "action": "rollback"})
        assert run(1, train_with_a_spike, config) == [0]
        rows = read_metrics(config.run_dir / "metrics.jsonl")
        found.append([(row["kind"], row["tokens"], row.get("position")) for row in rows])
        losses.append([row["loss"] for row in rows if row["kind"] == "step"])
    assert found[0] == found[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ("rollback", 8 * 256, None) in found[0]


def test_too_many_rollbacks_and_none_possible(
    make_config, raw_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action = {**SPIKES, "action": "rollback", "max_rollbacks": 1}
    config = make_config(**CHANGES, run_dir=str(tmp_path / "run"), spikes=action)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    with pytest.MonkeyPatch.context() as patch:
        spike(patch, {10, 14})
        assert main([str(path)]) == 1
    assert "the loss spiked again after 1 rollbacks" in capsys.readouterr().err
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["kind"] for row in rows].count("rollback") == 1
    late = make_config(**{"run_dir": str(tmp_path / "late"), "checkpoint.every_tokens": 10**6})
    with pytest.MonkeyPatch.context() as patch:
        spike(patch, {10})
        assert train(late, resume=False) == 0
    kinds = [row["kind"] for row in read_metrics(late.run_dir / "metrics.jsonl")]
    assert (kinds.count("rollback"), kinds.count("skip")) == (0, 1)


@contextmanager
def full_disk(calls: range) -> Iterator[None]:
    """This process can't write or rename anything in those calls of `Trainer.step`, from 1."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    honest, renamed, number = Trainer.step, store_module.rename, 0

    def step(self: Trainer) -> Any:
        nonlocal number
        number += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 if number in calls else soft, hard))
        return honest(self)

    def rename(old: Any, new: Any) -> None:
        if number in calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        renamed(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        patch.setattr(store_module, "rename", rename)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore:checkpoint tokens", "ignore:set aside")
def test_a_full_disk_does_not_keep_a_run_from_going_back(make_config, tmp_path: Path) -> None:
    """The spike is in call 13 of step; the save after call 19 fails, that after call 23 does not.
    Until then metrics.jsonl and the checkpoints on the disk are those of the past undone."""
    action = {**SPIKES, "action": "rollback"}
    with pytest.MonkeyPatch.context() as patch:
        spike(patch, {12})
        straight = make_config(**CHANGES, run_dir=str(tmp_path / "straight"), spikes=action)
        assert train(straight, resume=False) == 0
        config = make_config(run_dir=str(tmp_path / "full"))
        with full_disk(range(12, 20)):
            assert train(config, resume=False) == 0
    same(straight, config)
    assert losses_and_skips(straight) == losses_and_skips(config)
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == [
        "aside-tokens-000000000003072",
        "tokens-000000000004608",
        "tokens-000000000005632",
    ]


def fit(rank: int, raw: dict[str, Any], full: range = range(0)) -> list:
    config = validate_config(raw, "test")
    corpora = open_corpora(config)
    config = with_vocabulary(config, corpora)
    callbacks = [Metrics(config.run_dir)] if rank == 0 else []
    with pytest.MonkeyPatch.context() as patch, full_disk(full if rank == 0 else range(0)):
        if rank == 1:
            spike(patch, {12})
        engine = open_engine(config, Ranks())
        trainer = Trainer(config, corpora, StopSignals(), engine, callbacks)
        assert trainer.fit() is None
    sums = {name: float(p.detach().double().sum()) for name, p in engine.parameters.items()}
    trainer.loader.close()
    return [trainer.clock.state_dict(), trainer.spikes.state_dict(), sums]


def test_all_ranks_go_back_together(make_config, raw_config, tmp_path: Path) -> None:
    make_config(**CHANGES, spikes={**SPIKES, "threshold": 6.0, "action": "rollback"})
    one, two = run(2, fit, raw_config)
    assert one == two
    make_config(run_dir=str(tmp_path / "full"))
    assert run(2, fit, raw_config, range(12, 20)) == [one, two]
    assert one[0]["skipped_steps"] == 2
    assert one[1]["rollbacks"] == 1
