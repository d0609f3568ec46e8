"""Where a rank's part of a parameter lies in the whole, and how to cut it out.

Tensor parallelism cuts first, by the shard plan; FSDP2 then cuts what a rank has left by rows. So a
rank's part is one block, whichever of the two cut which axis.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

TENSOR_AXIS = "tp"


class Stored(Protocol):
    """A tensor in a file, of which blocks can be read."""

    @property
    def shape(self) -> torch.Size: ...

    def block(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The block of these sizes at these offsets, on the CPU, in memory of its own."""
        ...


def in_memory(value: Tensor | Stored) -> Tensor:
    """All of a tensor, read if it is in a file."""
    if isinstance(value, Tensor):
        return value
    return value.block((0,) * len(value.shape), tuple(value.shape))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is. Gradients pass through."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cuts(like: DTensor) -> list[tuple[int, int, int]]:
    """(axis, number of parts, this rank's) of each cut, in their order."""
    mesh = like.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    found = []
    for number, (name, placement) in enumerate(zip(names, like.placements, strict=True)):
        axis = getattr(placement, "dim", None)  # Shard, and FSDP2's own kind of it
        if axis is not None and not placement.is_partial():
            where = mesh.get_local_rank(number)
            found.append((name != TENSOR_AXIS, axis, mesh.size(number), where))
    found.sort(key=lambda one: one[0])
    return [(axis, size, where) for _, axis, size, where in found]


def block(like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of this rank's part of `like` in the whole."""
    offsets, sizes = [0] * like.ndim, list(like.shape)
    if isinstance(like, DTensor):
        for axis, parts, rank in _cuts(like):
            most = -(-sizes[axis] // parts)
            begin = min(rank * most, sizes[axis])
            offsets[axis] += begin
            sizes[axis] = min(most, sizes[axis] - begin)
    return tuple(offsets), tuple(sizes)


def cut(whole: Tensor | Stored, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is to lie as `like` does: a view; of a file it reads
    no more than that part."""
    offsets, sizes = block(like)
    if not isinstance(whole, Tensor):
        return whole.block(offsets, sizes)
    for axis, (begin, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(axis, begin, size)
    return whole


def placed(whole: Tensor | Stored, like: Tensor) -> Tensor:
    """`whole` on the device of `like`, divided over the ranks as it is, if it has its shape."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return in_memory(whole).to(like.device)
    part = cut(whole, like).to(like.device).contiguous()
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def fill(like: Tensor, whole: Tensor | Stored) -> None:
    """Copy this rank's part of `whole` into `like`. ValueError where they differ in shape."""
    if whole.shape != like.shape:
        raise ValueError(f"shape {list(whole.shape)}, not {list(like.shape)}")
    local(like).copy_(cut(whole, like))
