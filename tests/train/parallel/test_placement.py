"""A rank's block of a parameter; on several ranks: `tests/distributed/test_checkpoints.py`."""

from __future__ import annotations

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from train.dry_run.build import fake_ranks
from train.parallel.placement import block, fill, placed


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (2, 4)])
def test_a_whole_of_another_shape_is_refused_and_not_cut_to_fit(shape: tuple[int, int]) -> None:
    like = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=re.escape(f"shape {list(shape)}, not [2, 3]")):
        fill(like, torch.ones(shape))
    assert not like.any()


@pytest.mark.parametrize("rank", range(6))
def test_tensor_parallelism_cuts_first_and_what_is_left_is_cut_again(rank: int) -> None:
    """Seven rows over three ranks are 3, 3 and 1; each of those over two 2 and 1, or 1 and none."""
    whole = torch.arange(35.0).view(7, 5)
    shard, tp = divmod(rank, 3)
    first = tp * 3 + min(shard * 2, (3, 3, 1)[tp])
    rows = ((2, 2, 1), (1, 1, 0))[shard][tp]
    with fake_ranks(6, rank):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("shard", "tp"))
        like = DTensor.from_local(
            torch.zeros(rows, 5), mesh, [Shard(0), Shard(0)], shape=whole.shape, stride=(5, 1)
        )
        assert block(like) == ((first, 0), (rows, 5))
        fill(like, whole)
        assert torch.equal(like.to_local(), whole[first : first + rows])


@pytest.mark.parametrize("rank", range(2))
def test_columns_of_a_whole_become_memory_of_their_own(rank: int) -> None:
    """Collectives and kernels take no view of what is wider; a tensor of another shape, such as a
    count of steps, stays whole."""
    whole = torch.arange(20.0).view(4, 5)
    with fake_ranks(2, rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        columns = (3, 2)[rank]
        like = DTensor.from_local(
            torch.zeros(4, columns), mesh, [Shard(1)], shape=whole.shape, stride=(5, 1)
        )
        own = placed(whole, like)
        assert isinstance(own, DTensor)
        assert (own.shape, own.placements) == (like.shape, like.placements)
        assert own.to_local().is_contiguous()
        assert torch.equal(own.to_local(), whole[:, 3 * rank :][:, :columns])
        count = placed(torch.tensor(7.0), like)
    assert not isinstance(count, DTensor)
    assert count == 7
