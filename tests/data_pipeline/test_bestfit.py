import json
import shutil

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import IGNORE, Corpus, Loader, bestfit, cli, evaluation_batches
from data_pipeline.bestfit import BestFit, pack_shard, plan_path, plan_windows
from data_pipeline.tokenizing import tokenize

LENGTHS = st.lists(st.integers(2, 400), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.sampled_from([(64, 16), (64, 1), (100, 20), (128, 128)]))
def test_no_token_is_lost_doubled_or_cut_needlessly(lengths, shape):
    seq_len, align = shape
    first, pieces = pack_shard(np.array(lengths), seq_len, align)
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    covered = []
    for row in range(len(first) - 1):
        free_from = 0
        for column, start, stop in pieces[first[row] : first[row + 1]].tolist():
            assert column % align == 0
            assert column >= free_from
            free_from = column + min(stop - start, seq_len)
            covered += range(start, start + min(stop - start, seq_len))
            document = next(d for d, end in enumerate(ends) if start < end)
            assert stop <= ends[document]
            assert (start - starts[document]) % seq_len == 0
            if stop < ends[document]:
                assert (column, stop - start) == (0, seq_len + 1)
        assert 0 < free_from <= seq_len
    assert sorted(covered) == list(range(sum(lengths)))


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_each_rest_goes_to_the_fullest_row_with_room(lengths):
    seq_len, align = 64, 2
    first, pieces = pack_shard(np.array(lengths), seq_len, align)
    rows = sum(length // seq_len for length in lengths)
    free: list[int] = []
    for need in sorted((-(-(n % seq_len) // align) for n in lengths if n % seq_len), reverse=True):
        fitting = [room for room in free if room >= need]
        free.remove(min(fitting)) if fitting else None
        free.append((min(fitting) if fitting else seq_len // align) - need)
    assert len(first) - 1 == rows + len(free)
    left = []
    for row in range(rows, len(first) - 1):
        column, start, stop = pieces[first[row + 1] - 1].tolist()
        left.append((seq_len - column) // align - -(-(stop - start) // align))
    assert sorted(left) == sorted(free)


@pytest.mark.parametrize(
    ("seq_len", "align", "digest"),
    [(512, 16, "06167e78f5032d8b"), (2048, 64, "f0a7044a146cf581"), (300, 1, "0d5a98d3333de216")],
)
def test_rows_are_what_they_were(seq_len, align, digest):
    """A run that is resumed with a later version goes on in the same rows."""
    lengths = np.exp(np.random.RandomState(0).uniform(1, 8, 5000)).astype(np.int64)
    first, pieces = pack_shard(lengths, seq_len, align)
    assert xxhash.xxh3_64_hexdigest(first.tobytes() + pieces.tobytes()) == digest


def test_shards_in_turn_are_planned_once(text_folder, tokenizer, tmp_path, monkeypatch):
    tokenize([str(text_folder)], tokenizer, tmp_path / "corpus", shard_bytes=500)
    corpus = Corpus.open(tmp_path / "corpus")
    assert 20 < corpus.num_shards <= 64
    packing, planned = BestFit(corpus, 256, 16), []
    real = bestfit.pack_shard
    monkeypatch.setattr(bestfit, "pack_shard", lambda *z: planned.append(z) or real(*z))
    for window in np.random.RandomState(0).permutation(packing.num_windows):
        packing.pieces(int(window))
    assert len(planned) <= corpus.num_shards


def test_of_equal_rests_the_first_comes_first():
    """On every machine: sorting that may exchange them does so by its instructions."""
    _, pieces = pack_shard(np.tile([5, 7], 500), 64, 1)
    starts = pieces[:, 1]
    for length in (5, 7):
        own = starts[pieces[:, 2] - starts == length]
        assert len(own) == 500
        assert (np.diff(own) > 0).all()


def test_a_row_longer_than_all_text_takes_no_more_than_the_text():
    for lengths in ([100, 7, 30], []):
        wide, wider = (pack_shard(np.array(lengths, int), n, 16) for n in (256, 1 << 40))
        assert [one.tolist() for one in wide] == [other.tolist() for other in wider]


@pytest.mark.parametrize(("seq_len", "align"), [(256, 16), (4096, 64)])
def test_rows_hold_documents_with_their_labels(corpus, documents, seq_len, align):
    seen, labels, starts_at = [], 0, set()
    by_content = {tuple(document): number for number, document in enumerate(documents)}
    for batch in evaluation_batches(
        corpus, seq_len=seq_len, batch_size=4, packing="best-fit", align=align
    ):
        labels += batch.num_valid
        for tokens, wanted, starts in zip(
            batch.tokens.tolist(), batch.labels.tolist(), batch.document_starts, strict=True
        ):
            columns = starts.nonzero()[:, 0].tolist()
            starts_at |= {column % align for column in columns}
            for begin, end in zip([0, *columns], [*columns, seq_len], strict=True):
                part = [t for t in tokens[begin:end] if t != corpus.pad_id]
                pairs = list(zip(part, wanted[begin:end], strict=False))
                assert all(n == p for (_, n), p in zip(pairs, part[1:], strict=False))
                if part and part[0] == corpus.bos_id and part[-1] == corpus.eos_id:
                    seen.append(by_content[tuple(part)])
                    assert pairs[-1][1] == IGNORE
    assert labels == corpus.num_tokens - corpus.num_documents
    assert sorted(seen) == [n for n, d in enumerate(documents) if len(d) <= seq_len]
    assert starts_at == {0}


def test_a_rest_after_other_text_is_a_start(corpus):
    rests = 0
    for batch in evaluation_batches(
        corpus, seq_len=256, batch_size=4, packing="best-fit", align=16
    ):
        at_bos = batch.tokens == corpus.bos_id
        assert (batch.document_starts | ~at_bos).all()
        extra = batch.document_starts & ~at_bos
        assert not extra[:, 0].any()
        rests += int(extra.sum())
    assert rests > 3


def test_a_rest_after_another_row_of_the_stream_is_a_start(corpus):
    options = {"packing": "best-fit", "align": 16, "prefetch": 0, "order": "stream"}
    loader = Loader(corpus, seq_len=256, batch_size=1, seed=0, **options)
    packing = BestFit(corpus, 256, 16)
    rests, ended = 0, -1
    for window in range(packing.num_windows):
        starts = next(loader).document_starts[0]
        pieces = packing.pieces(window)
        at_bos = corpus.read(pieces[0][1], pieces[0][1] + 1)[0] == corpus.bos_id
        assert bool(starts[0]) == (at_bos or pieces[0][1] != ended)
        rests += bool(starts[0]) and not at_bos
        column, start, stop = pieces[-1]
        ended = min(stop, start + 256 - column)
    assert rests > 3


def test_counted_ahead_or_when_needed_is_the_same(copied, second_folder, tmp_path, capsys):
    corpus = Corpus.open(copied)
    before = BestFit(corpus, 256, 16)
    assert cli.main(["pack", str(copied), "--seq-len", "256", "--align", "16"]) == 0
    assert "of them padding" in capsys.readouterr().out
    assert plan_path(corpus, 256, 16).exists()
    after = BestFit(corpus, 256, 16)
    assert after.num_windows == before.num_windows == sum(plan_windows(corpus, 256, 16))
    assert [after.pieces(n) for n in range(9)] == [before.pieces(n) for n in range(9)]
    other = Corpus.open(shutil.copytree(second_folder, tmp_path / "second"))
    assert sum(plan_windows(other, 256, 16)) != before.num_windows
    shutil.copy(plan_path(other, 256, 16), plan_path(corpus, 256, 16))
    assert BestFit(corpus, 256, 16).num_windows == before.num_windows
    assert cli.main(["pack", str(copied), "--seq-len", "250"]) == 2


def test_damaged_counts_are_counted_again(copied):
    corpus = Corpus.open(copied)
    counts = plan_windows(corpus, 256, 16)
    path = plan_path(corpus, 256, 16)
    written = path.read_bytes()
    note = json.loads(written)
    plan_windows(corpus, 512, 16)
    damaged = [
        b"[1]",
        b"[" * 100_000,
        *(
            json.dumps({**note, "windows": windows}).encode()
            for windows in (None, "rows", counts[:-1], [counts[0] - 1, *counts[1:]])
        ),
        plan_path(corpus, 512, 16).read_bytes(),
        *(
            written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :]
            for at in range(0, len(written) - 1, 5)
        ),
    ]
    for data in damaged:
        path.write_bytes(data)
        packing = BestFit(corpus, 256, 16)
        assert packing.num_windows == sum(counts)
        packing.pieces(packing.num_windows - 1)


def test_ranks_and_resume(corpus):
    options = {"seq_len": 256, "seed": 0, "packing": "best-fit", "align": 16, "prefetch": 0}
    one = Loader(corpus, batch_size=6, **options)
    whole = [next(one).tokens.tolist() for _ in range(8)]
    ranks = [Loader(corpus, batch_size=6, dp_rank=r, dp_size=4, **options) for r in range(4)]
    assert [[row for r in ranks for row in next(r).tokens.tolist()] for _ in range(4)] == whole[:4]
    other = Loader(corpus, batch_size=6, **options)
    other.load_state_dict(ranks[2].state_dict())
    assert next(other).tokens.tolist() == whole[4]
