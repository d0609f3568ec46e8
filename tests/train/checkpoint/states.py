"""Tensors like a run's, in a few kilobytes, whose levels move when they are told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import CheckpointStore
from train.parallel.ranks import Ranks

PLAIN: dict[str, Any] = {"clock": {"tokens": 1}, "evaluation": None}


def state(moved: dict[str, int] | None = None) -> dict[str, Tensor]:
    """Parameters, moments and accumulators of a fast part and two levels.

    moved: how often each of "fast", "0", "1" has moved.
    """
    moved = moved or {}
    found: dict[str, Tensor] = {}
    for part, name in (
        ("fast", "layers.0.mixer.w"),
        ("0", "layers.0.cms.levels.0.up.weight"),
        ("1", "layers.0.cms.levels.1.up.weight"),
    ):
        generator = torch.Generator().manual_seed(7 * len(name) + moved.get(part, 0))
        found[f"model/{name}"] = torch.randn(6, 5, generator=generator)
        found[f"optimizer/{name}/exp_avg"] = torch.randn(6, 5, generator=generator)
        found[f"optimizer/{name}/step"] = torch.tensor(float(moved.get(part, 0)))
    found["optimizer/layers.0.cms.levels.1.up.weight/accumulated_grad"] = torch.randn(
        6, 5, generator=torch.Generator().manual_seed(sum(moved.values()))
    )
    found["stream/0/layers.0.w1"] = torch.full((3,), 0.1 + sum(moved.values())).double()
    return found


def store_in(folder: Path | str, **settings: Any) -> CheckpointStore:
    return CheckpointStore(folder, Ranks.alone(), **settings)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
