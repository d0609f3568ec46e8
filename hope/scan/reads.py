"""Reading M_mem for the tokens of a projection chunk, and the derivative (Eqs. 83, 86, 90)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope.scan.closed_form import Frame, from_blocks, gelu_slope, to_blocks
from hope.scan.writes import ReadGradient, Written


class Blocks(NamedTuple):
    """M_mem over the n blocks of a projection chunk, [n, G, ...] each, named as in `Written`."""

    delta1: Tensor
    delta2: Tensor
    u1: Tensor
    u2: Tensor
    e1: Tensor


def stack_blocks(written: list[Written], c: int) -> Blocks:
    """Put the blocks of the consecutive memory chunks of M_mem behind each other."""

    def stack(lists: list[list[Tensor]]) -> Tensor:
        return torch.cat([block for blocks in lists for block in blocks])

    return Blocks(
        stack([w.delta1[:-1] for w in written]),
        stack([w.delta2[:-1] for w in written]),
        stack([w.u1 for w in written]),
        stack([w.u2 for w in written]),
        torch.cat([to_blocks(w.e1[0], c) for w in written]),
    )


def _base_mm(z: Tensor, base: Tensor) -> Tensor:
    """z [n, G, c, i] @ base [N, i, o] of each head -> [n, G, c, o]."""
    heads, inner, outer = base.shape
    return (z.view(z.shape[0], heads, -1, inner) @ base).view(*z.shape[:3], outer)


def _base_outer(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """Sum over rows and tokens of left^T right: [n, G, c, o], [n, G, c, i] -> [1, N, o, i]."""
    left = left.view(left.shape[0], heads, -1, left.shape[-1])
    right = right.view(right.shape[0], heads, -1, right.shape[-1])
    return (left.mT @ right).sum(0, keepdim=True)


class CausalRead(NamedTuple):
    """A causal read's intermediate values, [n, G, c, ...] each.

    q_prev: decayed queries; across2, across1: ratio * (q k^T) and ratio * (act e1^T); act, slope:
    of the hidden layer.
    """

    q: Tensor
    q_prev: Tensor
    across1: Tensor
    across2: Tensor
    act: Tensor
    act_prev: Tensor
    slope: Tensor


def read_causal(
    frame: Frame, blocks: Blocks, q: Tensor, base1: Tensor | None, base2: Tensor | None
) -> tuple[Tensor, CausalRead]:
    """M_mem of each token's predecessor applied to q [G, F, d] -> out [G, F, d] (Eq. 83).

    base1 [N, d, h], base2 [N, h, d]: of M_mem alone.
    """
    q = to_blocks(q, frame.k.shape[2])
    q_prev = q * frame.prev
    across2 = (q @ frame.k.mT).mul_(frame.ratio)
    z = (q_prev @ blocks.delta2.mT).sub_(across2 @ blocks.u2)
    if base2 is not None:
        z += _base_mm(q, base2.mT)
    act, slope = gelu_slope(z)
    act_prev = act * frame.prev
    across1 = (act @ blocks.e1.mT).mul_(frame.ratio)
    out = (act_prev @ blocks.delta1.mT).sub_(across1 @ blocks.u1).add_(q)
    if base1 is not None:
        out += _base_mm(act, base1.mT)
    return from_blocks(out), CausalRead(q, q_prev, across1, across2, act, act_prev, slope)


def read_causal_backward(
    frame: Frame,
    blocks: Blocks,
    read: CausalRead,
    base1: Tensor | None,
    base2: Tensor | None,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, ReadGradient, Tensor | None, Tensor | None]:
    """Derivative of `read_causal` from d_out [G, F, d]: (dq, dk, into the blocks, base1, base2).

    The last two are gradients of the base at fixed states W, as in `WriteGradient`.
    """
    d_out = to_blocks(d_out, frame.k.shape[2])
    d_base1 = d_base2 = None

    d_across = (d_out @ blocks.u1.mT).neg_().mul_(frame.ratio)
    d_act = (d_out @ blocks.delta1).mul_(frame.prev).add_(d_across @ blocks.e1)
    rows = (d_act * read.act).sum(-1)
    d_e1 = d_across.mT @ read.act
    d_u1 = (read.across1.mT @ d_out).neg_()
    d_delta1 = d_out.mT @ read.act_prev
    if base1 is not None:
        d_act += _base_mm(d_out, base1)
        d_base1 = _base_outer(d_out, read.act * frame.prev_lost, base1.shape[0])

    dz = d_act.mul_(read.slope)
    d_across = (dz @ blocks.u2.mT).neg_().mul_(frame.ratio)
    dq = (dz @ blocks.delta2).mul_(frame.prev).add_(d_across @ frame.k)
    rows += (dq * read.q).sum(-1)
    dk = d_across.mT @ read.q
    d_u2 = (read.across2.mT @ dz).neg_()
    d_delta2 = dz.mT @ read.q_prev
    if base2 is not None:
        dq += _base_mm(dz, base2)
        d_base2 = _base_outer(dz, read.q * frame.prev_lost, base2.shape[0])
    u1, u2, delta1, delta2, e1 = (z.unsqueeze(1) for z in (d_u1, d_u2, d_delta1, d_delta2, d_e1))
    into = ReadGradient(u1, u2, delta1, delta2, e1, rows)
    return from_blocks(dq.add_(d_out)), from_blocks(dk), into, d_base1, d_base2


class StartRead(NamedTuple):
    """A chunk-start read's queries, activations and their slopes, [G, C, ...] each."""

    q: Tensor
    act: Tensor
    slope: Tensor


def read_start(written: Written, q: Tensor) -> tuple[Tensor, StartRead]:
    """M_mem of the memory chunk's start applied to q [G, C, d] -> out [G, C, d] (Eq. 90)."""
    act, slope = gelu_slope(q @ written.w2[0].mT)
    return torch.baddbmm(q, act, written.w1[0].mT), StartRead(q, act, slope)


def read_start_backward(
    written: Written, read: StartRead, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative of `read_start` from d_out [G, C, d]: (dq, dW1 [1, G, d, h], dW2 [1, G, h, d])."""
    dz = (d_out @ written.w1[0]).mul_(read.slope)
    dw1 = d_out.mT @ read.act
    dw2 = dz.mT @ read.q
    return torch.baddbmm(d_out, dz, written.w2[0]), dw1.unsqueeze(0), dw2.unsqueeze(0)
