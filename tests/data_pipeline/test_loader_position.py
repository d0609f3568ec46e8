"""Where a loader stands: resuming, seeking, states that are refused."""

import json
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import Corpus, DataError
from tests.data_pipeline.rows import (
    ALIGN,
    PACKINGS,
    Endless,
    expected_rows,
    make,
    rows_of,
    take,
)


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
