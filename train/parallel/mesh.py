"""The ranks of a job along its axes: who shares what with whom.

The axes, slowest-varying first: pp, dp_replicate, dp_shard, cp, tp. So tensor-parallel ranks, which
talk most, are neighbours on one machine. FSDP2 shards over dp_shard x cp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.parallel.layout import Layout
from train.parallel.ranks import Ranks, current_device

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass
class Mesh:
    """This rank's groups.

    world: every rank; data: ranks that read different rows; reduce: ranks that hold the same
    parameters (whole, or the same part of them) and see different tokens, data x cp; cp, tp, pp:
    ranks along that axis. devices: the torch mesh (pp, replicate, shard, tp), None for one process.
    Whoever needs another layout makes another mesh: what is cut out of `devices` is kept.
    """

    layout: Layout
    world: Ranks
    data: Ranks = field(default_factory=Ranks.alone)
    reduce: Ranks = field(default_factory=Ranks.alone)
    cp: Ranks = field(default_factory=Ranks.alone)
    tp: Ranks = field(default_factory=Ranks.alone)
    pp: Ranks = field(default_factory=Ranks.alone)
    devices: DeviceMesh | None = None

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return current_device()

    @cached_property
    def fsdp(self) -> DeviceMesh | None:
        """The mesh that FSDP2 shards over, with replicas as its first axis where there are any."""
        if self.devices is None or not self.layout.sharded:
            return None
        if self.layout.dp_replicate > 1:
            return self.devices["replicate", "shard"]
        return self.devices["shard"]

    @cached_property
    def replicas(self) -> Ranks:
        """Ranks that have the same shares of parameters that FSDP2 divides, in other replicas."""
        if self.devices is None or not self.layout.sharded or self.layout.dp_replicate == 1:
            return Ranks.alone()
        return Ranks.of(self.devices["replicate"].get_group(), self.world.pulse)

    @cached_property
    def tensor(self) -> DeviceMesh | None:
        """The mesh of tensor-parallel ranks."""
        return self.devices["tp"] if self.devices is not None and self.layout.tp > 1 else None

    @property
    def owns_plain(self) -> bool:
        """Whether this rank speaks for parameters that all of `reduce` hold alike."""
        return self.reduce.rank == 0

    def pipeline_ends(self) -> dist.ProcessGroup | None:
        """A new group of the first and the last stage's rank, which have copies of tied token
        vectors; None on ranks between them. A collective call of all ranks."""
        across = self.world.size // self.layout.pp
        ends = [[n, n + across * (self.layout.pp - 1)] for n in range(across)]
        group, _ = dist.new_subgroups_by_enumeration(ends)
        return group


def alone() -> Mesh:
    """One process by itself."""
    return Mesh(Layout(), Ranks.alone())


def make_mesh(layout: Layout, world: Ranks) -> Mesh:
    """The groups of `layout`; a collective call of all its ranks."""
    if layout.world != world.size:
        raise ValueError(f"a layout of {layout.world} ranks for {world.size}")
    if world.size == 1:
        return Mesh(layout, world)
    sizes = [getattr(layout, axis) for axis in AXES]
    places = torch.arange(world.size).view(sizes)

    def along(*axes: str) -> Ranks:
        if axes == AXES or all(getattr(layout, axis) == 1 for axis in axes):
            return world if axes == AXES else Ranks.alone()
        moved = places.movedim([AXES.index(axis) for axis in axes], tuple(range(-len(axes), 0)))
        members = moved.reshape(-1, torch.Size(getattr(layout, a) for a in axes).numel()).tolist()
        if len(members) == 1:
            return world
        group, _ = dist.new_subgroups_by_enumeration(members)
        assert group is not None
        return Ranks.of(group, world.pulse)

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    devices = init_device_mesh(
        kind,
        (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp),
        mesh_dim_names=("pp", "replicate", "shard", "tp"),
    )
    return Mesh(
        layout,
        world,
        data=along("dp_replicate", "dp_shard"),
        reduce=along("dp_replicate", "dp_shard", "cp"),
        cp=along("cp"),
        tp=along("tp"),
        pp=along("pp"),
        devices=devices,
    )
