"""Writing tokens that share one frozen state into the memories (Eqs. 88, 90).

Everything the tokens write comes from the state at their chunk's start; the recurrence over them
is then linear and is taken block by block. States are kept as Delta = W - base: base is M_0 with
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
    gelu_slope,
    unit,
    unit_lower_inverse,
)
from hope.scan.contract import MEM, DeltaRule
from hope.scan.products import Scratch, add_mm, by_head, mm
from hope.scan.reference import NORM_EPS

W1_DELTA: tuple[DeltaRule, ...] = ("normalised", "target")
"""Rules whose delta term acts on W1's unit input."""
W2_DELTA: tuple[DeltaRule, ...] = ("normalised", "input")
"""Rules whose delta term acts on W2's input; `target` does not write W2 at all."""
STEP_FLOOR = 0.01
"""Added to |act|^2 in W1's step, rho / (rho^2 + 0.01)."""


class Memories(NamedTuple):
    """Two-layer memories or something of their shape: fast weights or Deltas w1 [m, G, d, h] and
    w2 [m, G, h, d]; M_0, or gradients of weights, with N for G."""

    w1: Tensor
    w2: Tensor

    def some(self, memories: slice) -> Memories:
        """Some of the memories, as views."""
        return Memories(self.w1[memories], self.w2[memories])

    def one(self, memory: int) -> Memories:
        """One memory, as views without the leading axis."""
        return Memories(self.w1[memory], self.w2[memory])

    def add_(self, other: Memories) -> None:
        """Add in place."""
        self.w1.add_(other.w1)
        self.w2.add_(other.w2)

    def zero_(self) -> None:
        """Set to zero in place."""
        self.w1.zero_()
        self.w2.zero_()


class Written(NamedTuple):
    """What reads and backward need of written tokens: the results of products; the elementwise
    rest is computed again.

    kv: [G, 2F, d]; deltas: Deltas at the start of each of the n blocks and after the last;
    u1 [m, G, c, d], u2 [m, G, c, h]: each block's U; z [m, G, 2F, h] = W2 (k, v); r [m, G, F, d];
    pulled [m, G, F, h] = W1^T r; solve [m + 1, G, n, c, c]: (I + T)^-1 diag(eta) of every W1's
    system, then of W2's, which all memories share (diag(eta) alone where there is no delta term);
    e_mem [G, F, h]: W1's keys of M_mem. With `target` nothing is there of W2 (no u2, m solves), r
    is k less the unit target, and pulled [m, G, F, 1] is one over the target's length before.
    """

    kv: Tensor
    deltas: list[Memories]
    u1: list[Tensor]
    u2: list[Tensor]
    z: Tensor
    r: Tensor
    pulled: Tensor
    solve: Tensor
    e_mem: Tensor


class Keys(NamedTuple):
    """What the recurrence is keyed by, also times the decays before (prev) and after (end) each
    token of its block.

    e [m, G, F, h]: W1's keys (u, or act itself without normalisation); length [m, G, F, 1]:
    |act|, empty where not needed; kv [m, G, 2F, d]: keys, which are W2's, and values, once for
    each memory; k_prev, k_end [m, G, F, d], empty where W2 is not written.
    """

    e: Tensor
    e_prev: Tensor
    e_end: Tensor
    length: Tensor
    kv: Tensor
    k_prev: Tensor
    k_end: Tensor


def keys_of(rule: DeltaRule, frame: Frame, act: Tensor, kv: Tensor, scratch: Scratch) -> Keys:
    """The keys of W1 and W2 from the hidden activations act [m, G, F, h] of k, and kv
    [m, G, 2F, d]."""
    e, length = act, act.new_empty(0)
    prev, end = from_blocks(frame.prev), from_blocks(frame.end)
    if rule in W1_DELTA:
        length = torch.linalg.vector_norm(act, dim=-1, keepdim=True)
        e = torch.mul(act, length.clamp_min(NORM_EPS).reciprocal_(), out=scratch("e", *act.shape))
    k_prev = k_end = act.new_empty(0)
    if rule != "target":
        k = kv[:, :, : act.shape[2]]
        k_prev = torch.mul(k, prev, out=scratch("k prev", *k.shape))
        k_end = torch.mul(k, end, out=scratch("k end", *k.shape))
    return Keys(
        e=e,
        e_prev=torch.mul(e, prev, out=scratch("e prev", *act.shape)),
        e_end=torch.mul(e, end, out=scratch("e end", *act.shape)),
        length=length,
        kv=kv,
        k_prev=k_prev,
        k_end=k_end,
    )


def for_each_memory(memories: int, z: Tensor, name: str, scratch: Scratch) -> Tensor:
    """z [G, ...] once for each memory, [m, G, ...]: one copy, then products in one call."""
    return scratch(name, memories, *z.shape).copy_(z)


