"""A rank's block of a parameter; on several ranks: `tests/distributed/test_checkpoints.py`."""

from __future__ import annotations

import re

import pytest
import torch

from train.parallel.placement import fill


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (2, 4)])
def test_a_whole_of_another_shape_is_refused_and_not_cut_to_fit(shape: tuple[int, int]) -> None:
    like = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=re.escape(f"shape {list(shape)}, not [2, 3]")):
        fill(like, torch.ones(shape))
    assert not like.any()
