"""Muon, M3, AdamW and SGD on sharded parameters against one process."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tools.processes import run
from train.optim.build import elementwise
from train.optim.config import OptimizerConfig, OptimizerName, SGDConfig
from train.optim.m3 import M3
from train.optim.muon import Muon

Placements = list[Any]


def make(name: str, parameter: Tensor) -> torch.optim.Optimizer:
    if name == "muon":
        return Muon([parameter], lr=0.02, weight_decay=0.1)
    if name in ("adamw", "sgd"):
        kind: OptimizerName = "adamw" if name == "adamw" else "sgd"
        config = OptimizerConfig(name=kind, lr=0.02, sgd=SGDConfig(momentum=0.9))
        groups: list[dict[str, object]] = [{"params": [parameter], "weight_decay": 0.1}]
        return elementwise(kind, groups, config.level("fast"), config)
    variant: Any = name.removeprefix("m3-")
    return M3([parameter], lr=0.01, eps=1e-2, weight_decay=0.1, variant=variant, slow_every_steps=2)


def whole(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alone(name: str, shape: tuple[int, ...]) -> Tensor:
    parameter = nn.Parameter(whole(shape, 0))
    optimizer = make(name, parameter)
    for step in range(1, 6):
        parameter.grad = whole(shape, step)
        optimizer.step()
    return parameter.detach()


def sharded(
    rank: int, name: str, shape: tuple[int, ...], mesh_shape: tuple[int, ...], where: Placements
) -> Tensor:
    mesh = init_device_mesh("cpu", mesh_shape)
    parameter = nn.Parameter(distribute_tensor(whole(shape, 0), mesh, where))
    optimizer = make(name, parameter)
    for step in range(1, 6):
        parameter.grad = distribute_tensor(whole(shape, step), mesh, where)
        optimizer.step()
        kept = [value for value in optimizer.state[parameter].values() if value.shape == shape]
        assert kept
        assert all(isinstance(v, DTensor) and v.placements == tuple(where) for v in kept)
    return parameter.full_tensor().detach()


LAYOUTS = [
    ((6, 10), (2,), [Shard(0)]),
    ((7, 10), (2,), [Shard(0)]),
    ((7, 5), (3,), [Shard(0)]),
    ((2, 9), (3,), [Shard(0)]),  # one rank has nothing
    ((6, 10), (2,), [Shard(1)]),
    ((5, 7), (3,), [Shard(1)]),
    ((6, 10), (2,), [Replicate()]),
    ((5, 4, 6), (2,), [Shard(0)]),  # whole matrices on each rank
    ((4, 3, 6), (3,), [Shard(1)]),
    ((2, 4, 3, 6), (2,), [Shard(1)]),
    ((6, 10), (2, 2), [Shard(0), Shard(1)]),
    ((6, 10), (2, 2), [Replicate(), Shard(0)]),
    ((5, 4, 6), (2, 2), [Shard(0), Shard(2)]),
]


@pytest.mark.parametrize(("shape", "mesh", "where"), LAYOUTS)
def test_layouts(shape: Any, mesh: Any, where: Placements) -> None:
    ranks = 1
    for size in mesh:
        ranks *= size
    for name in ("muon", "m3-paper", "m3-ema", "adamw", "sgd"):
        expected = alone(name, shape)
        for found in run(ranks, sharded, name, shape, mesh, where):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_random_layouts(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(2, 4)))
    where = [Shard(rng.randrange(len(shape)))]
    ranks = rng.randint(2, 4)
    name = rng.choice(("muon", "m3-ema"))
    expected = alone(name, shape)
    for found in run(ranks, sharded, name, shape, (ranks,), where):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