def _solve(rule: DeltaRule, frame: Frame, e: Tensor) -> Tensor:
    """(I + T)^-1 diag(eta) of the systems of every W1 and of W2 (see `Written`), from W1's keys
    [m, G, F, h]."""
    count, group, c, _ = frame.k.shape
    memories = e.shape[0]
    eta = frame.eta.transpose(0, 1)
    own, shared = memories if rule in W1_DELTA else 0, 1 if rule in W2_DELTA else 0
    diagonal = torch.diag_embed(eta.squeeze(-1))
    if own + shared == 0:
        return diagonal.expand(memories + 1, -1, -1, -1, -1)
    gram = e.new_empty(own + shared, group, count, c, c)
    if own:
        blocks = e.unflatten(2, (count, c)).flatten(0, 2)
        torch.bmm(blocks, blocks.mT, out=gram[:own].view(-1, c, c))
    if shared:
        k = frame.k.transpose(0, 1)
        torch.matmul(k, k.mT, out=gram[own])
    gram.mul_(frame.step.transpose(0, 1))
    inverse = unit_lower_inverse(gram.view(-1, c, c)).view_as(gram).mul_(eta.mT)
    return inverse if own else torch.cat([diagonal.expand(memories, -1, -1, -1, -1), inverse])


def write(
    rule: DeltaRule,
    frame: Frame,
    kv: Tensor,
    frozen: Memories,
    delta: Memories,
    base: Memories | None,
    scratch: Scratch,
    slot: object,
) -> Written:
    """Write tokens into all memories.

    frame: their own blocks [n, G, c, ...]; kv: [G, 2F, d], the keys, then the values; frozen: W
    at the start of each memory's chunk; delta: Deltas before the first of them; base: M_0.
    The record lies in `scratch` under names that begin with `slot`.
    """
    memories, group = frozen.w1.shape[:2]
    hidden, width = frozen.w2.shape[2:]
    tokens = kv.shape[1] // 2
    count, _, c, _ = frame.k.shape

    def buffer(name: object, *shape: int) -> Tensor:
        return scratch((slot, name), memories, group, *shape)

    all_kv = for_each_memory(memories, kv, "kv", scratch)
    z = mm(all_kv, frozen.w2.mT, buffer("z", 2 * tokens, hidden))
    r, g2 = buffer("r", tokens, width), None
    if rule == "target":
        act, act_v = gelu(z, scratch).split(tokens, 2)
        target, pulled = unit(mm(act_v, frozen.w1.mT, r).add_(kv[:, tokens:]))
        torch.sub(kv[:, :tokens], target, out=r)
    else:
        act, slope = gelu_slope(z[:, :, :tokens], scratch)
        act_v = gelu(z[:, :, tokens:], scratch)
        gap = torch.sub(act, act_v, out=act_v)
        mm(gap, frozen.w1.mT, r).add_(kv[:, :tokens] - kv[:, tokens:])
        pulled = mm(r, frozen.w1, buffer("pulled", tokens, hidden))
        g2 = slope.mul_(pulled)
    keys = keys_of(rule, frame, act, all_kv, scratch)
    g1 = scratch("g1", memories, group, tokens, width)
    if rule in W1_DELTA:
        square = keys.length * keys.length
        torch.mul(r, keys.length / square.add_(STEP_FLOOR), out=g1)
    else:
        g1.copy_(r)
    solve = _solve(rule, frame, keys.e)
    if base is not None:
        heads = base.w1.shape[1]
        if rule in W1_DELTA:
            add_mm(by_head(g1, heads), by_head(keys.e, heads), base.w1.mT)
        if g2 is not None and rule in W2_DELTA:
            add_mm(by_head(g2, heads), by_head(all_kv[:, :, :tokens], heads), base.w2.mT)

    deltas, us1, us2 = [delta], [], []
    for j in range(count):
        here = slice(j * c, (j + 1) * c)
        g1_j = g1[:, :, here]
        if rule in W1_DELTA:
            add_mm(g1_j, keys.e_prev[:, :, here], delta.w1.mT)
        u1 = mm(solve[:memories, :, j], g1_j, buffer(("u1", j), c, width))
        us1.append(u1)
        w1 = torch.mul(delta.w1, frame.total[j], out=buffer(("w1", j), width, hidden))
        w2 = torch.mul(delta.w2, frame.total[j], out=buffer(("w2", j), hidden, width))
        add_mm(w1, u1.mT, keys.e_end[:, :, here], alpha=-1)
        if g2 is not None:
            g2_j = g2[:, :, here]
            if rule in W2_DELTA:
                add_mm(g2_j, keys.k_prev[:, :, here], delta.w2.mT)
            solve2 = for_each_memory(memories, solve[-1, :, j], "solve2", scratch)
            u2 = mm(solve2, g2_j, buffer(("u2", j), c, hidden))
            us2.append(u2)
            add_mm(w2, u2.mT, keys.k_end[:, :, here], alpha=-1)
        delta = Memories(w1, w2)
        deltas.append(delta)
    e_mem = scratch((slot, "e mem"), group, tokens, hidden).copy_(keys.e[MEM])
    return Written(kv, deltas, us1, us2, z, r, pulled, solve, e_mem)
