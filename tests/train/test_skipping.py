"""Steps with an infinite or NaN loss, gradient or state: skipped, counted, and without effect."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline import IGNORE, Loader
from tests.train.test_trainer import STREAM, final_tensors, store_of
from tools.processes import run
from train.__main__ import main
from train.callbacks.metrics import read_metrics
from train.config import RunConfig, validate_config
from train.corpora import open_corpora, with_vocabulary
from train.engines import open_engine
from train.engines.native import NativeEngine
from train.parallel.placement import local
from train.parallel.ranks import Ranks
from train.run import train
from train.signals import StopSignals
from train.trainer import Trainer
from train.zero.cadence import Published

POISONS = ("gradient", "loss")


def count_batches(patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tells the number, from 0, of the batch that a training loader delivered last."""
    honest, last = Loader.__next__, -1

    def counted(self: Loader) -> Any:
        nonlocal last
        batch = honest(self)
        last = self.position // self.batch_size - 1
        return batch

    patch.setattr(Loader, "__next__", counted)
    return lambda: last


def poison(patch: pytest.MonkeyPatch, batches: set[int], what: str, rank: int = 0) -> None:
    """Spoil what comes of the given batches (counted from 0 by the loader) on one rank."""
    honest, last_read = NativeEngine.forward_backward, count_batches(patch)

    def spoiled(self: NativeEngine, batch: Any, carried: Any) -> Any:
        total, state = honest(self, batch, carried)
        if last_read() in batches and self.mesh.world.rank == rank:
            if what == "gradient":
                broken = [p for n, p in self.parameters.items() if "cms.levels.2." in n]
                broken[0].grad.view(-1)[0] = float("inf")
            elif what == "state":
                state["layers.0.memory.w1"].view(-1)[0] = float("nan")
            else:
                total = float("nan")
        return total, state

    patch.setattr(NativeEngine, "forward_backward", spoiled)


def leave_out(patch: pytest.MonkeyPatch, batches: set[int]) -> None:
    """A loader that never delivers the given batches."""
    honest = Loader.__next__

    def shorter(self: Loader) -> Any:
        batch = honest(self)
        while self.position // self.batch_size - 1 in batches:
            batch = honest(self)
        return batch

    patch.setattr(Loader, "__next__", shorter)


@pytest.mark.parametrize("what", POISONS)
def test_a_skipped_step_is_as_if_its_batch_had_not_been_there(
    make_config, tmp_path: Path, what: str
) -> None:
    skipping, without = make_config(), make_config(run_dir=str(tmp_path / "without"))
    batches = {0, 4, 6, 7}  # the first, and some in the middle of periods
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, batches, what)
        assert train(skipping, resume=False) == 0
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, batches)
        assert train(without, resume=False) == 0
    first, second = final_tensors(skipping), final_tensors(without)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    steps = [[r for r in losses_and_skips(c) if r[0] == "step"] for c in (skipping, without)]
    assert steps[0] == steps[1]
    skips = [r for r in read_metrics(skipping.run_dir / "metrics.jsonl") if r["kind"] == "skip"]
    assert [row["tokens"] for row in skips] == [0, 3 * 256, 4 * 256, 4 * 256]
    assert [row["skipped_tokens"] for row in skips] == [256, 512, 768, 1024]
    assert skips[0]["ranks"] == [0]
    assert skips[0]["levels"] == (["c"] if what == "gradient" else [])
    store = store_of(skipping)
    clock = store.plain(store.newest())["clock"]
    assert (clock["tokens"], clock["skipped_tokens"], clock["skipped_steps"]) == (3072, 1024, 4)


def test_a_state_that_is_not_finite_is_not_carried_on(make_config) -> None:
    config = make_config(**STREAM)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {3}, "state")
        assert train(config, resume=False) == 0
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["kind"] for row in rows].count("skip") == 1
    assert all(math.isfinite(row["loss"]) for row in rows if row["kind"] != "skip")
    assert all(tensor.isfinite().all() for tensor in final_tensors(config).values())


def test_a_run_stopped_among_skipped_steps_resumes_to_the_bit(make_config, tmp_path: Path) -> None:
    straight = make_config()
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {5, 6}, "gradient")
        train(straight, resume=False)
        for number, stop in enumerate((5 * 256, 6 * 256, None)):
            part = make_config(
                **{"run_dir": str(tmp_path / "parts"), "training.stop_at_tokens": stop}
            )
            train(part, resume=number > 0)
    first, second = final_tensors(straight), final_tensors(part)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses_and_skips(straight) == losses_and_skips(part)


