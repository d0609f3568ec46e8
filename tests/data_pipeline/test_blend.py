from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from data_pipeline import DataError, blend
from data_pipeline.blend import Blend, Curriculum, quotas

WEIGHTS = st.lists(st.integers(0, 300), min_size=1, max_size=7).filter(any)


@settings(max_examples=150, deadline=None)
@given(WEIGHTS)
def test_exact_to_one_sample_at_every_prefix(weights):
    blend = Blend(weights)
    which, nth = blend.slots(np.arange(3 * sum(blend.shares) + 17))
    total = sum(weights)
    for k, weight in enumerate(weights):
        drawn = np.cumsum(which == k)
        ideal = np.arange(1, len(which) + 1) * weight
        assert (np.abs(drawn * total - ideal) < total).all()
        assert nth[which == k].tolist() == list(range(int(drawn[-1])))


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.integers(0, 10**15))
def test_any_slot_is_found_at_once(weights, position):
    blend = Blend(weights)
    before, after = blend.counts(position), blend.counts(position + 40)
    which, nth = blend.slots(np.arange(position, position + 40))
    assert before.sum() == position
    for k in range(len(weights)):
        assert nth[which == k].tolist() == list(range(before[k], after[k]))


def test_weights_are_the_decimals_they_are_written_as():
    assert quotas([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert quotas([3, 1.5]) == [2, 1]
    assert quotas([1e-3, 0.999]) == [1, 999]
    assert quotas([5]) == [1]


ANY_WEIGHTS = st.lists(st.floats(0.003, 1), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(ANY_WEIGHTS, st.integers(0, 10**15))
def test_exact_to_one_sample_where_no_short_period_has_the_ratios(weights, position):
    blend = Blend(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    for start, stop in ((0, 3000), (position, position + 3000)):
        counts = blend.counts(start)
        which, nth = blend.slots(np.arange(start, stop))
        for k, share in enumerate(shares):
            drawn = counts[k] + np.concatenate([[0], np.cumsum(which == k)])
            assert nth[which == k].tolist() == list(range(counts[k], drawn[-1]))
            for slot in range(0, stop - start + 1, 7):
                assert abs(int(drawn[slot]) - (start + slot) * share) < 1


SKEWED = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 900)), min_size=2, max_size=9)


@settings(max_examples=150, deadline=None)
@given(SKEWED, st.integers(1, 40))
def test_exact_to_one_sample_with_tiny_weights(weights, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "LONGEST_WAIT", 12)
        patch.setattr(blend, "_LONGEST_PERIOD", 12)
        patch.setattr(blend, "_BLOCK_SLOTS", block)
        try:
            made = Blend(weights)
        except DataError:
            reject()
        total = sum(made.shares)
        which, nth = made.slots(np.arange(total + 99))
        for k, share in enumerate(made.shares):
            drawn = np.concatenate([[0], np.cumsum(which == k)])
            assert (np.abs(drawn * total - np.arange(total + 100) * share) < total).all()
            assert nth[which == k].tolist() == list(range(int(drawn[-1])))
            for position in (1, block, total // 3, total, total + 98):
                assert made.counts(position)[k] == drawn[position]


@pytest.mark.parametrize("weights", [[0.7, 0.3, 1e-9], [1e-9, 3e-8, 1, 0.3, 2e-6], [1, 1e-15]])
def test_a_weight_of_a_thousand_millionth(weights):
    made = Blend(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    tiny = exact.index(min(exact))
    for draws in range(3):
        low, high = (-(-draw * sum(exact) // exact[tiny]) for draw in (draws, draws + 1))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if made.counts(middle)[tiny] > draws else (middle, high)
        for start in (low - 2000, low * 2):
            counts = made.counts(start)
            which, nth = made.slots(np.arange(start, start + 4000))
            for k, weight in enumerate(exact):
                drawn = counts[k] + np.concatenate([[0], np.cumsum(which == k)])
                assert nth[which == k].tolist() == list(range(counts[k], drawn[-1]))
                for slot in range(4001):
                    assert abs(int(drawn[slot]) - (start + slot) * weight / sum(exact)) < 1
        assert made.slots(np.array([low]))[0] == tiny
        assert made.slots(np.array([low]))[1] == draws


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [0, 0],
        [-1, 2],
        [float("nan")],
        [float("inf"), 1],
        [10**9, 1, 10**9, 10**-6],
        [None, 1],
        [True, 1],
    ],
)
def test_impossible_weights_are_refused(weights):
    with pytest.raises(DataError, match="weight"):
        quotas(weights)


def test_a_curriculum_goes_on_where_the_stage_before_left_each_corpus():
    stages = [(0, (3, 1)), (40, (0, 1)), (57, (1, 1)), (90, (5, 2))]
    curriculum = Curriculum(stages)
    which, nth = curriculum.slots(np.arange(200))
    for corpus in (0, 1):
        drawn = nth[which == corpus]
        assert drawn.tolist() == list(range(len(drawn)))
    for (start, weights), end in zip(stages, [40, 57, 90, 200], strict=True):
        assert which[start:end].tolist() == Blend(weights).slots(np.arange(end - start))[0].tolist()
    places = (0, 39, 40, 56, 57, 89, 90, 199)
    assert [curriculum.stage(place) for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
