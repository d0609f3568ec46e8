"""What a loader delivers, and in which order."""

import random
import threading

import numpy as np
import pytest
import torch

from data_pipeline import IGNORE, Corpus, DataError, evaluation_batches, sampling
from data_pipeline.batch import make_batch
from tests.data_pipeline.rows import (
    ALIGN,
    PACKINGS,
    Endless,
    expected_rows,
    make,
    rows_of,
    take,
)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("order", ["shuffle", "window", "stream"])
def test_the_order_does_not_depend_on_the_number_of_ranks(corpus, second_folder, packing, order):
    corpora = [corpus, Corpus.open(second_folder)]

    def rows(size):
        loaders = [
            make(corpora, packing=packing, order=order, batch_size=9, dp_rank=r, dp_size=size)
            for r in range(size)
        ]
        return [row for _ in range(7) for loader in loaders for row in rows_of(next(loader))]

    assert all(rows(size) == rows(1) for size in (2, 3, 4, 8))


@pytest.mark.parametrize("order", ["shuffle", "window"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_each_epoch_is_a_new_permutation_of_all_windows(corpus, documents, packing, order):
    expected = expected_rows(documents, packing, corpus.pad_id, 64)
    count = len(expected)
    rows = take(make(corpus, packing=packing, batch_size=count, order=order), 3)
    epochs = [rows[i * count : (i + 1) * count] for i in range(3)]
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != expected
    other_seed = take(make(corpus, packing=packing, batch_size=count, order=order, seed=4), 1)
    assert sorted(other_seed) == sorted(expected)
    assert other_seed not in epochs


def test_windows_longer_than_a_chunk_are_mixed_one_by_one(corpus, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_TOKENS", 32)
    loader = make(corpus, order="window", batch_size=1)
    every = make(corpus, batch_size=1)
    rows = [sorted(take(one, one.num_windows)) for one in (loader, every)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("packing", PACKINGS)
def test_stream_rows_are_contiguous_and_cover_everything(corpus, documents, packing):
    expected = expected_rows(documents, packing, corpus.pad_id, 64)
    steps = -(-len(expected) // 6)
    loader = make(corpus, order="stream", packing=packing)
    batches = [rows_of(next(loader)) for _ in range(steps + 5)]
    doubled = expected + expected
    for row in range(6):
        start = row * len(expected) // 6
        assert [batch[row] for batch in batches] == doubled[start : start + steps + 5]
    seen = {tuple(row) for batch in batches[:steps] for row in batch}
    assert seen == {tuple(row) for row in expected}


def test_stream_shares_rows_among_corpora(corpus, second_folder):
    corpora = [corpus, Corpus.open(second_folder)]
    loader = make(corpora, order="stream", batch_size=8, weights=[3, 1])
    assert loader.weights == [0.75, 0.25]
    with pytest.raises(DataError, match="too small for a row of each"):
        make(corpora, order="stream", batch_size=1, weights=[3, 1])


def test_blend_draws_each_corpus_in_its_own_permutations(corpus, second_folder):
    corpora = [corpus, Corpus.open(second_folder)]
    rows = [
        sorted(r for b in evaluation_batches(c, seq_len=64, batch_size=1) for r in rows_of(b))
        for c in corpora
    ]
    loader = make(corpora, weights=[len(rows[0]), len(rows[1])], align=64, batch_size=1)
    drawn = take(loader, len(rows[0]) + len(rows[1]))
    assert sorted(drawn) == sorted(rows[0] + rows[1])


def test_weights_change_at_the_stated_token(corpus, second_folder):
    corpora = [corpus, Corpus.open(second_folder)]
    whole = make(corpora, weights=[(0, [1, 0]), (64 * 30, [1, 3]), (64 * 62, [0, 1])])
    shares = []
    rows = []
    for _ in range(12):
        shares.append(whole.weights)
        rows += rows_of(next(whole))
    assert shares == [[1, 0]] * 5 + [[0.25, 0.75]] * 6 + [[0, 1]]
    first = take(make(corpora, weights=[1, 0]), 5)
    assert rows[:30] == first
    from_first = {tuple(row) for row in first_windows(corpus)}
    drawn = np.array([tuple(row) in from_first for row in rows[30:62]])
    assert drawn.sum() == 8
    assert (np.abs(np.cumsum(drawn) - np.arange(1, 33) / 4) < 1).all()
    assert not any(tuple(row) in from_first for row in rows[62:])
    assert len({tuple(row) for row in rows if tuple(row) in from_first}) == 38


def first_windows(corpus):
    batches = evaluation_batches(corpus, seq_len=64, batch_size=1, align=ALIGN)
    return [row for batch in batches for row in rows_of(batch)]


def test_closing_ends_the_thread(corpus):
    before = threading.active_count()
    loader = make(corpus, prefetch=2)
    next(loader)
    assert before < threading.active_count() <= before + 2
    loader.close()
    assert threading.active_count() == before
    next(loader)
    del loader
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq_len": 100},
        {"seq_len": 0, "packing": "concat"},
        {"align": 0},
        {"packing": "tight"},
        {"order": "sorted"},
        {"dp_rank": 2, "dp_size": 2},
        {"dp_size": 7},
        {"weights": [1, 1]},
        {"weights": [0]},
        {"weights": [[1]]},
        {"weights": [(5, [1])]},
        {"weights": [(0, [1]), (0, [1])]},
        {"weights": [(0, [1]), (64, [1])], "order": "stream"},
        {"prefetch": -1},
        {"on_corrupt": "ignore"},
    ],
)
def test_impossible_arguments_are_refused(corpus, wrong):
    with pytest.raises(DataError):
        make(corpus, **wrong)


def test_corpora_of_two_tokenizers_do_not_mix(corpus):
    with pytest.raises(DataError, match="different tokenizers"):
        make([corpus, Endless()], packing="concat")


def test_batch_types(corpus):
    batch = next(make(corpus))
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.document_starts.dtype == torch.bool
    assert batch.tokens.shape == batch.labels.shape == batch.document_starts.shape == (6, 64)
    assert batch.num_valid == int((batch.labels != IGNORE).sum())
    starts = np.array([[True, False, False, False]])
    row = make_batch(np.array([[1, 9, 2, 3, 1]]), starts, 2, 3)
    assert row.labels.tolist() == [[9, 2, IGNORE, IGNORE]]
    expected = batch.document_starts.long().cumsum(1)
    assert batch.document_ids.tolist() == expected.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
def test_pinning_without_a_gpu_is_refused(corpus):
    with pytest.raises(DataError, match="leave it off here"):
        next(make(corpus, pin_memory=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a machine without a GPU")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_pinned_batches_hold_the_same(corpus, prefetch):
    with make(corpus, pin_memory=True, prefetch=prefetch) as pinned, make(corpus) as usual:
        for _ in range(5):
            batch = next(pinned)
            assert batch.tokens.is_pinned()
            assert batch.labels.is_pinned()
            assert rows_of(batch) == rows_of(next(usual))


def test_random_access_agrees_with_the_documents(corpus, documents):
    flat = [token for document in documents for token in document]
    rng = random.Random(0)
    assert corpus.num_tokens == len(flat)
    assert corpus.num_shards > 2
    for _ in range(300):
        start = rng.randrange(len(flat))
        stop = min(len(flat), start + rng.randrange(9000))
        assert corpus.read(start, stop).tolist() == flat[start:stop]
    for start, stop in [(-1, 3), (0, len(flat) + 1)]:
        with pytest.raises(IndexError):
            corpus.read(start, stop)
