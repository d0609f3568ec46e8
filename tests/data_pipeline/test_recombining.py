import io
import shutil

import numpy as np
import pytest
import sentencepiece

from data_pipeline import Corpus, DataError, Tokenizer, cli, train_tokenizer
from data_pipeline.recombining import held_out, merge, split
from data_pipeline.tokenizing import tokenize
from data_pipeline.verify import verify
from tests.data_pipeline.plain_reader import read_corpus


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_merged_corpora_follow_each_other(corpus_folder, second_folder, tmp_path):
    manifest, written = merge([corpus_folder, second_folder], tmp_path / "m")
    parts = [read_corpus(folder) for folder in (corpus_folder, second_folder)]
    documents, names, _ = read_corpus(tmp_path / "m")
    assert documents == parts[0][0] + parts[1][0]
    assert names == parts[0][1] + parts[1][1]
    assert manifest["text_bytes"] == sum(part[2]["text_bytes"] for part in parts)
    assert verify(tmp_path / "m")[1] == []
    assert written == len(manifest["shards"])
    assert merge([corpus_folder, second_folder], tmp_path / "m")[1] == 0
    with pytest.raises(DataError, match="holds another corpus"):
        merge([second_folder, corpus_folder], tmp_path / "m")


def test_a_merge_keeps_the_bytes_of_text_of_a_tokenizer_that_adds_spaces(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["one two", "three"]),
        model_writer=model,
        model_type="char",
        vocab_size=14,
        minloglevel=2,
    )
    for name, text in (("a", "one  two"), ("b", "three")):
        (tmp_path / f"{name}.txt").write_text(text)
    made, _ = tokenize([str(tmp_path)], Tokenizer(model.getvalue()), tmp_path / "c")
    merged, _ = merge([tmp_path / "c", tmp_path / "c"], tmp_path / "m")
    assert made["text_bytes"] == 13
    assert merged["text_bytes"] == 26
    assert verify(tmp_path / "m")[1] == []


def test_a_split_holds_out_by_content(corpus_folder, second_folder, tmp_path):
    made = split(corpus_folder, tmp_path / "s", 3)
    documents, names, _ = read_corpus(corpus_folder)
    train, validation = (read_corpus(tmp_path / "s" / part) for part in ("train", "validation"))
    chosen = [n for n, d in enumerate(documents) if tuple(d) in set(map(tuple, validation[0]))]
    assert validation[0] == [documents[n] for n in chosen]
    assert train[0] == [d for n, d in enumerate(documents) if n not in chosen]
    assert validation[1] == [names[n] for n in chosen]
    assert 5 < len(chosen) < 25
    assert made["train"][1] > 0
    assert [r[1] for r in split(corpus_folder, tmp_path / "s", 3).values()] == [0, 0]
    for part in ("train", "validation"):
        assert verify(tmp_path / "s" / part)[1] == []
    with pytest.raises(DataError, match="holds another corpus"):
        split(corpus_folder, tmp_path / "s", 4)
    merge([second_folder, corpus_folder], tmp_path / "m")
    split(tmp_path / "m", tmp_path / "t", 3)
    again = {tuple(d) for d in read_corpus(tmp_path / "t" / "validation")[0]}
    assert set(map(tuple, validation[0])) <= again
    corpus = Corpus.open(tmp_path / "s" / "validation")
    assert held_out(corpus.read(0, int(corpus.document_lengths(0)[0])), 3)


def test_what_is_held_out_is_so_in_every_version():
    """What one was validated on is not trained on after the next one's split."""
    assert [n for n in range(40) if held_out(np.arange(n), 3)] == [
        *(1, 4, 5, 6, 12, 13, 16, 24, 25, 29, 31, 35, 36, 39)
    ]


def test_stopped_in_the_middle_it_goes_on(corpus_folder, second_folder, tmp_path, monkeypatch):
    from data_pipeline import building

    whole = tmp_path / "whole"
    merge([corpus_folder, second_folder], whole)
    real, calls = building.write_shard, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(building, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        merge([corpus_folder, second_folder], tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "n")
    assert not (tmp_path / "m" / "manifest.json").exists()
    _, written = merge([corpus_folder, second_folder], tmp_path / "m")
    assert written == len(list(whole.glob("*.tok"))) - 2
    assert contents(tmp_path / "m") == contents(whole)
    merge([second_folder, corpus_folder], tmp_path / "n")
    merge([second_folder, corpus_folder], tmp_path / "fresh")
    assert contents(tmp_path / "n") == contents(tmp_path / "fresh")


def test_what_cannot_be_combined_is_refused(corpus_folder, text_folder, texts, tmp_path, capsys):
    tokenize([str(text_folder)], train_tokenizer(texts.values(), 400), tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        merge([corpus_folder, tmp_path / "other"], tmp_path / "m")
    with pytest.raises(DataError, match=r"no documents .* another --holdout"):
        split(corpus_folder, tmp_path / "s", 10**9)
    with pytest.raises(DataError, match="--holdout 1"):
        split(corpus_folder, tmp_path / "s", 1)
    shutil.rmtree(tmp_path / "s")
    assert cli.main(["merge", str(corpus_folder), "--out", str(tmp_path / "x")]) == 0
    assert cli.main(["split", str(corpus_folder), "--out", str(tmp_path / "y")]) == 0
    assert "shards written" in capsys.readouterr().out
