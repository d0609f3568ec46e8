"""Writing one frozen chunk into a group of memories, and its derivative (Eqs. 88, 90).

Everything the chunk writes comes from the state at its start; the recurrence over its tokens is
then linear and is taken block by block. States are kept as Delta = W - base: base is M_0 with
decay towards the initial state, and absent (None) with decay towards zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope.scan.closed_form import (
    Frame,
    from_blocks,
    gelu,
    gelu_curvature,
    gelu_slope,
    log_decay_gradient,
    solve_operator,
    to_blocks,
    unit,
    unit_backward,
)
from hope.scan.contract import DeltaRule
from hope.scan.reference import NORM_EPS

W1_DELTA: tuple[DeltaRule, ...] = ("normalised", "target")
"""Rules whose delta term acts on W1's unit input."""
W2_DELTA: tuple[DeltaRule, ...] = ("normalised", "input")
"""Rules whose delta term acts on W2's input."""
_STEP_FLOOR = 0.01


def shared_mm(shared: Tensor, own: Tensor) -> Tensor:
    """shared [G, i, j] @ own [m, G, j, l] -> [m, G, i, l], without copying what is shared."""
    out = own.new_empty(own.shape[0], shared.shape[0], shared.shape[1], own.shape[3])
    for one, result in zip(own.unbind(), out.unbind(), strict=True):
        torch.bmm(shared, one, out=result)
    return out


