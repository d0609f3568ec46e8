"""Reading M_mem for the tokens of a projection chunk, and the derivative (Eqs. 83, 86, 90)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope.scan.closed_form import Frame, from_blocks, gelu_slope, to_blocks
from hope.scan.contract import MEM
from hope.scan.products import Scratch
from hope.scan.writes import Memories, Written
from hope.scan.writes_backward import ReadGradient


class Blocks(NamedTuple):
    """M_mem over the n blocks of a tile, [n, G, ...] each: its Delta at each block's start, its U
    (no u2 where W2 is not written) and its W1 keys."""

    delta1: Tensor
    delta2: Tensor
    u1: Tensor
    u2: Tensor | None
    e1: Tensor


def stack_blocks(written: list[Written], c: int) -> Blocks:
    """Put the blocks of consecutive writes behind each other."""

    def stack(lists: list[list[Tensor]]) -> Tensor:
        blocks = [block[MEM] for blocks in lists for block in blocks]
        return blocks[0].unsqueeze(0) if len(blocks) == 1 else torch.stack(blocks)

    return Blocks(
        stack([[delta.w1 for delta in w.deltas[:-1]] for w in written]),
        stack([[delta.w2 for delta in w.deltas[:-1]] for w in written]),
        stack([w.u1 for w in written]),
        stack([w.u2 for w in written]) if written[0].u2 else None,
        torch.cat([to_blocks(w.e_mem, c) for w in written]),
    )


def _base_mm(z: Tensor, base: Tensor) -> Tensor:
    """z [n, G, c, i] @ base [N, i, o] of each head -> [n, G, c, o]."""
    heads, inner, outer = base.shape
    return (z.view(z.shape[0], heads, -1, inner) @ base).view(*z.shape[:3], outer)


def _base_outer(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """Sum over rows and tokens of left^T right: [n, G, c, o], [n, G, c, i] -> [N, o, i]."""
    left = left.view(left.shape[0], heads, -1, left.shape[-1])
    right = right.view(right.shape[0], heads, -1, right.shape[-1])
    return (left.mT @ right).sum(0)


class CausalRead(NamedTuple):
    """A causal read's intermediate values, [n, G, c, ...] each.

    q_prev: decayed queries; across2, across1: ratio * (q k^T), where there is a u2, and
    ratio * (act e1^T); act, slope: of the hidden layer.
    """

    q: Tensor
    q_prev: Tensor
    across1: Tensor
    across2: Tensor | None
    act: Tensor
    act_prev: Tensor
    slope: Tensor


def read_causal(
    frame: Frame, blocks: Blocks, q: Tensor, base: Memories | None, scratch: Scratch
) -> tuple[Tensor, CausalRead]:
    """M_mem of each token's predecessor applied to q [G, F, d] -> out [G, F, d] (Eq. 83).

    base: M_mem's, w1 [N, d, h] and w2 [N, h, d].
    """
    q = to_blocks(q, frame.k.shape[2])
    q_prev = q * frame.prev
    z = q_prev @ blocks.delta2.mT
    across2 = None
    if blocks.u2 is not None:
        across2 = (q @ frame.k.mT).mul_(frame.ratio)
        z -= across2 @ blocks.u2
    if base is not None:
        z += _base_mm(q, base.w2.mT)
    act, slope = (t.clone() for t in gelu_slope(z, scratch))
    act_prev = act * frame.prev
    across1 = (act @ blocks.e1.mT).mul_(frame.ratio)
    out = (act_prev @ blocks.delta1.mT).sub_(across1 @ blocks.u1).add_(q)
    if base is not None:
        out += _base_mm(act, base.w1.mT)
    return from_blocks(out), CausalRead(q, q_prev, across1, across2, act, act_prev, slope)


def read_causal_backward(
    frame: Frame,
    blocks: Blocks,
    read: CausalRead,
    base: Memories | None,
    d_base: Memories,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, ReadGradient]:
    """Derivative of `read_causal` from d_out [G, F, d]: (dq, dk, into the blocks).

    The gradients of the base at fixed states W are added to d_base.
    """
    d_out = to_blocks(d_out, frame.k.shape[2])

    d_across = (d_out @ blocks.u1.mT).neg_().mul_(frame.ratio)
    d_act = (d_out @ blocks.delta1).mul_(frame.prev).add_(d_across @ blocks.e1)
    rows = (d_act * read.act).sum(-1)
    d_e = d_across.mT @ read.act
    d_u1 = (read.across1.mT @ d_out).neg_()
    d_w1 = d_out.mT @ read.act_prev
    if base is not None:
        d_act += _base_mm(d_out, base.w1)
        d_base.w1.add_(_base_outer(d_out, read.act * frame.prev_lost, base.w1.shape[0]))

    dz = d_act.mul_(read.slope)
    dq = (dz @ blocks.delta2).mul_(frame.prev)
    if blocks.u2 is None or read.across2 is None:
        dk, d_u2 = torch.zeros_like(dq), dz  # there is no u2 to take it
    else:
        d_across = (dz @ blocks.u2.mT).neg_().mul_(frame.ratio)
        dq += d_across @ frame.k
        dk = d_across.mT @ read.q
        d_u2 = (read.across2.mT @ dz).neg_()
    rows += (dq * read.q).sum(-1)
    d_w2 = dz.mT @ read.q_prev
    if base is not None:
        dq += _base_mm(dz, base.w2)
        d_base.w2.add_(_base_outer(dz, read.q * frame.prev_lost, base.w2.shape[0]))
    into = ReadGradient(d_u1, d_u2, d_w1, d_w2, d_e, rows)
    return from_blocks(dq.add_(d_out)), from_blocks(dk), into


class StartRead(NamedTuple):
    """A chunk-start read's queries, activations and their slopes, [G, F, ...] each."""

    q: Tensor
    act: Tensor
    slope: Tensor


def read_start(frozen: Memories, q: Tensor, scratch: Scratch) -> tuple[Tensor, StartRead]:
    """M_mem of the memory chunk's start (w1 [G, d, h], w2 [G, h, d]) applied to q [G, F, d]
    -> out [G, F, d] (Eq. 90)."""
    act, slope = (t.clone() for t in gelu_slope(q @ frozen.w2.mT, scratch))
    return torch.baddbmm(q, act, frozen.w1.mT), StartRead(q, act, slope)


def read_start_backward(
    frozen: Memories, read: StartRead, d_out: Tensor, d_frozen: Memories
) -> Tensor:
    """Derivative of `read_start` from d_out [G, F, d]: dq, and M_mem's own added to d_frozen."""
    dz = (d_out @ frozen.w1).mul_(read.slope)
    d_frozen.w1.baddbmm_(d_out.mT, read.act)
    d_frozen.w2.baddbmm_(dz.mT, read.q)
    return torch.baddbmm(d_out, dz, frozen.w2)
