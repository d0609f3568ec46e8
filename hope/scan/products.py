"""Products of memories with tokens, into memory that is already there.

Letters: m memories, G heads and rows (see closed_form), i, j, l any widths. Operands may be
slices; what is written to is contiguous over (m, G).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Named buffers of one call, handed out again for every chunk.

    Fresh memory is slow to touch for the first time and pushes everything else out of the caches;
    the same few megabytes stay in them. Whoever asks for a name again overwrites what it held.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[tuple[object, tuple[int, ...]], Tensor] = {}
        self._turn = 0

    def __call__(self, name: object, *shape: int) -> Tensor:
        """An uninitialised or overwritable tensor of the call's dtype and device."""
        buffer = self._buffers.get((name, shape))
        if buffer is None:
            buffer = self._buffers[name, shape] = self._like.new_empty(shape)
        return buffer

    def turn(self) -> int:
        """0 and 1 in turns: a name for what must outlive the next of its kind, not the one
        after."""
        self._turn = 1 - self._turn
        return self._turn


def mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left [m, G, i, j] @ right [m, G, j, l] -> out [m, G, i, l]."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.view(-1, *out.shape[2:]))
    return out


def add_mm(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1, beta: float = 1) -> None:
    """total [m, G, i, l] = beta * total + alpha * left [m, G, i, j] @ right [m, G, j, l]."""
    total.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), beta=beta, alpha=alpha)


def by_head(z: Tensor, heads: int) -> Tensor:
    """[..., G, F, i] -> [..., N, B * F, i]: the rows of a head behind each other."""
    return z.reshape(*z.shape[:-3], heads, -1, z.shape[-1])


def over_rows(z: Tensor, heads: int) -> Tensor:
    """Sum of [m, G, o, i] over the rows of each head -> [m, N, o, i]."""
    return z.unflatten(1, (heads, -1)).sum(2)


def with_base(delta: Tensor, base: Tensor | None, out: Tensor) -> Tensor:
    """W = base + Delta: delta [m, G, o, i], base [m, N, o, i] or nothing -> out [m, G, o, i]."""
    if base is None:
        return out.copy_(delta)
    rows = (base.shape[1], -1)
    torch.add(delta.unflatten(1, rows), base.unsqueeze(2), out=out.unflatten(1, rows))
    return out
