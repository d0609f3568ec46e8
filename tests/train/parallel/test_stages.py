"""Layers over pipeline stages: contiguous, complete, and as even as they can be."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from hope import CMSConfig, HopeConfig, LevelConfig
from train.parallel.stages import layer_costs, split_layers, stages_of_rank


def cost_of(split: list[range], costs: list[float], head: float) -> float:
    stages = [sum(costs[layer] for layer in one) for one in split]
    stages[-1] += head
    return max(stages)


def every_split(layers: int, stages: int) -> list[list[range]]:
    found = []
    for cuts in combinations(range(1, layers), stages - 1):
        edges = (0, *cuts, layers)
        found.append([range(a, b) for a, b in pairwise(edges)])
    return found


@pytest.mark.parametrize("seed", range(30))
def test_no_other_split_is_more_even(seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randint(1, 9)
    stages = rng.randint(1, layers)
    costs = [float(rng.randint(1, 20)) for _ in range(layers)]
    head = float(rng.choice((0, 5, 40)))
    split = split_layers(costs, head, stages)
    assert [layer for one in split for layer in one] == list(range(layers))
    assert len(split) == stages
    assert min(map(len, split)) >= 1
    best = min(cost_of(one, costs, head) for one in every_split(layers, stages))
    assert cost_of(split, costs, head) == best


def test_a_costly_head_takes_layers_from_the_last_stage() -> None:
    levels = (LevelConfig(name="a", hidden_size=64),)
    config = HopeConfig(
        vocab_size=4000, dim=64, num_layers=7, num_heads=4, cms=CMSConfig(levels=levels)
    )
    costs, head = layer_costs(config, 256)
    assert head == 6 * 64 * 4000
    assert len(set(costs)) == 1
    assert [len(one) for one in split_layers([1.0] * 5, 0.0, 2)] == [3, 2]  # the first, if either
    sizes = [len(one) for one in split_layers(costs, head, 3)]
    assert sum(sizes) == 7
    assert sizes[2] < sizes[1] <= sizes[0]


def test_a_hybrid_is_split_by_what_its_layers_cost() -> None:
    levels = (LevelConfig(name="a", hidden_size=64),)
    config = HopeConfig(
        vocab_size=32,
        dim=64,
        num_layers=6,
        num_heads=4,
        pattern=("attention", "attention", "attention", "titans", "titans", "titans"),
        cms=CMSConfig(levels=levels),
    )
    costs, head = layer_costs(config, 64)
    assert costs[0] < costs[-1]
    first, second = split_layers(costs, head, 2)
    assert len(first) > len(second)


@pytest.mark.parametrize(
    ("schedule", "pp", "per_rank"),
    [("1f1b", 4, 1), ("interleaved", 3, 2), ("zero-bubble", 2, 3), ("zbv", 4, 2)],
)
def test_every_stage_is_on_one_rank(schedule: str, pp: int, per_rank: int) -> None:
    owned = [stages_of_rank(rank, pp, per_rank, schedule) for rank in range(pp)]
    assert sorted(stage for one in owned for stage in one) == list(range(pp * per_rank))
    assert all(one == sorted(one) for one in owned)
