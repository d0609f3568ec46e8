"""Evaluation: every window of a corpus once, whatever the ranks."""

import json

import pytest
import torch

from data_pipeline import IGNORE, Corpus, DataError, evaluation_batches
from data_pipeline.tokenizing import tokenize
from tests.data_pipeline.rows import (
    ALIGN,
    PACKINGS,
    expected_rows,
    rows_of,
)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seq_len", [64, 128, 4096])
def test_evaluation_gives_every_window_once_in_order(corpus, documents, packing, seq_len):
    expected = expected_rows(documents, packing, corpus.pad_id, seq_len)
    batches = evaluation_batches(
        corpus, seq_len=seq_len, batch_size=5, packing=packing, align=ALIGN
    )
    rows = [row for batch in batches for row in rows_of(batch)]
    assert rows[: len(expected)] == expected
    assert rows[len(expected) :] == [[(corpus.pad_id, IGNORE, False)] * seq_len] * (
        -len(expected) % 5
    )


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_but_bos_is_a_label_exactly_once(corpus, documents, packing):
    labels = [
        label
        for batch in evaluation_batches(
            corpus, seq_len=96, batch_size=4, packing=packing, align=ALIGN
        )
        for label in batch.labels[batch.labels != IGNORE].tolist()
    ]
    assert labels == [token for document in documents for token in document[1:]]


@pytest.mark.parametrize("seq_len", [1, 7, 100, 4095, 4097])
def test_concat_takes_any_length(corpus, documents, seq_len):
    expected = expected_rows(documents, "concat", corpus.pad_id, seq_len)
    batches = evaluation_batches(corpus, seq_len=seq_len, batch_size=64, packing="concat")
    assert [row for batch in batches for row in rows_of(batch)][: len(expected)] == expected


def test_documents_start_on_multiples_of_align(corpus):
    starts = torch.cat(
        [b.document_starts for b in evaluation_batches(corpus, seq_len=64, batch_size=4, align=32)]
    )
    assert starts.sum() == corpus.num_documents
    assert (starts.nonzero()[:, 1] % 32 == 0).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_shards_without_documents_are_passed_over(tokenizer, tmp_path, packing):
    texts = ["one", "long " * 3000, "two", "three " * 50]
    records = [json.dumps({"text": text}) for text in texts]
    blank = " " * 2500 + "\n"  # in pieces of 1000 bytes: several in which no document begins
    (tmp_path / "texts.jsonl").write_text(blank + "\n".join(records) + "\n" + blank)
    tokenize([str(tmp_path / "texts.jsonl")], tokenizer, tmp_path / "out", shard_bytes=1000)
    corpus = Corpus.open(tmp_path / "out")
    counts = [shard["documents"] for shard in corpus.manifest["shards"]]
    assert counts[0] == counts[-1] == min(counts[3:-3]) == 0
    assert sum(counts) == 4
    documents = [tokenizer.encode_document(text).tolist() for text in texts]
    expected = expected_rows(documents, packing, corpus.pad_id, 64)
    batches = evaluation_batches(corpus, seq_len=64, batch_size=4, packing=packing, align=ALIGN)
    assert [row for batch in batches for row in rows_of(batch)][: len(expected)] == expected


def test_alignments_the_manifest_does_not_list(corpus, documents):
    batches = evaluation_batches(corpus, seq_len=60, batch_size=4, align=20)
    labels = [x for batch in batches for x in batch.labels[batch.labels != IGNORE].tolist()]
    assert labels == [token for document in documents for token in document[1:]]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 5])
def test_evaluation_windows_do_not_depend_on_ranks(corpus, dp_size):
    def batches(rank, size):
        return list(
            evaluation_batches(
                corpus, seq_len=64, batch_size=5, dp_rank=rank, dp_size=size, max_tokens=2000
            )
        )

    whole = batches(0, 1)
    ranks = [batches(rank, dp_size) for rank in range(dp_size)]
    assert len(whole) == -(-(2000 // 64) // 5)
    for step, batch in enumerate(whole):
        parts = [row for rank in ranks for row in rows_of(rank[step])]
        assert parts == rows_of(batch)


def test_evaluation_ends_after_max_tokens(corpus):
    def count(max_tokens):
        options = {"seq_len": 64, "batch_size": 1, "max_tokens": max_tokens}
        return len(list(evaluation_batches(corpus, **options)))

    assert [count(n) for n in (1, 63, 64, 127, 128, 640)] == [1, 1, 1, 1, 2, 10]
    assert count(10**9) == count(None)


def test_part_of_an_evaluation_is_spread_over_the_corpus(corpus):
    def rows(max_tokens):
        options = {"seq_len": 64, "batch_size": 4, "max_tokens": max_tokens}
        return [row for batch in evaluation_batches(corpus, **options) for row in rows_of(batch)]

    every = rows(None)
    total = len(every)
    while all(token == corpus.pad_id for token, _, _ in every[total - 1]):
        total -= 1
    assert rows(64 * 8)[:8] == [every[i * total // 8] for i in range(8)]


def test_evaluation_wants_at_least_a_token(corpus):
    with pytest.raises(DataError, match="max_tokens 0"):
        evaluation_batches(corpus, seq_len=64, batch_size=1, max_tokens=0)
