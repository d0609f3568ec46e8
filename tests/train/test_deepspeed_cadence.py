"""What a rank adds up and speaks for of DeepSpeed's partitions, without DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hope.sharding import Replicate, Shard
from train.zero.cadence import Published
from train.zero.partitions import Fragment

PLAN = {"a": Replicate(), "b": Shard(0), "c": Shard(0), "d": Replicate()}


def published(tensor_rank: int, elsewhere: set[str]) -> Published:
    """A partition of ten numbers: 3 of a, 2 of b, 3 of c, 2 of d."""
    starts = zip(PLAN, (0, 3, 5, 8), (3, 2, 3, 2), strict=True)
    partitions: Any = SimpleNamespace(
        tensors=[torch.zeros(10)],
        fragments={name: Fragment(0, start, 0, size) for name, start, size in starts},
        gradients=lambda: [torch.arange(10.0)],
    )
    tensor = SimpleNamespace(get_group=lambda: None)
    mesh: Any = SimpleNamespace(tp=SimpleNamespace(rank=tensor_rank), tensor=tensor)
    return Published(partitions, mesh, 2.0, lambda: None, PLAN, {}, {"a", "d"}, elsewhere)


def test_what_a_rank_speaks_for_in_norms() -> None:
    """Of what all tensor-parallel ranks have the first; not of what another stage speaks for."""
    assert published(0, set()).runs() == [[slice(0, 10)]]
    assert published(1, set()).runs() == [[slice(3, 8)]]
    assert published(0, {"b"}).runs() == [[slice(0, 3), slice(5, 10)]]


def test_sums_over_tensor_parallel_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of replicated parameters alone; averages become sums, of every number."""
    monkeypatch.setattr(dist, "all_reduce", lambda line, group: line.mul_(10))
    (found,) = published(0, set()).gradients()
    assert found.tolist() == [0, 20, 40, 6, 8, 10, 12, 14, 160, 180]