def sum_mm(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the memories of left [m, G, i, j] @ right [m, G, j, l] -> [G, i, l]."""
    total = torch.bmm(left[0], right[0])
    for one, other in zip(left.unbind()[1:], right.unbind()[1:], strict=True):
        total.baddbmm_(one, other)
    return total


def add_mm(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> None:
    """total [m, G, i, l] += alpha * left [m, G, i, j] @ right [m, G, j, l], in place."""
    total.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), alpha=alpha)


def add_shared_mm(total: Tensor, left: Tensor, shared: Tensor, alpha: float = 1) -> None:
    """total [m, G, i, l] += alpha * left [m, G, i, j] @ shared [G, j, l], in place."""
    for one, other in zip(total.unbind(), left.unbind(), strict=True):
        one.baddbmm_(other, shared, alpha=alpha)


def add_base_mm(total: Tensor, left: Tensor, base: Tensor) -> None:
    """total [m, G, F, o] += left [m or 1, G, F, i] @ base [m, N, i, o] of each head, in place."""
    memories, heads, inner, outer = base.shape
    rows = total.view(memories, heads, -1, outer)
    flat = left.reshape(left.shape[0], heads, -1, inner)
    if left.shape[0] == memories:
        add_mm(rows, flat, base)
        return
    for row, one in zip(rows.unbind(), base.unbind(), strict=True):
        row.baddbmm_(flat[0], one)


def head_outer(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """Sum over rows and tokens of left^T right per head: [m, G, F, o], [m, G, F, i] -> m, N, o, i.

    right may have one memory, shared by all.
    """
    left = left.reshape(left.shape[0], heads, -1, left.shape[-1]).mT
    right = right.reshape(right.shape[0], heads, -1, right.shape[-1])
    if left.shape[0] == right.shape[0]:
        return left @ right
    return shared_left_mm(left, right[0])


def shared_left_mm(own: Tensor, shared: Tensor) -> Tensor:
    """own [m, G, i, j] @ shared [G, j, l] -> [m, G, i, l], without copying what is shared."""
    out = own.new_empty(*own.shape[:3], shared.shape[2])
    for one, result in zip(own.unbind(), out.unbind(), strict=True):
        torch.bmm(one, shared, out=result)
    return out


def with_base(delta: Tensor, base: Tensor | None) -> Tensor:
    """W = base + Delta: delta [m, G, o, i], base [m, N, o, i]."""
    if base is None:
        return delta
    heads = base.shape[1]
    return (delta.unflatten(1, (heads, -1)) + base.unsqueeze(2)).flatten(1, 2)


def over_rows(z: Tensor, heads: int) -> Tensor:
    """Sum of [m, G, o, i] over the rows of each head -> [m, N, o, i]."""
    return z.unflatten(1, (heads, -1)).sum(2)


class Written(NamedTuple):
    """A written chunk: what reads and backward need of it.

    delta1, delta2: states at the start of each block and after the last, [m, G, d, h] and
    [m, G, h, d]; u1 [m, G, c, d], u2 [m, G, c, h]: each block's U; e1 [m, G, F, h]: W1's keys.
    The rest is named as in `write`. With `target` u2 is zero, r is k less the unit target, diff is
    the activation of v alone, and g2_slope is one over the target's length before normalisation.
    """

    delta1: list[Tensor]
    delta2: list[Tensor]
    u1: list[Tensor]
    u2: list[Tensor]
    e1: Tensor
    e1_prev: Tensor
    e1_end: Tensor
    solve1: Tensor
    w1: Tensor
    w2: Tensor
    kv: Tensor
    z: Tensor
    slope: Tensor
    diff: Tensor
    r: Tensor
    length: Tensor
    g1: Tensor
    g2_slope: Tensor
    g2: Tensor


def write(
    rule: DeltaRule,
    frame: Frame,
    k: Tensor,
    v: Tensor,
    delta1: Tensor,
    delta2: Tensor,
    base1: Tensor | None,
    base2: Tensor | None,
    keep: bool,
) -> Written:
    """Write a frozen chunk's tokens into m memories.

    frame: the chunk's own blocks [n, G, c, ...]; k, v: [G, F, d]; delta1 [m, G, d, h] and delta2
    [m, G, h, d]: the states at its start; base1 [m, N, d, h], base2 [m, N, h, d].
    keep: whether `write_backward` will follow (without it slope has the keys' half alone).
    """
    tokens = k.shape[1]
    w1, w2 = with_base(delta1, base1), with_base(delta2, base2)
    kv = torch.cat([k, v], 1)
    z = shared_mm(kv, w2.mT)
    if keep:
        a, slope = gelu_slope(z)
        a_k, a_v = a[:, :, :tokens], a[:, :, tokens:]
    else:
        a_k, slope = gelu_slope(z[:, :, :tokens])
        a_v = gelu(z[:, :, tokens:])
    if rule == "target":
        diff = a_v.contiguous()
        r, g2_slope = unit((diff @ w1.mT).add_(v))
        r, g2 = torch.sub(k, r, out=r), g2_slope
    else:
        diff = a_k - a_v
        r = (diff @ w1.mT).add_(k - v)
        g2_slope = r @ w1
        g2 = g2_slope * slope[:, :, :tokens]
    if rule in W1_DELTA:
        length = torch.linalg.vector_norm(a_k, dim=-1, keepdim=True)
        e1 = a_k * length.clamp_min(NORM_EPS).reciprocal_()
        g1 = r * (length / (length * length).add_(_STEP_FLOOR))
    else:
        length, e1, g1 = r.new_empty(0), a_k.contiguous(), r.clone()

    count, _, c, _ = frame.k.shape
    blocks = (count, c)

    e1_prev, e1_end = e1 * from_blocks(frame.prev), e1 * from_blocks(frame.end)
    by_head = (frame.step.transpose(0, 1), frame.eta.transpose(0, 1))
    if rule in W1_DELTA:
        e1_blocks = e1.unflatten(2, blocks)
        solve1 = solve_operator(e1_blocks @ e1_blocks.mT, *by_head)
    else:
        solve1 = torch.diag_embed(by_head[1].squeeze(-1)).expand(e1.shape[0], -1, -1, -1, -1)
    if base2 is not None and rule in W2_DELTA:
        add_base_mm(g2, k.unsqueeze(0), base2.mT)
    if base1 is not None and rule in W1_DELTA:
        add_base_mm(g1, e1, base1.mT)

    deltas1, deltas2, us1, us2 = [delta1], [delta2], [], []
    for j, (g1_j, g2_j) in enumerate(zip(g1.split(c, 2), g2.split(c, 2), strict=True)):
        here = slice(j * c, (j + 1) * c)
        if rule in W1_DELTA:
            g1_j = g1_j + e1_prev[:, :, here] @ delta1.mT
        if rule in W2_DELTA:
            g2_j = g2_j + shared_mm(frame.k_prev[j], delta2.mT)
        u1 = solve1[:, :, j] @ g1_j
        delta1 = delta1 * frame.total[j]
        add_mm(delta1, u1.mT, e1_end[:, :, here], alpha=-1)
        delta2 = delta2 * frame.total[j]
        if rule == "target":
            u2 = torch.zeros_like(e1[:, :, here])
        else:
            u2 = shared_mm(frame.solve2[j], g2_j)
            add_shared_mm(delta2, u2.mT, frame.k_end[j], alpha=-1)
        deltas1.append(delta1)
        deltas2.append(delta2)
        us1.append(u1)
        us2.append(u2)
    return Written(
        deltas1, deltas2, us1, us2, e1, e1_prev, e1_end, solve1,
        w1, w2, kv, z, slope, diff, r, length, g1, g2_slope, g2,
    )  # fmt: skip


class ReadGradient(NamedTuple):
    """What a causal read sends back into the n blocks it read, [n, 1, G, ...] each.

    u1, u2, delta1, delta2, e1: gradients of those of `Written`; rows [n, G, c]: the sums that
    `log_decay_gradient` asks for.
    """

    u1: Tensor
    u2: Tensor
    delta1: Tensor
    delta2: Tensor
    e1: Tensor
    rows: Tensor


class WriteGradient(NamedTuple):
    """Gradients of a written chunk.

    delta1, delta2: of the states W at its start; base1 [m, N, d, h], base2: of the base at fixed W
    (None without a base): what decay gives to M_0, computed as such and not as a difference;
    k, v: [G, F, d]; log_eta, log_alpha: [n, G, c], of the logarithms of both.
    """

    delta1: Tensor
    delta2: Tensor
    base1: Tensor | None
    base2: Tensor | None
    k: Tensor
    v: Tensor
    log_eta: Tensor
    log_alpha: Tensor


def write_backward(
    rule: DeltaRule,
    frame: Frame,
    written: Written,
    base1: Tensor | None,
    base2: Tensor | None,
    d_delta1: Tensor,
    d_delta2: Tensor,
    read: ReadGradient | None,
) -> WriteGradient:
    """Derivative of `write`, from the gradients of the state after it (overwritten) and
    of reads."""
    count, _, c, _ = frame.k.shape
    tiny = torch.finfo(frame.eta.dtype).tiny
    p_blocks, boundaries = [], []
    dr1_blocks: list[Tensor] = []
    dr2_blocks: list[Tensor] = []
    de1_blocks: list[Tensor] = []
    dk_blocks: list[Tensor] = []
    lost1, lost2 = torch.zeros_like(d_delta1), torch.zeros_like(d_delta2)
    for j in reversed(range(count)):
        here = slice(j * c, (j + 1) * c)
        u1, u2 = written.u1[j], written.u2[j]
        delta1, delta2 = written.delta1[j], written.delta2[j]
        boundaries.append(
            (d_delta1 * written.delta1[j + 1]).sum((0, 2, 3))
            + (d_delta2 * written.delta2[j + 1]).sum((0, 2, 3))
        )
        # The U of the block, then through the triangular systems to their right-hand sides.
        du1 = written.e1_end[:, :, here] @ d_delta1.mT
        du1 = du1.neg_() if read is None else torch.sub(read.u1[j], du1, out=du1)
        dr1 = written.solve1[:, :, j].mT @ du1
        gram1 = dr1 @ u1.mT
        p = gram1.diagonal(dim1=-2, dim2=-1).sum(0)
        if rule == "target":
            dr2, dk = u2, torch.zeros_like(frame.k[j])
        else:
            du2 = shared_mm(frame.k_end[j], d_delta2.mT)
            du2 = du2.neg_() if read is None else torch.sub(read.u2[j], du2, out=du2)
            dr2 = shared_mm(frame.solve2[j].mT, du2)
            gram2 = sum_mm(dr2, u2.mT)
            p = p + gram2.diagonal(dim1=-2, dim2=-1)
            dk = sum_mm(u2, d_delta2).mul_(frame.end[j]).neg_()
        p_blocks.append(p / frame.eta[j].squeeze(-1).clamp_min(tiny))

        de1 = (u1 * frame.end[j]).neg_() @ d_delta1
        if rule in W1_DELTA:
            add_mm(de1, dr1 * frame.prev[j], delta1)
            gram1 = gram1.mul_(frame.ratio[j])
            add_mm(de1, gram1 + gram1.mT, written.e1[:, :, here], alpha=-1)
        if rule in W2_DELTA:
            dk.addcmul_(sum_mm(dr2, delta2), frame.prev[j])
            gram2 = gram2.mul_(frame.ratio[j])
            dk.baddbmm_(gram2 + gram2.mT, frame.k[j], alpha=-1)
        if base1 is not None:
            lost1.addcmul_(d_delta1, frame.total_lost[j])
            lost2.addcmul_(d_delta2, frame.total_lost[j])
        d_delta1.mul_(frame.total[j])
        d_delta2.mul_(frame.total[j])
        if rule in W1_DELTA:
            add_mm(d_delta1, dr1.mT, written.e1_prev[:, :, here])
        if rule in W2_DELTA:
            add_shared_mm(d_delta2, dr2.mT, frame.k_prev[j])
        if read is not None:
            de1 += read.e1[j]
            d_delta1 += read.delta1[j]
            d_delta2 += read.delta2[j]
        for blocks, one in (
            (dr1_blocks, dr1), (dr2_blocks, dr2), (de1_blocks, de1), (dk_blocks, dk)
        ):  # fmt: skip
            blocks.append(one)

    dr1, dr2, de1 = (
        blocks[0] if count == 1 else torch.cat(blocks[::-1], 2)
        for blocks in (dr1_blocks, dr2_blocks, de1_blocks)
    )
    dk = dk_blocks[0] if count == 1 else torch.cat(dk_blocks[::-1], 1)
    rows = (dr1 * written.g1).sum(-1).sum(0)
    if rule != "target":
        rows += (dr2 * written.g2).sum(-1).sum(0)
    rows = to_blocks(rows, c).neg_()
    if read is not None:
        rows += read.rows
    p = torch.stack(p_blocks[::-1])
    log_alpha = log_decay_gradient(p, rows, torch.stack(boundaries[::-1]))

    d_base1 = d_base2 = None
    if base1 is not None and base2 is not None:
        heads = base1.shape[1]
        d_base1, d_base2 = over_rows(lost1, heads), over_rows(lost2, heads)
        prev_lost = from_blocks(frame.prev_lost)
        if rule in W1_DELTA:
            d_base1 += head_outer(dr1, written.e1 * prev_lost, heads)
            add_base_mm(de1, dr1, base1)
        if rule in W2_DELTA:
            k_lost = from_blocks(frame.k) * prev_lost
            d_base2 += head_outer(dr2, k_lost.unsqueeze(0), heads)
            flat = dr2.view(*base2.shape[:2], -1, base2.shape[2])
            dk.view(heads, -1, dk.shape[-1]).add_(sum_mm(flat, base2))
    dk2, dv, dw1, dw2 = _frozen_backward(rule, written, dr1, dr2, de1)
    dk += dk2
    d_delta1 += dw1
    d_delta2 += dw2
    return WriteGradient(d_delta1, d_delta2, d_base1, d_base2, dk, dv, p, log_alpha)


def _frozen_backward(
    rule: DeltaRule, written: Written, dg1: Tensor, dg2: Tensor, de1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through the frozen terms: from g1, g2 and W1's keys to k, v and the chunk-start W1, W2."""
    tokens = dg1.shape[2]
    slope_k, slope_v = written.slope[:, :, :tokens], written.slope[:, :, tokens:]
    if rule in W1_DELTA:
        length = written.length
        floor = (length * length).add_(_STEP_FLOOR)
        d_step = (dg1 * written.r).sum(-1, keepdim=True)
        dr = dg1 * (length / floor)
        inverse = length.clamp_min(NORM_EPS).reciprocal_()
        da = unit_backward(de1, written.e1, inverse)
        da.addcmul_(written.e1, d_step * (2 * _STEP_FLOOR - floor) / (floor * floor))
    else:
        dr, da = dg1, de1
    if rule == "target":
        dy = unit_backward(-dr, written.kv[:, :tokens] - written.r, written.g2_slope)
        dz = torch.cat([da.mul_(slope_k), (dy @ written.w1).mul_(slope_v)], 2)
        d_kv = sum_mm(dz, written.w2)
        d_k, d_v = d_kv[:, :tokens] + dr.sum(0), d_kv[:, tokens:] + dy.sum(0)
        return d_k, d_v, dy.mT @ written.diff, shared_left_mm(dz.mT, written.kv)
    through_slope = dg2 * written.g2_slope
    dg2 = dg2 * slope_k
    add_mm(dr, dg2, written.w1.mT)
    dw1 = written.r.mT @ dg2
    d_diff = dr @ written.w1
    add_mm(dw1, dr.mT, written.diff)
    dz = torch.empty_like(written.slope)
    torch.mul(da.add_(d_diff), slope_k, out=dz[:, :, :tokens])
    dz[:, :, :tokens].addcmul_(through_slope, gelu_curvature(written.z[:, :, :tokens]))
    torch.mul(d_diff.neg_(), slope_v, out=dz[:, :, tokens:])
    dw2 = shared_left_mm(dz.mT, written.kv)
    d_kv = sum_mm(dz, written.w2)
    d_gap = dr.sum(0)
    return d_kv[:, :tokens] + d_gap, d_kv[:, tokens:] - d_gap, dw1, dw2
