"""The derivative of writing (`hope/scan/writes.py`), derived by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope.scan.closed_form import (
    Frame,
    from_blocks,
    gelu_curvature,
    log_decay_gradient,
    to_blocks,
    unit_backward,
)
from hope.scan.contract import DeltaRule
from hope.scan.products import Scratch, add_mm, by_head, mm
from hope.scan.reference import NORM_EPS
from hope.scan.writes import (
    STEP_FLOOR,
    W1_DELTA,
    W2_DELTA,
    Keys,
    Memories,
    Written,
    for_each_memory,
    keys_of,
)


class ReadGradient(NamedTuple):
    """What causal reads send back into the n blocks of the memory that they read.

    u1, u2, w1, w2, e: gradients of its U, of its Delta at each block's start and of its W1 keys,
    [n, G, ...]; rows [n, G, c]: the sums that `log_decay_gradient` asks for.
    """

    u1: Tensor
    u2: Tensor
    w1: Tensor
    w2: Tensor
    e: Tensor
    rows: Tensor


class Sums(NamedTuple):
    """Gradients that backward adds up as it goes.

    frozen: of the chunk-start W; weights: of M_0 at fixed states, [m, N, ...]; lost: what decay
    across blocks gives to M_0, still by row; readout [2, N, d] and bias [2, N]: of eta and alpha.
    """

    frozen: Memories
    weights: Memories
    lost: Memories
    readout: Tensor
    bias: Tensor


class WriteGradient(NamedTuple):
    """Gradients of keys and values [G, 2F, d], and of the logarithms of eta and alpha
    [n, G, c]."""

    kv: Tensor
    log_eta: Tensor
    log_alpha: Tensor


def write_backward(
    rule: DeltaRule,
    frame: Frame,
    written: Written,
    frozen: Memories,
    base: Memories | None,
    d_state: Memories,
    sums: Sums,
    read: tuple[int, ReadGradient] | None,
    scratch: Scratch,
) -> WriteGradient:
    """Derivative of `write`, from the gradient of the state after it, which becomes that of the
    state before it.

    read: the memory that causal reads look at, and what they send back. The gradients of states
    are of W; the weights' are of M_0 at fixed W: what decay gives to it, computed as such.
    """
    count, group, c, _ = frame.k.shape
    memories = d_state.w1.shape[0]
    tokens = written.kv.shape[1] // 2
    width, hidden = d_state.w1.shape[2:]
    tiny = torch.finfo(frame.eta.dtype).tiny
    gelus = gelu_curvature(written.z, tokens, scratch)
    all_kv = for_each_memory(memories, written.kv, "kv", scratch)
    keys = keys_of(rule, frame, gelus[0][:, :, :tokens], all_kv, scratch)

    def buffer(name: str, *shape: int) -> Tensor:
        return scratch(name, memories, group, *shape)

    dr1, dr2 = buffer("dr1", tokens, width), buffer("dr2", tokens, hidden)
    de, dk = buffer("de", tokens, hidden), scratch("dk", group, tokens, width).zero_()
    p_blocks, boundaries = [], []
    for j in reversed(range(count)):
        here = slice(j * c, (j + 1) * c)
        u1, before, after = written.u1[j], written.deltas[j], written.deltas[j + 1]
        boundaries.append(_dot(d_state.w1, after.w1, scratch) + _dot(d_state.w2, after.w2, scratch))

        # The U of the block, then through the triangular systems to their right-hand sides.
        du1 = buffer("du1", c, width)
        add_mm(du1, keys.e_end[:, :, here], d_state.w1.mT, alpha=-1, beta=0)
        if read is not None:
            du1[read[0]] += read[1].u1[j]
        block1 = mm(written.solve[:memories, :, j].mT, du1, buffer("block dr1", c, width))
        gram1 = mm(block1, u1.mT, buffer("gram1", c, c))
        p = gram1.diagonal(dim1=-2, dim2=-1).sum(0)
        de_j = buffer("block de", c, hidden)
        add_mm(de_j, torch.mul(u1, frame.end[j], out=du1), d_state.w1, alpha=-1, beta=0)
        if rule in W1_DELTA:
            add_mm(de_j, torch.mul(block1, frame.prev[j], out=du1), before.w1)
            gram1.mul_(frame.ratio[j])
            both = torch.add(gram1, gram1.mT, out=buffer("both", c, c))
            add_mm(de_j, both, keys.e[:, :, here], alpha=-1)
        if written.u2:
            p2 = _block_backward2(rule, frame, written, keys, d_state.w2, read, j, dr2, dk, scratch)
            p = p + p2
        p_blocks.append(p / frame.eta[j].squeeze(-1).clamp_min(tiny))

        if base is not None:
            sums.lost.w1.addcmul_(d_state.w1, frame.total_lost[j])
            sums.lost.w2.addcmul_(d_state.w2, frame.total_lost[j])
        d_state.w1.mul_(frame.total[j])
        d_state.w2.mul_(frame.total[j])
        if rule in W1_DELTA:
            add_mm(d_state.w1, block1.mT, keys.e_prev[:, :, here])
        if rule in W2_DELTA:
            add_mm(d_state.w2, dr2[:, :, here].mT, keys.k_prev[:, :, here])
        if read is not None:
            de_j[read[0]] += read[1].e[j]
            d_state.w1[read[0]] += read[1].w1[j]
            d_state.w2[read[0]] += read[1].w2[j]
        if count == 1:
            dr1, de = block1, de_j
        else:
            dr1[:, :, here], de[:, :, here] = block1, de_j

    rows = scratch("rows", group, tokens).zero_()
    if base is not None:
        _base_backward(rule, frame, keys, base, dr1, dr2, de, dk, rows, sums, scratch)
    d_kv = _frozen_backward(rule, written, frozen, gelus, keys, dr1, dr2, de, rows, sums, scratch)
    d_kv[:, :tokens] += dk
    rows = to_blocks(rows, c).neg_()
    if read is not None:
        rows += read[1].rows
    p = torch.stack(p_blocks[::-1])
    return WriteGradient(d_kv, p, log_decay_gradient(p, rows, torch.stack(boundaries[::-1])))


def _block_backward2(
    rule: DeltaRule,
    frame: Frame,
    written: Written,
    keys: Keys,
    d_w2: Tensor,
    read: tuple[int, ReadGradient] | None,
    j: int,
    dr2: Tensor,
    dk: Tensor,
    scratch: Scratch,
) -> Tensor:
    """A block's part in W2, whose keys all memories share: fills its part of dr2 [m, G, F, h] and
    dk [G, F, d] and returns <dU, U> times eta, [G, c]."""
    memories, group, _, hidden = dr2.shape
    c, width = frame.k.shape[2:]
    here = slice(j * c, (j + 1) * c)
    u2 = written.u2[j]
    du2 = scratch("du2", memories, group, c, hidden)
    add_mm(du2, keys.k_end[:, :, here], d_w2.mT, alpha=-1, beta=0)
    if read is not None:
        du2[read[0]] += read[1].u2[j]
    solve2 = for_each_memory(memories, written.solve[-1, :, j], "solve2", scratch)
    block2 = mm(solve2.mT, du2, scratch("block dr2", memories, group, c, hidden))
    dr2[:, :, here] = block2
    gram2 = mm(block2, u2.mT, scratch("gram2", memories, group, c, c)).sum(0)
    p = gram2.diagonal(dim1=-2, dim2=-1).clone()
    dk_j = scratch("block dk", memories, group, c, width)
    add_mm(dk_j, torch.mul(u2, frame.end[j], out=du2), d_w2, alpha=-1, beta=0)
    if rule in W2_DELTA:
        add_mm(dk_j, torch.mul(block2, frame.prev[j], out=du2), written.deltas[j].w2)
    dk_block = dk_j.sum(0)
    if rule in W2_DELTA:
        gram2.mul_(frame.ratio[j])
        dk_block.baddbmm_(gram2 + gram2.mT, frame.k[j], alpha=-1)
    dk[:, here] = dk_block
    return p


def _dot(left: Tensor, right: Tensor, scratch: Scratch) -> Tensor:
    """<left, right> of each of the G rows of [m, G, o, i], over all memories."""
    product = torch.mul(left, right, out=scratch("dot", *left.shape))
    return product.sum((0, 2, 3))


def _base_backward(
    rule: DeltaRule,
    frame: Frame,
    keys: Keys,
    base: Memories,
    dr1: Tensor,
    dr2: Tensor,
    de: Tensor,
    dk: Tensor,
    rows: Tensor,
    sums: Sums,
    scratch: Scratch,
) -> None:
    """Through what M_0 adds to G: into the weights, de, dk and <dr, M_0 e> of rows [G, F]."""
    heads = base.w1.shape[1]
    lost = from_blocks(frame.prev_lost)
    if rule in W1_DELTA:
        e_lost = torch.mul(keys.e, lost, out=scratch("e prev", *de.shape))
        add_mm(sums.weights.w1, by_head(dr1, heads).mT, by_head(e_lost, heads))
        own = scratch("base e", *de.shape)
        mm(by_head(dr1, heads), base.w1, by_head(own, heads))
        de += own
        rows += own.mul_(keys.e).sum((0, 3))
    if rule in W2_DELTA:
        k = keys.kv[:, :, : dk.shape[1]]
        k_lost = torch.mul(k, lost, out=scratch("k prev", *k.shape))
        add_mm(sums.weights.w2, by_head(dr2, heads).mT, by_head(k_lost, heads))
        own = scratch("base k", *k.shape)
        mm(by_head(dr2, heads), base.w2, by_head(own, heads))
        total = own.sum(0)
        dk += total
        rows += total.mul_(k[0]).sum(2)


def _frozen_backward(
    rule: DeltaRule,
    written: Written,
    frozen: Memories,
    gelus: tuple[Tensor, Tensor, Tensor],
    keys: Keys,
    dg1: Tensor,
    dg2: Tensor,
    de: Tensor,
    rows: Tensor,
    sums: Sums,
    scratch: Scratch,
) -> Tensor:
    """Through the frozen terms: from g1, g2 (overwritten) and W1's keys to the chunk-start W and
    to (k, v) [G, 2F, d]; adds <dg, g> to rows [G, F]."""
    tokens = dg1.shape[2]
    act, slope, curvature = gelus
    first, second = slice(tokens), slice(tokens, None)
    if rule in W1_DELTA:
        length, e = keys.length, keys.e
        floor = (length * length).add_(STEP_FLOOR)
        step = length / floor
        d_step = torch.mul(dg1, written.r, out=scratch("dr r", *dg1.shape)).sum(-1, keepdim=True)
        rows += (d_step * step).sum((0, 3))
        dr = dg1.mul_(step)
        held = length.clamp_min(NORM_EPS)
        da = unit_backward(de, e, held.reciprocal())
        d_length = d_step * (2 * STEP_FLOOR - floor) / (floor * floor)
        # e is act / max(|act|, NORM_EPS), and |act| has the gradient act / |act|.
        d_length *= held.div_(length).masked_fill_(length == 0, 1)
        da.addcmul_(e, d_length)
    else:
        rows += torch.mul(dg1, written.r).sum((0, 3))
        dr, da = dg1, de
    dz = scratch("dz", *written.z.shape)
    dz_k, dz_v = dz[:, :, first], dz[:, :, second]
    d_act = scratch("d act", *dg2.shape)
    if rule == "target":
        target = keys.kv[:, :, first] - written.r
        d_target = unit_backward(dr, target, written.pulled)
        d_value = d_target.neg_()
        add_mm(sums.frozen.w1, d_value.mT, act[:, :, second])
        torch.mul(da, slope[:, :, first], out=dz_k)
        torch.mul(mm(d_value, frozen.w1, d_act), slope[:, :, second], out=dz_v)
        d_key, d_value = dr.sum(0), d_value.sum(0)
    else:
        through_slope = torch.mul(dg2, written.pulled, out=scratch("g1", *dg2.shape))
        torch.mul(through_slope, curvature, out=dz_k)
        rows += through_slope.mul_(slope[:, :, first]).sum((0, 3))
        dg2.mul_(slope[:, :, first])
        add_mm(dr, dg2, frozen.w1.mT)
        add_mm(sums.frozen.w1, written.r.mT, dg2)
        gap = act[:, :, first].sub_(act[:, :, second])
        add_mm(sums.frozen.w1, dr.mT, gap)
        mm(dr, frozen.w1, d_act)
        dz_k.addcmul_(da.add_(d_act), slope[:, :, first])
        torch.mul(d_act.neg_(), slope[:, :, second], out=dz_v)
        d_key = dr.sum(0)
        d_value = -d_key
    add_mm(sums.frozen.w2, dz.mT, keys.kv)
    d_kv = mm(dz, frozen.w2, scratch("d kv", *keys.kv.shape)).sum(0)
    d_kv[:, first] += d_key
    d_kv[:, second] += d_value
    return d_kv
