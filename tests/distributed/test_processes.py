"""The harness itself: what goes wrong on a rank is seen, not waited for."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tools.processes import run


def add(rank: int, value: float) -> torch.Tensor:
    total = torch.tensor([value + rank])
    dist.all_reduce(total)
    return total


def fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("on purpose")
    dist.barrier()


def vanish(rank: int) -> None:
    if rank == 0:
        os._exit(3)
    time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_answers(world_size: int) -> None:
    expected = world_size * 0.5 + sum(range(world_size))
    assert [float(r) for r in run(world_size, add, 0.5)] == [expected] * world_size


def test_a_failure_comes_back_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*ValueError: on purpose"):
        run(2, fail)


def test_a_death_is_noticed() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0 died without a word"):
        run(2, vanish)
    assert time.monotonic() - started < 30
