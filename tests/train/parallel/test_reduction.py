"""Where shares of a sum are that some levels keep on the CPU and others on a GPU (here: meta)."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from train.parallel import reduction
from train.parallel.ranks import Ranks
from train.parallel.reduction import GradientReduction


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
