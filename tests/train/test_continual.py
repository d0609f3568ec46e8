"""mode=continual: domains one after the other, each once, and everything carried across."""

from __future__ import annotations

import os
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline import Corpus, Loader
from tests.train.test_trainer import ENVIRONMENT, assert_same_run, command, store_of
from train.__main__ import main
from train.callbacks.metrics import read_metrics
from train.config import ConfigError, RunConfig, load_config
from train.continual import DomainStream
from train.engines.native import NativeEngine
from train.parallel.ranks import Ranks
from train.run import train

BATCH = 256


@pytest.fixture
def continual(raw_config: dict[str, Any], make_config, corpora: dict[str, Path]):
    """continual(**changes): two domains, the second only 6 steps long."""

    def make(**changes: Any) -> RunConfig:
        held_out = str(corpora["validation"])
        raw_config["training"].pop("total_tokens", None)
        return make_config(
            **{
                "mode": "continual",
                "data.train": [
                    {"path": str(corpora["validation"]), "name": "one", "tokens": 9 * BATCH + 7},
                    {"path": str(corpora["train"]), "tokens": 6 * BATCH, "validation": held_out},
                ],
                "data.order": "stream",
                "data.seq_len": 32,
                "training.state_carry": "stream",
                "checkpoint.every_tokens": 4 * BATCH,
                **changes,
            }
        )

    return make


def rows_of(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    return [row for row in rows if row["kind"] == kind]


def test_the_stream_is_the_domains_one_after_the_other(continual, corpora) -> None:
    config = continual()
    sources = [Corpus.open(corpora["validation"]), Corpus.open(corpora["train"])]
    stream = DomainStream(config, sources, Ranks.alone())
    expected = []
    for corpus, steps in zip(sources, (9, 6), strict=True):
        loader = Loader(
            corpus, seq_len=32, batch_size=8, seed=0, align=16, order="stream", prefetch=0
        )
        expected += [next(loader).tokens for _ in range(steps)]
    found = [batch.tokens for batch in stream]
    assert len(found) == 15
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert stream.exhausted
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()


def test_a_whole_domain_is_read_once(continual, corpora) -> None:
    config = continual(**{"data.train": [{"path": str(corpora["train"]), "name": "all"}]})
    corpus = Corpus.open(corpora["train"])
    stream = DomainStream(config, [corpus], Ranks.alone())
    rows = [bytes(row.numpy().tobytes()) for batch in stream for row in batch.tokens]
    loader = Loader(corpus, seq_len=32, batch_size=1, seed=0, align=16, order="stream")
    every = [next(loader).tokens[0].numpy().tobytes() for _ in range(loader.num_windows)]
    loader.close()
    assert 0 <= len(every) - len(rows) < 8
    remaining = list(every)
    for row in rows:
        remaining.remove(row)  # each window at most once
    stream.close()


def test_levels_go_on_by_one_clock_and_the_matrix_is_there(continual) -> None:
    config = continual()
    assert train(config, resume=False) == 0
    saved = load_config(config.run_dir / "config.yaml")
    assert saved.training.total_tokens == 15 * BATCH
    steps = rows_of(config, "step")
    assert [row["tokens"] for row in steps] == [BATCH * i for i in range(1, 16)]
    assert [row["step"] for row in steps if "c" in row["lr"]] == [5, 10, 15]
    assert [row["step"] for row in steps if "b" in row["lr"]] == [3, 6, 9, 12, 15]
    matrix = rows_of(config, "domain_evaluation")
    assert [(r["tokens"], r["domain"], r["domains_trained"]) for r in matrix] == [
        (9 * BATCH, "train", ["one"]),
        (15 * BATCH, "train", ["one", "train"]),
    ]
    assert matrix[0]["loss"] != matrix[1]["loss"]
    assert all(row["predicted_tokens"] == 512 for row in matrix)  # evaluation.max_tokens


@pytest.mark.parametrize(
    "stops", [(4, 11), *(pytest.param(stops, marks=pytest.mark.slow) for stops in ((9,), (8, 10)))]
)
def test_it_resumes_to_the_bit(continual, tmp_path: Path, stops: tuple[int, ...]) -> None:
    straight = continual()
    assert train(straight, resume=False) == 0
    for number, stop in enumerate((*stops, None)):
        part = continual(
            **{
                "run_dir": str(tmp_path / "parts"),
                "training.stop_at_tokens": None if stop is None else stop * BATCH,
            }
        )
        assert train(part, resume=number > 0) == 0
    assert_same_run(straight, part)


def test_a_flush_after_the_end_is_evaluated_on_every_domain(continual) -> None:
    """Level c fires after steps 5, 10 and 15 of 15; of 14 steps it has four pending."""
    changes = {"training.total_tokens": 14 * BATCH}
    config = continual(**changes)
    assert train(config, resume=False) == 0
    before = rows_of(config, "domain_evaluation")
    assert train(continual(**changes, **{"training.flush": True}), resume=True) == 0
    after = rows_of(config, "domain_evaluation")
    assert after[: len(before)] == before
    (last,) = after[len(before) :]
    assert last["domains_trained"] == ["one", "train"] == before[-1]["domains_trained"]
    assert last["loss"] != before[-1]["loss"]


@pytest.mark.parametrize(("skipped", "first_domain"), [(2, 8), (8, 8), (14, 9)])
def test_a_skipped_step_does_not_make_the_stream_run_dry(
    continual, skipped: int, first_domain: int
) -> None:
    """Nor does it put off the evaluation at the end of its domain, or stand in for the last one,
    over everything, where one over a part was due just before."""
    honest, seen = NativeEngine.forward_backward, count()

    def spoiled(self: NativeEngine, batch: Any, carried: Any) -> Any:
        total, state = honest(self, batch, carried)
        return (float("nan") if next(seen) == skipped else total), state

    config = continual(**{"evaluation.every_tokens": 14 * BATCH})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeEngine, "forward_backward", spoiled)
        assert train(config, resume=False) == 0
    held_out = Corpus.open(config.data.validation)
    last = rows_of(config, "evaluation")[-1]
    assert last["predicted_tokens"] == held_out.num_tokens - held_out.num_documents
    store = store_of(config)
    clock = store.plain(store.newest())["clock"]
    assert (clock["tokens"], clock["skipped_tokens"]) == (14 * BATCH, BATCH)
    ends = [row["tokens"] for row in rows_of(config, "domain_evaluation")]
    assert ends == [first_domain * BATCH, 14 * BATCH]
    assert train(config, resume=True) == 0  # finished: nothing is done again
    assert len(rows_of(config, "domain_evaluation")) == 2
    assert rows_of(config, "evaluation")[-1] == last


