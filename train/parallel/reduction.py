"""Adding gradients over data-parallel ranks: whole at once, or in shares put together later.

A rank's share of a tensor is a run of consecutive rows, ceil(rows / ranks) of them, fewer or none
for the last ranks: `torch.chunk`, and what DTensor calls Shard(0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from train.parallel.placement import local
from train.parallel.ranks import Ranks

# Under these names from torch 2.13 on, which warns of the older ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

BUCKET_ELEMENTS = 8 * 1024 * 1024


class GradientReduction:
    """Sums over data-parallel ranks that each hold whole parameters.

    A gradient that is a DTensor comes reduced, from the engine that sharded its parameter (FSDP2),
    and passes through everything here as it is; so does every gradient of a single rank. Sums are
    formed in float32 (float64 for float64), in buckets of at most 8 Mi elements or one tensor.
    """

    def __init__(self, ranks: Ranks, world: Ranks | None = None) -> None:
        """ranks: those that hold the same parameters; world: all of the job (default: the same)."""
        self.ranks, self.world = ranks, world or ranks
        self._meshes: dict[str, DeviceMesh] = {}

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether the ranks have parts of this gradient's sum that are still to be added."""
        return self.ranks.size > 1 and not isinstance(tensor, DTensor)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks (all-reduce)."""
        shared = [tensor for tensor in tensors if self.is_shared(tensor)]
        for bucket in _buckets(shared, [tensor.numel() for tensor in shared]):
            flat = torch.cat([tensor.reshape(-1).to(_precise(tensor)) for tensor in shared[bucket]])
            with self.ranks.pulse.collective("all_reduce of gradients"):
                dist.all_reduce(flat, group=self.ranks.group)
            sizes = [tensor.numel() for tensor in shared[bucket]]
            for tensor, part in zip(shared[bucket], flat.split(sizes), strict=True):
                tensor.copy_(part.view_as(tensor))

    def scatter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's share of the sum of each tensor (reduce-scatter)."""
        shared = [tensor for tensor in tensors if self.is_shared(tensor)]
        buckets = _buckets(shared, [tensor.numel() for tensor in shared])
        found = iter([share for bucket in buckets for share in self._scatter(shared[bucket])])
        return [next(found) if self.is_shared(tensor) else tensor for tensor in tensors]

    def gather(self, shares: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Whole tensors of `shapes` from every rank's shares (all-gather)."""
        pairs = zip(shares, shapes, strict=True)
        mine = [(share, shape) for share, shape in pairs if self.is_shared(share)]
        own, wanted = [share for share, _ in mine], [shape for _, shape in mine]
        buckets = _buckets(own, [prod(shape) for shape in wanted])
        found = iter([w for bucket in buckets for w in self._gather(own[bucket], wanted[bucket])])
        return [next(found) if self.is_shared(share) else share for share in shares]

    def share(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that every rank has whole; a copy."""
        if not self.is_shared(whole):
            return whole
        rows, first = self._rows(whole.shape)
        return whole[first : first + rows].clone()

    def as_dtensor(self, share: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of `shape` of which this is a share, so that a checkpoint sees one tensor."""
        if not self.is_shared(share):
            return share
        kind = share.device.type  # a mesh of another one would move the share there
        if kind not in self._meshes:
            self._meshes[kind] = _mesh_of(self.ranks, kind)
        stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return DTensor.from_local(share, self._meshes[kind], [Shard(0)], shape=shape, stride=stride)

    def _rows(self, shape: torch.Size, rank: int | None = None) -> tuple[int, int]:
        """(rows, first row) of a rank's share of a tensor of `shape`."""
        rank = self.ranks.rank if rank is None else rank
        most = _share_rows(shape, self.ranks.size)
        first = min(rank * most, shape[0])
        return min(most, shape[0] - first), first

    def _scatter(self, bucket: list[Tensor]) -> list[Tensor]:
        size = self.ranks.size
        lengths = [_share_elements(tensor.shape, size) for tensor in bucket]
        dtype, device = _precise(bucket[0]), bucket[0].device
        everything = torch.zeros(size, sum(lengths), dtype=dtype, device=device)
        for tensor, part in zip(bucket, everything.split(lengths, dim=1), strict=True):
            for rank in range(size):
                rows, first = self._rows(tensor.shape, rank)
                flat = tensor[first : first + rows].reshape(-1)
                part[rank, : flat.numel()].copy_(flat)
        own = torch.empty(sum(lengths), dtype=dtype, device=device)
        with self.ranks.pulse.collective("reduce_scatter of gradients"):
            _reduce_scatter(own, everything.view(-1), group=self.ranks.group)
        shares = []
        for tensor, part in zip(bucket, own.split(lengths), strict=True):
            rows, _ = self._rows(tensor.shape)
            shape = (rows, *tensor.shape[1:])
            shares.append(part[: prod(shape)].view(shape))
        return shares

    def _gather(self, shares: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        size = self.ranks.size
        lengths = [_share_elements(shape, size) for shape in shapes]
        own = torch.zeros(sum(lengths), dtype=shares[0].dtype, device=shares[0].device)
        for share, part in zip(shares, own.split(lengths), strict=True):
            part[: share.numel()].copy_(share.reshape(-1))
        everything = own.new_empty(size * own.numel())
        with self.ranks.pulse.collective("all_gather of gradients"):
            _all_gather(everything, own, group=self.ranks.group)
        whole = []
        for shape, part in zip(
            shapes, everything.view(size, -1).split(lengths, dim=1), strict=True
        ):
            padded = part.reshape(size * _share_rows(shape, size), *shape[1:])
            whole.append(padded[: shape[0]].contiguous())
        return whole


class ReplicaReduction(GradientReduction):
    """Sums over replicas whose ranks have shares of the parameters: of each rank its own share.

    For levels with reduce: at_update under FSDP2, which has added them up within a replica only.
    """

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether the replicas have parts of this gradient's sum that are still to be added."""
        return self.ranks.size > 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace this rank's share of every tensor by its sum over the replicas (all-reduce)."""
        super().add([local(tensor) for tensor in tensors])


def _mesh_of(ranks: Ranks, kind: str) -> DeviceMesh:
    if ranks.group is None:
        return init_device_mesh(kind, (ranks.size,))
    return DeviceMesh.from_group(ranks.group, kind)


def _share_rows(shape: torch.Size, size: int) -> int:
    """Rows of the largest share."""
    return -(-shape[0] // size)


def _share_elements(shape: torch.Size, size: int) -> int:
    return _share_rows(shape, size) * prod(shape[1:])


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _buckets(tensors: list[Tensor], elements: list[int]) -> Iterator[slice]:
    """Runs of tensors of one dtype that together have at most BUCKET_ELEMENTS, or of one tensor.

    elements: the size of each, the same on all ranks, whatever their shares.
    """
    cuts, held = [0], 0
    for number, (tensor, size) in enumerate(zip(tensors, elements, strict=True)):
        other = number > 0 and _precise(tensor) != _precise(tensors[number - 1])
        if number > cuts[-1] and (held + size > BUCKET_ELEMENTS or other):
            cuts.append(number)
            held = 0
        held += size
    for first, last in pairwise([*cuts, len(tensors)]):
        if first < last:
            yield slice(first, last)
