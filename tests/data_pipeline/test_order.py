import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import epoch_key, permute, shuffled, shuffled_in_groups


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_key_gives_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_huge_sizes_stay_in_range_and_never_collide(size, key, data):
    start = data.draw(st.integers(0, max(0, size - 500)))
    index = np.arange(start, min(size, start + 500))
    out = permute(index, size, key)
    assert out.min() >= 0
    assert out.max() < size
    assert len(set(out.tolist())) == len(index)


def plain_permute(index, size, key):
    """The same permutation in Python's own integers, one index at a time."""
    mask = 2**64 - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    a = next(a for a in range(int(size**0.5) - 2, size + 2) if a > 0 and a * a >= size)
    b = -(-size // a)
    while True:
        left, right = divmod(index, b)
        for r in range(8):
            round_key = mix((key + 0x9E3779B97F4A7C15 * (r + 1)) & mask)
            if r % 2 == 0:
                left = (left + ((mix(right ^ round_key) >> 32) * a >> 32)) % a
            else:
                right = (right + ((mix(left ^ round_key) >> 32) * b >> 32)) % b
        index = left * b + right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 65537, 10**12, 10**12 + 39])
def test_agrees_with_plain_integers(size):
    index = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
    for key in (0, 1, 2**64 - 1, 0x0123456789ABCDEF):
        expected = [plain_permute(int(i), size, key) for i in index]
        assert permute(index, size, key).tolist() == expected


def test_a_key_per_index_is_the_same_as_one_by_one():
    rng = np.random.default_rng(0)
    index, size = rng.integers(0, 777, 200), 777
    keys = rng.integers(0, 2**64, 200, dtype=np.uint64)
    expected = [permute(index[i : i + 1], size, int(keys[i]))[0] for i in range(200)]
    assert permute(index, size, keys).tolist() == expected


def test_shuffle_looks_random():
    size, keys = 4096, range(40)
    chi_squared, adjacent = [], []
    for key in keys:
        out = permute(np.arange(size), size, epoch_key(key, 0, "f", 0))
        cells = np.histogram2d(np.arange(size), out, bins=16)[0]
        chi_squared.append(((cells - 16) ** 2 / 16).sum())
        adjacent.append((np.abs(np.diff(out)) == 1).sum() / 2)
    assert 205 < np.mean(chi_squared) < 245  # 225 is expected of a uniform permutation
    assert 0.6 < np.mean(adjacent) < 1.4  # 1.0 is expected


def test_epochs_seeds_and_corpora_differ():
    draws = np.arange(300)
    base = shuffled(draws, 100, 1, 0, "f")
    first, second, third = base[:100].tolist(), base[100:200].tolist(), base[200:].tolist()
    orders = [first, second, third]
    orders += [shuffled(draws[:100], 100, *key).tolist() for key in [(2, 0, "f"), (1, 1, "f")]]
    orders.append(shuffled(draws[:100], 100, 1, 0, "g").tolist())
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert shuffled(draws[:100], 100, 2, 0, "f").tolist() != second  # seed + epoch would collide


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**40))
def test_groups_give_a_new_permutation_in_every_epoch(size, chunk, group_chunks, epoch):
    draws = np.arange(epoch * size, (epoch + 2) * size)
    out = shuffled_in_groups(draws, size, 0, 0, "f", chunk, group_chunks)
    first, second = out[:size], out[size:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(size))
    some = np.random.default_rng(epoch).integers(0, 2 * size, 30)
    alone = [
        shuffled_in_groups(draws[i : i + 1], size, 0, 0, "f", chunk, group_chunks) for i in some
    ]
    assert np.concatenate(alone).tolist() == out[some].tolist()
    assert size < 30 or first.tolist() != second.tolist()


def test_groups_stay_together_and_are_mixed():
    size, chunk, group_chunks = 100_000, 50, 8
    out = shuffled_in_groups(np.arange(size), size, 7, 0, "f", chunk, group_chunks)
    groups = out.reshape(-1, chunk * group_chunks)
    assert {len(np.unique(group // chunk)) for group in groups} == {group_chunks}
    order = [np.argsort(group, kind="stable").tolist() for group in groups[:20]]
    assert len(set(map(tuple, order))) == 20
    assert len({tuple(group % chunk) for group in groups[:20]}) == 20
    adjacent = (np.abs(np.diff(out)) == 1).mean() * chunk * group_chunks / 2
    assert 0.8 < adjacent < 1.2
    first_chunks = groups[:, 0] // chunk
    assert abs(np.corrcoef(first_chunks, np.arange(len(first_chunks)))[0, 1]) < 0.2
