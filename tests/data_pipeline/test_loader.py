import json
import random
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import IGNORE, Corpus, DataError, Loader, evaluation_batches, sampling
from data_pipeline.batch import make_batch
from data_pipeline.tokenizing import tokenize

ALIGN = 16
PACKINGS = ("concat", "aligned")
USUAL = {
    "seq_len": 64,
    "batch_size": 6,
    "seed": 3,
    "packing": "aligned",
    "align": ALIGN,
    "prefetch": 0,
}


def stream(documents, packing, pad):
    """The virtual stream as a list of (token, label or IGNORE, starts a document)."""
    out = []
    for document in documents:
        labels = [*document[1:], IGNORE]
        out += [(t, n, i == 0) for i, (t, n) in enumerate(zip(document, labels, strict=True))]
        while packing == "aligned" and len(out) % ALIGN:
            out.append((pad, IGNORE, False))
    return out


def expected_rows(documents, packing, pad, seq_len):
    flat = stream(documents, packing, pad)
    if packing == "aligned" and documents:  # trailing gap belongs to the stream
        assert len(flat) % ALIGN == 0
    flat += [(pad, IGNORE, False)] * (-len(flat) % seq_len)
    return [flat[i : i + seq_len] for i in range(0, len(flat), seq_len)]


def rows_of(batch):
    return [
        list(zip(t, n, s, strict=True))
        for t, n, s in zip(
            batch.tokens.tolist(),
            batch.labels.tolist(),
            batch.document_starts.tolist(),
            strict=True,
        )
    ]


def take(loader, steps):
    return [row for _ in range(steps) for row in rows_of(next(loader))]


def make(corpus, **changes):
    return Loader(corpus, **{**USUAL, **changes})


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


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_resume_anywhere_twice_on_other_ranks(corpus_folder, second_folder, data):
    corpora = [Corpus.open(corpus_folder), Corpus.open(second_folder)]
    order = data.draw(st.sampled_from(["shuffle", "window", "stream"]))
    packing = data.draw(st.sampled_from(PACKINGS))
    prefetch = data.draw(st.sampled_from([0, 2]))
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=3, max_size=3))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=3, max_size=3))

    def loaders(size):
        options = {"order": order, "packing": packing, "prefetch": prefetch}
        options["weights"] = [0.6, 0.4]
        if order != "stream":
            options["weights"] = [(0, [0.6, 0.4]), (64 * 100, [1, 3]), (64 * 301, [1, 0])]
        return [make(corpora, dp_rank=r, dp_size=size, **options) for r in range(size)]

    def steps(ranks, count):
        return [row for _ in range(count) for rank in ranks for row in rows_of(next(rank))]

    whole = loaders(1)
    expected = steps(whole, sum(lengths))
    rows, state = [], None
    for size, count in zip(sizes, lengths, strict=True):
        ranks = loaders(size)
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(json.dumps(state)))
        rows += steps(ranks, count)
        states = [rank.state_dict() for rank in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
        for rank in ranks:
            rank.close()
    whole[0].close()
    assert rows == expected
    assert len(json.dumps(state)) < 400


def test_state_counts_delivered_not_prefetched_batches(corpus):
    loader = make(corpus, prefetch=4)
    for step in range(3):
        assert loader.state_dict()["position"] == loader.position == 6 * step
        next(loader)
        time.sleep(0.05)
    loader.close()


def test_shuffle_resumes_at_another_batch_size(corpus):
    expected = take(make(corpus, batch_size=4), 6)
    loader = make(corpus, batch_size=4)
    first = take(loader, 3)
    bigger = make(corpus, batch_size=12)
    bigger.load_state_dict(loader.state_dict())
    assert first + take(bigger, 1) == expected


def test_seek_and_skip(corpus):
    expected = take(make(corpus), 10)
    loader = make(corpus, prefetch=2)
    next(loader)
    loader.skip(3)
    assert take(loader, 1) == expected[24:30]
    loader.seek(6)
    assert take(loader, 2) == expected[6:18]
    loader.close()
    with pytest.raises(DataError, match="position -1"):
        loader.seek(-1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"seq_len": 128}, "seq_len"),
        ({"packing": "concat"}, "packing"),
        ({"align": 32}, "align"),
        ({"order": "stream"}, "order"),
    ],
)
def test_a_foreign_state_is_refused_by_name(corpus, change, field):
    with pytest.raises(DataError, match=rf"another stream: .*{field} is"):
        make(corpus, **change).load_state_dict(make(corpus).state_dict())


