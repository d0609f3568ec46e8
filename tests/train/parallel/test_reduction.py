"""Shares of a sum: what they hold, and where they are (a GPU is meta here); without processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.parallel import reduction
from train.parallel.ranks import Ranks
from train.parallel.reduction import GradientReduction, ReplicaReduction


def test_a_checkpoint_moves_no_share_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may have no room for what is kept off it."""
    monkeypatch.setattr(reduction, "_mesh_of", lambda ranks, kind: kind)
    monkeypatch.setattr(DTensor, "from_local", lambda share, mesh, *_, **__: (share.device, mesh))
    ranks = Ranks.alone()
    ranks.size = 2
    sums = GradientReduction(ranks)
    for device in ("meta", "cpu", "meta"):
        share = torch.empty(2, 3, device=device)
        assert sums.as_dtensor(share, torch.Size((4, 3))) == (torch.device(device), device)


@pytest.mark.parametrize(
    ("sizes", "double", "runs"),
    [
        ([], "", []),
        ([4, 6, 1], "", [(0, 2), (2, 3)]),
        ([4, 7], "", [(0, 1), (1, 2)]),
        ([4, 6, 4, 6, 9, 1], "", [(0, 2), (2, 4), (4, 6)]),
        ([3, 99, 3, 3], "", [(0, 1), (1, 2), (2, 4)]),
        ([1, 1, 1, 1], "_xx_", [(0, 1), (1, 3), (3, 4)]),
    ],
)
def test_buckets_hold_so_much_and_one_dtype(
    sizes: list[int], double: str, runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "BUCKET_ELEMENTS", 10)
    kinds = [torch.float64 if one == "x" else torch.float32 for one in double.ljust(len(sizes))]
    tensors = [torch.empty(size, dtype=kind) for size, kind in zip(sizes, kinds, strict=True)]
    found = [(run.start, run.stop) for run in reduction._buckets(tensors, sizes)]
    assert found == runs


SHAPES = [(7, 2), (3,), (1, 4), (6,)]


def test_shares_are_of_the_sum_and_make_up_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks one after the other, with a sum that is four times what each has."""
    size = 4
    whole = [torch.rand(shape, dtype=torch.float64) for shape in SHAPES]
    before = [tensor.clone() for tensor in whole]
    sums, lines = [], []
    for rank in range(size):
        ranks = Ranks.alone()
        ranks.size, ranks.rank = size, rank
        sums.append(GradientReduction(ranks))

        def reduce_scatter(own: Tensor, everything: Tensor, group: None, rank: int = rank) -> None:
            own.copy_(everything.view(size, -1)[rank] * size)

        monkeypatch.setattr(reduction, "_reduce_scatter", reduce_scatter)
        shares = sums[rank].scatter(whole)
        for tensor, share in zip(whole, shares, strict=True):
            rows = [*tensor.split(-(-len(tensor) // size)), *[tensor[:0]] * size][rank]
            assert torch.equal(share, size * rows)
            own = sums[rank].share(tensor)
            assert torch.equal(own, rows)
            own.zero_()
        lines.append(shares)
    assert all(map(torch.equal, whole, before))
    sent: list[Tensor] = []
    monkeypatch.setattr(reduction, "_all_gather", lambda _, own, group: sent.append(own.clone()))
    shapes = [tensor.shape for tensor in whole]
    for rank in range(size):
        sums[rank].gather(lines[rank], shapes)
    monkeypatch.setattr(reduction, "_all_gather", lambda out, _, group: out.copy_(torch.cat(sent)))
    for tensor, found in zip(whole, sums[0].gather(lines[0], shapes), strict=True):
        assert torch.equal(found, size * tensor)


def test_one_replica_has_nothing_to_add() -> None:
    """Its shares are not parts of a sum; of two they are, whole or not."""
    alone, two = Ranks.alone(), Ranks.alone()
    two.size = 2
    gradient = torch.ones(2)
    assert not ReplicaReduction(alone).is_shared(gradient)
    assert ReplicaReduction(two).is_shared(gradient)
    ReplicaReduction(alone).add([gradient])  # no process group is asked
    assert gradient.eq(1).all()
