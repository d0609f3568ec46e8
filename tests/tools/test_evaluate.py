"""`python -m tools.evaluate`: the run's own held-out loss, and by how much text came before."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import IGNORE, Corpus, evaluation_batches, train_tokenizer
from data_pipeline.tokenizing import tokenize
from hope import HopeModel
from tools.evaluate import main as evaluate
from train.callbacks.metrics import read_metrics
from train.checkpoint.load import load_run
from train.config import RunConfig
from train.run import train

MODEL = {
    "model.num_layers": 3,
    "model.pattern": ["titans", "attention"],
    "training.total_tokens": 6 * 256,
    "checkpoint.asynchronous": False,
}


@pytest.fixture
def short(corpora: dict[str, Path], tmp_path: Path) -> Path:
    """Held-out documents of 3 to 500 tokens, several in a row."""
    text = (corpora["validation"].parent / "text" / "validation" / "0.txt").read_text()
    folder = tmp_path / "text"
    folder.mkdir()
    for number, size in enumerate((300, 9, 1200, 40, 700, 150, 500, 20)):
        (folder / f"{number}.txt").write_text(text[number * 1200 :][:size])
    tokenize([str(folder)], Corpus.open(corpora["train"]).tokenizer, tmp_path / "short")
    return tmp_path / "short"


@pytest.fixture
def trained(make_config: Any) -> RunConfig:
    """A run of a memory and an attention layer whose weights have moved."""
    config = make_config(**MODEL)
    assert train(config, resume=False) == 0
    return config


def measured(config: RunConfig, file: Path, *options: str) -> dict[str, Any]:
    assert evaluate([str(config.run_dir), "--json", str(file), *options]) == 0
    return dict(json.loads(file.read_text()))


def by_context(
    model: HopeModel, corpus: Corpus, seq_len: int, packing: str = "aligned"
) -> dict[int, list[float]]:
    """Losses by floor(log2(context)): each document of each row by itself, token by token; with
    concat, of which models are not told, each row."""
    found = defaultdict(list)
    for batch in evaluation_batches(
        corpus, seq_len=seq_len, batch_size=1, packing=packing, align=16
    ):
        (begins,) = batch.document_starts[0].nonzero(as_tuple=True)
        inside = [] if packing == "concat" else begins.tolist()
        bounds = sorted({0, *inside, seq_len})
        for begin, end in itertools.pairwise(bounds):
            tokens, labels = batch.tokens[:, begin:end], batch.labels[0, begin:end]
            with torch.no_grad():
                told = model(tokens)[0].double().log_softmax(-1)
            for place, label in enumerate(labels.tolist()):
                if label != IGNORE:
                    found[math.floor(math.log2(place + 1))].append(-float(told[0, place, label]))
    return dict(found)


@pytest.mark.parametrize(
    ("seq_len", "packing"), [(64, "aligned"), (208, "aligned"), (64, "concat"), (64, "best-fit")]
)
def test_every_class_is_a_loop_over_documents_and_tokens(
    short: Path, make_config: Any, tmp_path: Path, seq_len: int, packing: str
) -> None:
    config = make_config(**MODEL, **{"data.packing": packing, "data.validation": str(short)})
    assert train(config, resume=False) == 0
    found = measured(config, tmp_path / "found.json", "--seq-len", str(seq_len))["trained"]
    _, model = load_run(config.run_dir)
    wanted = by_context(model.eval(), Corpus.open(short), seq_len, packing)
    assert [row["from"] for row in found["by_context"]] == [1 << k for k in sorted(wanted)]
    for row, losses in zip(found["by_context"], (wanted[k] for k in sorted(wanted)), strict=True):
        assert row["tokens"] == len(losses)
        assert row["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    every = [loss for losses in wanted.values() for loss in losses]
    assert found["tokens"] == len(every)
    assert found["loss"] == pytest.approx(math.fsum(every) / len(every), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_by_default_it_is_what_the_run_found_at_its_end(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = read_metrics(trained.run_dir / "metrics.jsonl")[-1]
    found = measured(trained, tmp_path / "found.json")["trained"]
    assert found["tokens"] == last["predicted_tokens"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(last[name], rel=1e-6)
    shown = capsys.readouterr().out
    assert f"{found['loss']:.4f}" in shown
    assert f"{found['tokens']:,} tokens of " in shown
    some = measured(trained, tmp_path / "some.json", "--max-tokens", "128")["trained"]
    assert 64 <= some["tokens"] <= 128


def test_beside_it_the_same_weights_without_writes(trained: RunConfig, tmp_path: Path) -> None:
    found = measured(trained, tmp_path / "found.json", "--without-writes")
    trained_file = trained.run_dir / "config.yaml"
    assert "writes: true" in trained_file.read_text()
    config, model = load_run(trained.run_dir)
    titans = replace(config.model.titans, writes=False)
    still = HopeModel(replace(config.model, titans=titans), seed=None)
    still.load_state_dict(model.state_dict())
    wanted = by_context(still.eval(), Corpus.open(config.data.validation), 64)
    every = [loss for losses in wanted.values() for loss in losses]
    assert found["without writes"]["loss"] == pytest.approx(math.fsum(every) / len(every), rel=1e-5)
    assert found["without writes"]["loss"] != found["trained"]["loss"]


def test_what_is_refused(
    trained: RunConfig, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    (tmp_path / "a.txt").write_text("some other text, " * 40)
    tokenize([str(tmp_path / "a.txt")], train_tokenizer(["some other text, " * 40], 280), other)
    run_dir = str(trained.run_dir)
    for arguments, problem in (
        ([run_dir, "--seq-len", "100"], "the nearest is 112"),
        ([run_dir, "--data", str(other)], "was trained with another tokenizer"),
        ([run_dir, "--data", str(tmp_path / "none")], "none"),
        ([str(tmp_path)], "holds no run"),
        ([run_dir, "--json", str(tmp_path / "no" / "file")], "is no folder"),
    ):
        assert evaluate(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert problem in line
    plain = make_config(run_dir=str(tmp_path / "plain"), **{"model.pattern": ["attention"]})
    assert train(plain, resume=False) == 0
    capsys.readouterr()
    assert evaluate([str(plain.run_dir), "--without-writes"]) == 2
    assert "writes no memories" in capsys.readouterr().err