def test_a_harder_domain_is_no_spike(continual, corpora: dict[str, Path]) -> None:
    """Its losses are not compared with those of the one before; with its own they are, also by a
    run that was resumed in it."""
    honest, seen = NativeEngine.forward_backward, count()

    def harder(self: NativeEngine, batch: Any, carried: Any) -> Any:
        total, state = honest(self, batch, carried)
        number = next(seen)
        return total * (100 if number == 18 else 10 if number >= 9 else 1), state

    held_out = str(corpora["validation"])
    changes: dict[str, Any] = {
        "spikes": {"action": "skip", "window": 8},
        "data.train": [
            {"path": str(corpora["validation"]), "name": "one", "tokens": 9 * BATCH},
            {"path": str(corpora["train"]), "tokens": 12 * BATCH, "validation": held_out},
        ],
        "checkpoint.every_tokens": 1000 * BATCH,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeEngine, "forward_backward", harder)
        config = continual(**changes, **{"training.stop_at_tokens": 12 * BATCH})
        assert train(config, resume=False) == 0
        changes["training.stop_at_tokens"] = None
        assert train(continual(**changes), resume=True) == 0
    assert [row["tokens"] for row in rows_of(config, "skip")] == [18 * BATCH]


@pytest.mark.slow
def test_two_ranks_follow_one_and_take_its_run_up(continual, raw_config, tmp_path: Path) -> None:
    continual()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    runs = {
        "one": [([], 1)],
        "two": [([], 2)],
        "both": [(["training.stop_at_tokens=2816"], 1), (["--resume"], 2)],
    }
    found = {}
    for name, parts in runs.items():
        for more, ranks in parts:
            arguments = [*more, f"run_dir={tmp_path / name}"]
            subprocess.run(
                command(path, *arguments, ranks=ranks),
                check=True,
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
            )
        found[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    for name in ("two", "both"):
        for one, other in zip(found["one"], found[name], strict=True):
            assert (one["kind"], one["tokens"]) == (other["kind"], other["tokens"])
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


BAD = [
    ({"data.order": "shuffle"}, "needs data.order=stream and training.state_carry=stream"),
    ({"training.state_carry": "none"}, "needs data.order=stream"),
    ({"mode": "pretrain"}, "missing key 'training.total_tokens'"),
    ({"mode": "pretrain", "training.total_tokens": 512}, "'name' is of a domain: add mode="),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_configurations(continual, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        continual(**changes)


def test_what_only_the_data_shows(
    continual, raw_config, corpora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        ({"training.total_tokens": 16 * BATCH}, "is more than the 3840 tokens"),
        ({"data.train": [{"path": str(corpora["train"]), "tokens": 100}]}, "less than a step"),
        (
            {"data.train": [{"path": str(corpora["train"]), "tokens": 10**9}]},
            "fewer than its budget of 1000000000",
        ),
        (
            {
                "data.train": [{"path": str(corpora["train"]), "tokens": 4 * BATCH}],
                "optimizer.schedule": {"name": "wsd", "decay_tokens": 5 * BATCH},
            },
            "decays for 1280 tokens, more than training.total_tokens=1024",
        ),
    ]
    for changes, message in cases:
        continual(**changes)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw_config))
        assert main([str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