def losses_and_skips(config: Any) -> list[tuple]:
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    return [
        (row["kind"], row["tokens"], row.get("loss"), row.get("skipped_tokens")) for row in rows
    ]


def test_too_many_in_a_row_stop_with_a_checkpoint(
    make_config, raw_config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = make_config(**{"training.max_skipped_in_a_row": 2})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {1, 2, 4, 5, 6}, "gradient")  # two in a row pass, three do not
        assert main([str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 steps in a row were skipped after 512 tokens" in error
    assert "gradient of level c is not finite on rank 0" in error
    store = store_of(config)
    plain = store.plain(store.newest())
    assert plain["clock"]["tokens"] == 2 * 256
    assert plain["clock"]["skipped_tokens"] == 5 * 256
    assert plain["loader"]["position"] == 7 * config.batch_rows  # past what can't be trained on
    assert main([str(path), "--resume"]) == 0  # cured: the rest is trained on
    with pytest.MonkeyPatch.context() as patch:
        without = make_config(run_dir=str(tmp_path / "without"))
        leave_out(patch, {1, 2, 4, 5, 6})
        train(without, resume=False)
    first, second = final_tensors(config), final_tensors(without)
    assert all(torch.equal(first[name], second[name]) for name in first)


def enlarge(patch: pytest.MonkeyPatch, batches: set[int], size: float = 2e38) -> None:
    """The gradients of level c over these batches are finite, and two together are not."""
    honest, last_read = NativeEngine.forward_backward, count_batches(patch)

    def huge(self: NativeEngine, batch: Any, carried: Any) -> Any:
        result = honest(self, batch, carried)
        if last_read() in batches:
            for name, parameter in self.parameters.items():
                if "cms.levels.2." in name and parameter.grad is not None:
                    parameter.grad.fill_(size)
        return result

    patch.setattr(NativeEngine, "forward_backward", huge)


def test_a_sum_that_overflows_skips_its_step(make_config, tmp_path: Path) -> None:
    """Level c accumulates over batches 5 to 11 but the skipped ones; 10 would have fired it."""
    changes = {**STREAM, "spikes.action": "skip"}
    skipping = make_config(**changes)
    with pytest.MonkeyPatch.context() as patch:
        enlarge(patch, {5, 6, 8, 11})
        assert train(skipping, resume=False) == 0
    without = make_config(run_dir=str(tmp_path / "without"))
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, {6, 8, 11})
        enlarge(patch, {5})
        assert train(without, resume=False) == 0
    first, second = final_tensors(skipping), final_tensors(without)
    assert first.keys() == second.keys()
    for name in first:
        if not name.startswith("stream/"):
            assert torch.equal(first[name], second[name]), name
    steps = [[r for r in losses_and_skips(c) if r[0] == "step"] for c in (skipping, without)]
    assert steps[0] == steps[1]
    skips = [r for r in read_metrics(skipping.run_dir / "metrics.jsonl") if r["kind"] == "skip"]
    assert [row["position"] // skipping.batch_rows for row in skips] == [6, 8, 11]
    assert {row["why"] for row in skips} == {"a sum of finite gradients overflowed, of level c"}
    assert skips[0]["levels"] == ["c"]
    plains = [store_of(config).plain(store_of(config).newest()) for config in (skipping, without)]
    assert plains[0]["spikes"] == plains[1]["spikes"]
    assert plains[0]["cadence"] == plains[1]["cadence"]


def test_sums_that_overflow_on_and_on_are_one_line_and_a_checkpoint(
    make_config, raw_config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = make_config(**{"training.max_skipped_in_a_row": 4})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    with pytest.MonkeyPatch.context() as patch:
        enlarge(patch, set(range(1, 12)))
        assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "after 512 tokens: a sum of finite gradients overflowed" in error.splitlines()[-1]
    assert store_of(config).plain(store_of(config).newest())["clock"]["tokens"] == 512


def train_with_huge_gradients(
    _: int, config: RunConfig, batches: set[int], absent: set[int]
) -> int:
    """Train a run whose gradients are huge, in these batches, where DeepSpeed has reduced them."""
    honest = Published.gradients
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, absent)
        last_read = count_batches(patch)

        def huge(self: Published) -> list[torch.Tensor]:
            found = honest(self)
            for gradient, names in zip(found, self.partitions.names, strict=True):
                if last_read() in batches and any("cms.levels.2." in name for name in names):
                    gradient.fill_(2e38)
            return found

        patch.setattr(Published, "gradients", huge)
        return train(config, resume=False)


@pytest.mark.slow
def test_deepspeed_skips_a_sum_that_overflows(make_config, tmp_path: Path) -> None:
    """Where its gradients are reduced, and the accumulators lie over ZeRO's partitions."""
    configs = [make_config(engine="deepspeed"), make_config(run_dir=str(tmp_path / "without"))]
    for config, batches, absent in zip(configs, ({5, 6, 8}, {5}), (set(), {6, 8}), strict=True):
        assert run(1, train_with_huge_gradients, config, batches, absent) == [0]
    first, second = map(final_tensors, configs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    skips = [r for r in read_metrics(configs[0].run_dir / "metrics.jsonl") if r["kind"] == "skip"]
    assert [(row["levels"], row["position"] // configs[0].batch_rows) for row in skips] == [
        (["c"], 6),
        (["c"], 8),
    ]


def blank(patch: pytest.MonkeyPatch, batches: set[int]) -> None:
    """Batches of which no token counts, as damaged frames leave them."""
    last_read = count_batches(patch)
    counting = Loader.__next__

    def emptied(self: Loader) -> Any:
        batch = counting(self)
        if last_read() in batches:
            batch.labels.fill_(IGNORE)
        return batch

    patch.setattr(Loader, "__next__", emptied)


def test_a_batch_without_a_token_that_counts_is_skipped(
    make_config, raw_config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = make_config(**{"training.max_skipped_in_a_row": 2})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    with pytest.MonkeyPatch.context() as patch:
        blank(patch, {2, 4, 5, 6})
        assert main([str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 steps in a row were skipped after 768 tokens: no token of its batch" in error
    assert "damaged shards" in error
    assert main([str(path), "--resume"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        without = make_config(run_dir=str(tmp_path / "without"))
        leave_out(patch, {2, 4, 5, 6})
        train(without, resume=False)
    first, second = final_tensors(config), final_tensors(without)
    assert all(torch.equal(first[name], second[name]) for name in first)


def train_with_a_poisoned_rank(rank: int, raw: dict[str, Any], batches: set[int]) -> list:
    """What one of the ranks sees: losses, skips, and the sum of every parameter."""
    config = validate_config(raw, "test")
    corpora = open_corpora(config)
    config = with_vocabulary(config, corpora)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, batches, "gradient", rank=1)
        engine = open_engine(config, Ranks())
        trainer = Trainer(config, corpora, StopSignals(), engine)
        assert trainer.fit() is None
    sums = {name: float(p.detach().double().sum()) for name, p in engine.parameters.items()}
    trainer.loader.close()
    return [trainer.clock.state_dict(), sums]


def test_all_ranks_skip_what_is_not_finite_on_one(raw_config) -> None:
    batches = {2, 3, 8}
    results = run(2, train_with_a_poisoned_rank, raw_config, batches)
    assert results[0] == results[1]
    clock, _ = results[0]
    assert (clock["tokens"], clock["skipped_tokens"]) == (3072, 3 * 256)
    assert clock["firings"] == {"fast": 12, "a": 12, "b": 4, "c": 2}


def train_over_an_overflow(rank: int, raw: dict[str, Any], batches: set[int]) -> list:
    """As `train_with_a_poisoned_rank`, of gradients that are too large together."""
    config = validate_config(raw, "test")
    corpora = open_corpora(config)
    config = with_vocabulary(config, corpora)
    with pytest.MonkeyPatch.context() as patch:
        enlarge(patch, batches)
        engine = open_engine(config, Ranks())
        trainer = Trainer(config, corpora, StopSignals(), engine)
        assert trainer.fit() is None
    sums = {name: float(local(p.detach()).double().sum()) for name, p in engine.parameters.items()}
    trainer.loader.close()
    return [trainer.clock.state_dict(), sums]


@pytest.mark.parametrize(
    ("parallel", "reduce", "batches"),
    [
        ({}, "every_step", {2, 3, 8}),
        ({}, "at_update", {2, 3, 8}),
        ({"dp_replicate": 1, "dp_shard": 2}, "every_step", {2, 3, 8}),
    ],
    ids=["every step", "at update", "FSDP2"],
)
def test_all_ranks_skip_a_sum_that_overflows(
    make_config, raw_config, parallel: dict[str, int], reduce: str, batches: set[int]
) -> None:
    """Over two ranks that hold whole parameters one such gradient is too large already."""
    make_config(**{"parallel": parallel, "optimizer.levels": {"c": {"reduce": reduce}}})
    one, two = run(2, train_over_an_overflow, raw_config, batches)
    assert one[0] == two[0]
    if not parallel:
        assert one == two
    skipped = 3 if not parallel else 1  # of the first period the second
    assert (one[0]["tokens"], one[0]["skipped_steps"]) == (3072, skipped)
    assert all(map(math.isfinite, one[1].values()))
    assert one[0]["firings"]["c"] == 2
