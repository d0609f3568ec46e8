"""DeepSpeed's pipeline: which ranks it takes for whose; without processes."""

from __future__ import annotations

from itertools import product

import pytest
import torch.distributed as dist

from tools.parity import make_config
from train.dry_run.build import fake_ranks
from train.parallel.layout import Layout
from train.parallel.mesh import make_mesh
from train.parallel.part import Part, cut_layers
from train.zero.pipeline import _tied, topology


def test_deepspeed_numbers_ranks_as_we_do() -> None:
    """Tensor-parallel ranks are neighbours, stages far apart: see `train.parallel.mesh`."""
    layout = Layout(pp=4, dp_replicate=3, tp=2)
    places = topology(layout)
    for rank, (stage, replica, part) in enumerate(product(range(4), range(3), range(2))):
        assert places.get_rank(pipe=stage, data=replica, model=part) == rank
    assert places.world_size() == layout.world


@pytest.mark.parametrize("rank", range(8))
def test_the_first_and_the_last_of_four_stages_share_token_vectors(rank: int) -> None:
    config = make_config("transformer", {"pp": 4, "tp": 2, "micro_batches": 4}).model
    with fake_ranks(8, rank) as ranks:
        mesh = make_mesh(Layout(pp=4, tp=2), ranks)
        part = Part(cut_layers(config, range(rank // 2, rank // 2 + 1)), range(0))
        tied = _tied(part, mesh)
        members = [dist.get_process_group_ranks(group) for _, group in tied]
    if rank in (2, 3, 4, 5):
        assert tied == []
    else:
        assert members == [[rank % 2, 6 + rank % 2]]
        assert tied[0][0] is part.model.embedding.weight
