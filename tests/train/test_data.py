"""What the section `data` promises, seen from the trainer."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_pipeline import Corpus, CorruptDataError, DataError, train_tokenizer
from data_pipeline.tokenizing import tokenize
from tests.train.test_trainer import assert_same_run, losses
from train.__main__ import main
from train.callbacks.metrics import read_metrics
from train.config import RunConfig, dump_config
from train.continual import open_loader
from train.corpora import open_corpora
from train.parallel.ranks import Ranks
from train.run import train

ALONE = Ranks.alone()


def rows(config: RunConfig, steps: int) -> list[list[int]]:
    loader = open_loader(config, open_corpora(config).train, ALONE)
    taken = [row for _ in range(steps) for row in next(loader).tokens.tolist()]
    loader.close()
    return taken


@pytest.mark.parametrize(
    ("order", "packing"),
    [
        ("window", "aligned"),
        ("shuffle", "best-fit"),
        *(
            pytest.param(order, packing, marks=pytest.mark.slow)
            for order, packing in (
                ("shuffle", "aligned"),
                ("window", "best-fit"),
                ("shuffle", "concat"),
                ("window", "concat"),
            )
        ),
    ],
)
def test_every_order_and_packing_trains_and_resumes(make_config, tmp_path, order, packing) -> None:
    changes = {"data.order": order, "data.packing": packing}
    whole = make_config(**changes, run_dir=str(tmp_path / "whole"))
    assert train(whole, resume=False) == 0
    stopped = {**changes, "run_dir": str(tmp_path / "parts")}
    train(make_config(**stopped, **{"training.stop_at_tokens": 5 * 256}), resume=False)
    parts = make_config(**stopped, **{"training.stop_at_tokens": None})
    assert train(parts, resume=True) == 0
    assert_same_run(whole, parts)


def test_best_fit_tells_the_model_where_memories_begin_anew(make_config) -> None:
    config = make_config(**{"data.packing": "best-fit"})
    loader = open_loader(config, open_corpora(config).train, ALONE)
    assert config.data.tells_documents
    align = config.model.titans.scan.projection_chunk
    steps = -(-loader.num_windows // config.batch_rows)
    starts = torch.cat([next(loader).document_starts for _ in range(steps)])
    assert starts.sum() >= 2
    assert not (torch.nonzero(starts)[:, 1] % align).any()
    loader.close()


def test_a_corpus_at_a_url_is_read_through_the_cache(make_config, corpora, tmp_path) -> None:
    local = make_config()
    expected = rows(local, 4)
    cache = tmp_path / "cache"
    url = "file://" + str(Path(corpora["train"]).resolve())
    remote = make_config(**{"data.train": [{"path": url}], "data.cache_dir": str(cache)})
    assert remote.data.train[0].path == url
    assert rows(remote, 4) == expected
    assert len(list(cache.glob("*.tok"))) > 0
    tight = make_config(**{"data.cache_dir": str(tmp_path / "tight"), "data.cache_bytes": 10})
    with pytest.raises(DataError, match="do not fit into a cache of 10"):
        rows(tight, 1)
    train(remote, resume=False)
    assert len(losses(remote)) > 0


def test_a_run_goes_on_where_its_data_has_moved_to(make_config, corpora, tmp_path, capsys) -> None:
    train(make_config(**{"training.stop_at_tokens": 1024}), resume=False)
    moved = Path(shutil.copytree(corpora["train"], tmp_path / "moved"))
    changes = {"training.stop_at_tokens": None, "data.train": [{"path": str(moved)}]}
    assert train(make_config(**changes), resume=True) == 0
    other = make_config(**{"data.train": [{"path": str(corpora["validation"])}]})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(other))
    assert main([str(file), "--resume"]) == 2
    assert "the loader state belongs to another stream" in capsys.readouterr().err


def test_held_out_data_that_is_another_is_told(make_config, corpora, recwarn) -> None:
    train(make_config(**{"training.stop_at_tokens": 512}), resume=False)
    train(make_config(**{"training.stop_at_tokens": 768}), resume=True)
    assert not [one for one in recwarn if "held-out data" in str(one.message)]
    changes = {"training.stop_at_tokens": 1024, "data.validation": str(corpora["train"])}
    with pytest.warns(UserWarning, match=r"held-out data \(validation\) is not what it was"):
        train(make_config(**changes), resume=True)


def test_weights_change_where_the_curriculum_says(make_config, corpora) -> None:
    paths = [{"path": str(corpora["train"]), "weight": 3.0}, {"path": str(corpora["validation"])}]
    stages = [{"from_tokens": 4 * 256, "weights": [0, 1]}]
    config = make_config(**{"data.train": paths, "data.curriculum": stages})
    taken = rows(config, 8)

    def only(path: dict) -> RunConfig:
        return make_config(**{"data.train": [path], "data.curriculum": []})

    alone = {
        name: {tuple(row) for row in rows(only(path), 400)}
        for name, path in zip("ab", paths, strict=True)
    }
    second = [tuple(row) in alone["b"] and tuple(row) not in alone["a"] for row in taken]
    assert sum(second[:16]) == 4
    assert all(second[16:])


@pytest.mark.parametrize("order", ["shuffle", "stream"])
def test_a_corpus_of_weight_0_is_left_out_until_its_stage(make_config, corpora, order) -> None:
    kept, out = {"path": str(corpora["train"])}, {"path": str(corpora["validation"]), "weight": 0}
    changes = {"data.order": order, "data.train": [out, kept]}
    alone = rows(make_config(**{**changes, "data.train": [kept]}), 400)
    taken = rows(make_config(**changes), 8)
    assert {tuple(row) for row in taken} <= {tuple(row) for row in alone}
    if order == "shuffle":
        later = [{"from_tokens": 4 * 256, "weights": [1, 0]}]
        joined = rows(make_config(**{"data.curriculum": later}), 8)
        assert joined[:16] == taken[:16]
        assert not {tuple(row) for row in joined[16:]} & {tuple(row) for row in alone}


def damaged(corpora, tmp_path: Path, part: float = 0.0) -> Path:
    """part: of the shard that lies before the damage."""
    folder = Path(shutil.copytree(corpora["train"], tmp_path / "damaged"))
    for path in folder.glob("*.tok"):
        data = bytearray(path.read_bytes())
        data[100 + int(part * len(data))] ^= 1
        path.write_bytes(data)
    return folder


def test_a_damaged_frame_stops_the_run_or_is_left_out(
    make_config, corpora, tmp_path, caplog
) -> None:
    folder = damaged(corpora, tmp_path)
    config = make_config(**{"data.train": [{"path": str(folder)}]})
    with pytest.raises(CorruptDataError, match="frame 0"):
        rows(config, 400)
    config = make_config(**{"data.on_corrupt": "skip"})
    with caplog.at_level(logging.WARNING):
        taken = np.array(rows(config, 40))
    assert "frame 0" in caplog.text
    pad = Corpus.open(folder).pad_id
    assert (taken == pad).all(1).any()
    assert not (taken == pad).all()


def test_damage_in_the_held_out_data_stops_the_run_or_is_left_out(
    make_config, corpora, tmp_path, caplog
) -> None:
    """Else a run that skips damage would end at its first evaluation, and every resume too."""
    folder = damaged({"train": corpora["validation"]}, tmp_path)
    settings = {"data.validation": str(folder), "training.total_tokens": 512}
    with pytest.raises(CorruptDataError, match="frame 0"):
        train(make_config(**settings, run_dir=str(tmp_path / "stops")), resume=False)
    config = make_config(**{"data.on_corrupt": "skip"}, run_dir=str(tmp_path / "goes on"))
    with caplog.at_level(logging.WARNING):
        assert train(config, resume=False) == 0
    assert "frame 0" in caplog.text
    last = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if "perplexity" in row][
        -1
    ]
    whole = Corpus.open(folder)
    assert 0 < last["predicted_tokens"] < whole.num_tokens - whole.num_documents


def test_held_out_data_of_which_nothing_is_left_is_one_line(
    make_config, raw_config, tmp_path, capsys
) -> None:
    text = Path(__file__).read_text()
    tokenizer = train_tokenizer([text], 400)
    for name, part in (("train", text), ("one frame", text[:400])):
        (tmp_path / f"{name}.txt").write_text(part)
        tokenize([str(tmp_path / f"{name}.txt")], tokenizer, tmp_path / name)
    folder = damaged({"train": tmp_path / "one frame"}, tmp_path)
    make_config(**{"data.validation": str(folder), "data.on_corrupt": "skip"})
    make_config(**{"data.train": [{"path": str(tmp_path / "train")}]})
    make_config(**{"training.total_tokens": 512, "model.mixer": "attention"})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    assert main([str(path)]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
    assert line.startswith(f"error: {folder}: held out, and no token in it to predict")


@pytest.mark.slow
def test_the_rank_that_meets_a_damaged_frame_says_so(
    make_config, raw_config, corpora, tmp_path
) -> None:
    """The second of two; the first sees only that it was lost, and ends later."""
    folder = damaged(corpora, tmp_path, part=0.55)
    make_config(**{"data.train": [{"path": str(folder)}], "data.order": "stream"})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    launcher = ["launch.agent", "--no-preflight", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert f"error: {folder}" in result.stderr
    assert "the bytes do not match their checksum" in result.stderr
