"""Which layers each pipeline stage has, and which stages each rank."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch

from hope import HopeConfig, HopeModel
from train.parallel.config import ParallelConfig
from train.parallel.mesh import Mesh


def stages_of_rank(rank: int, pp: int, per_rank: int, schedule: str) -> list[int]:
    """The stages on one of the pp ranks: every pp-th one; with "zbv" down a V and up again."""
    if schedule == "zbv":
        return [rank, 2 * pp - 1 - rank]
    return [rank + number * pp for number in range(per_rank)]


def layer_costs(config: HopeConfig, seq_len: int) -> tuple[list[float], float]:
    """(operations per token of each layer, of the head), forward and backward."""
    with torch.device("meta"):
        model = HopeModel(config, seed=None)
    layers = [float(sum(layer.flops_per_token(seq_len))) for layer in model.layers]  # type: ignore[operator]
    return layers, float(sum(model.flops_per_token(seq_len))) - sum(layers)


def split_layers(costs: list[float], head: float, stages: int) -> list[range]:
    """Consecutive layers for each stage, at least one, so that the costliest costs least.

    The head belongs to the last stage; token vectors cost nothing. Of equal splits the one whose
    earlier stages are fuller: later ones hold fewer micro-batches.
    """
    total = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return sums[total] - sums[first] + head, (total,)
        found: tuple[float, tuple[int, ...]] | None = None
        for cut in range(total - left + 1, first, -1):
            rest, cuts = best(cut, left - 1)
            worst = max(sums[cut] - sums[first], rest)
            if found is None or worst < found[0]:
                found = (worst, (cut, *cuts))
        assert found is not None
        return found

    cuts = (0, *best(0, stages)[1])
    return [range(a, b) for a, b in pairwise(cuts)]


def layers_of_rank(
    config: HopeConfig, parallel: ParallelConfig, mesh: Mesh, seq_len: int
) -> list[range]:
    """The layers of each stage that this rank has."""
    pp, per_rank = mesh.layout.pp, mesh.layout.stages_per_rank
    if pp == 1:
        return [range(config.num_layers)]
    costs, head = layer_costs(config, seq_len)
    split = split_layers(costs, head, pp * per_rank)
    return [split[s] for s in stages_of_rank(mesh.pp.rank, pp, per_rank, parallel.schedule)]