@pytest.mark.parametrize(
    ("order", "batch_size", "packing", "align"),
    [
        ("shuffle", None, "aligned", ALIGN),
        ("stream", 6, "aligned", ALIGN),
        ("shuffle", None, "concat", None),
    ],
)
def test_a_state_that_an_earlier_version_left(corpus, order, batch_size, packing, align):
    """Plain data of this form, to the letter, is in the checkpoints that there are."""
    state = {
        "position": 12,
        "version": 1,
        "corpora": [corpus.fingerprint[:16]],
        "weights": [[0, [1]]],
        "seed": 3,
        "seq_len": 64,
        "packing": packing,
        "align": align,
        "order": order,
        "batch_size": batch_size,
    }
    loader = make(corpus, order=order, packing=packing)
    take(loader, 2)
    assert loader.state_dict() == state
    other = make(corpus, order=order, packing=packing)
    other.load_state_dict(json.loads(json.dumps(state)))
    assert take(other, 1) == take(loader, 1)


def test_windows_longer_than_a_chunk_are_mixed_one_by_one(corpus, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_TOKENS", 32)
    loader = make(corpus, order="window", batch_size=1)
    every = make(corpus, batch_size=1)
    rows = [sorted(take(one, one.num_windows)) for one in (loader, every)]
    assert rows[0] == rows[1]


def test_a_state_of_another_corpus_or_blend_is_refused(corpus, second_folder):
    second = Corpus.open(second_folder)
    with pytest.raises(DataError, match="corpora is"):
        make(second).load_state_dict(make(corpus).state_dict())
    with pytest.raises(DataError, match="weights is"):
        make([corpus, second], weights=[1, 2]).load_state_dict(
            make([corpus, second], weights=[1, 3]).state_dict()
        )
    with pytest.raises(DataError, match="batch_size is"):
        make(corpus, order="stream", batch_size=5).load_state_dict(
            make(corpus, order="stream").state_dict()
        )
    shorter = make(corpus).state_dict()
    del shorter["seed"]
    with pytest.raises(DataError, match="seed is None in the state and 3 here"):
        make(corpus).load_state_dict(shorter)
    for position in (None, -1, 1.5, "7", True, 10**30):
        with pytest.raises(DataError, match="position"):
            make(corpus).load_state_dict({**make(corpus).state_dict(), "position": position})


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


class Endless:
    """10**12 windows without a byte on disk: token t of the corpus is 4 + t % 1000."""

    fingerprint, tokenizer_sha256, path = "f" * 64, "0", "endless"
    num_tokens, bos_id, eos_id, pad_id, dtype = 64 * 10**12, 1, 2, 3, np.dtype("<u2")

    def read_into(self, out, start):
        out[:] = 4 + (start + np.arange(len(out))) % 1000


def test_seek_to_the_end_of_a_trillion_windows():
    loader = make([Endless()], packing="concat", batch_size=8)
    loader.seek(10**12 - 8)
    last = take(loader, 2)
    best = min(_seconds_to_first_batch(10**12 - 8 * n) for n in range(1, 6))
    assert best < 0.02
    again = make([Endless()], packing="concat", batch_size=8)
    again.seek(10**12 - 8 * 700)
    assert take(again, 701)[-16:] == last


def test_what_was_planned_for_rows_that_are_read_is_let_go():
    loader = make([Endless()], packing="concat", batch_size=512)
    windows, planned = loader._sampling.windows, []

    def watched(rows):
        plan = windows(rows)
        planned.append(weakref.ref(plan[1]))
        return plan

    loader._sampling.windows = watched
    for _ in range(8):
        next(loader)
    assert len(planned) == 8
    assert sum(plan() is not None for plan in planned) == 2


def _seconds_to_first_batch(position):
    loader = make([Endless()], packing="concat", batch_size=8)
    begin = time.perf_counter()
    loader.seek(position)
    next(loader)
    return time.perf_counter() - begin


def test_small_corpus_after_a_trillion_windows(corpus, documents):
    expected = expected_rows(documents, "aligned", corpus.pad_id, 64)
    loader = make(corpus, batch_size=len(expected))
    loader.seek(len(expected) * 10**12)
    assert sorted(take(loader, 1)) == sorted(expected)


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
