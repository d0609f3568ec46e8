"""A block of C tokens written into one memory, and M_mem's read of it: a program per (row, head,
memory), states in global memory (Eqs. 83-90).

The closed form of `hope.scan.writes` and `hope.scan.reads`. W2 and all that is shaped like it are
transposed here: w1 and w2 are both [D, H]. The hidden width is worked on in tiles of TILE, which
are loaded, used and stored; nothing larger than [C, D], [D, TILE] or [C, C] is held. What joins
tiles are sums [C, D] or [C, C], so that a block takes two passes over them: `solve1`, the frozen
terms and U1 from A A^T, A Delta^T, A M_0^T of the hidden activations A; then, W1^T r being a
tile's own, U2, the read and Delta after the block.

Shapes, with g = row * heads + head of G, m of the launch's memories, F = `length` tokens of the
buffers: k, v [G, F, D]; eta [G, F]; frames [G, frame_blocks, frame_size], see
`hope.scan.kernels.frames`; fresh [memories, heads, 2, D, H]: M_0 (W1, then W2 transposed), base:
the same as products take it, in bfloat16 if they do; state [memories, G, 2, D, H]: Delta, moved
on in place; frozen [memories, G, opened, 2, D, H], like base: W at the start of memory chunk c in
slot c % opened; deltas [memories, G, blocks, 2, D, H], like base: Delta before every block; work
[memories, G, works, room]: what passes hand on, and what backward needs. reset: [rows, chunks]
bytes. Functions take pointers, to the block's own k [C, D], eta [C] and so on.

A block's part of `work` has WIDE matrices [C, H]: act and slope of k, and, kept for backward, U2,
curvature of k, act and slope of v, and with a causal read act and slope of q; then, for backward,
r and U1 [C, D], the inverse of W1's system and across1 [C, C], `short`, `extent`, `inverse` and
room for another [C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.frames import load_decays, load_queries
from hope.scan.kernels.primitives import (
    AHEAD,
    NORM_EPS,
    STEP_FLOOR,
    dot,
    exact_dot,
    gelu,
    inverse_length,
    launched,
    load_rows,
    operand,
    store_rows,
    tile_at,
    unit_lower_inverse,
)
from hope.scan.kernels.states import store_whole


def work_size(wide: int, block: int, width: int, hidden: int, keep: bool) -> int:
    """Elements of a block's part of `work`."""
    narrow = 2 * block * width + 2 * block * block + 4 * block
    return wide * block * hidden + (narrow if keep else 0)


def work_matrices(causal: bool, keep: bool) -> int:
    """WIDE of a launch, from whether it reads causally and keeps what backward needs."""
    return (8 if causal else 6) if keep else 2


@triton.jit
def frozen_sums(
    k, v, prev, frozen, delta, base, work,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What keys and values give at the frozen state; stores act, slope (SAVE: and curvature) of k
    and, with SAVE, act and slope of v.

    (act - act_v) W1^T [C, D], with TARGET act_v W1^T; with DELTA1 |act|^2 [C], lift [C, D] =
    act W1_{t-1}^T without the block's own writes, and gram [C, C].
    """
    r = tl.full((C, D), 0.0, prev.dtype)
    lift = tl.full((C, D), 0.0, prev.dtype)
    gram = tl.full((C, C), 0.0, prev.dtype)
    square = tl.full((C,), 0.0, prev.dtype)
    keys, values = operand(load_rows(k, C, D), DOT), operand(load_rows(v, C, D), DOT)
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        f1, f2 = tl.load(frozen + at), tl.load(frozen + D * H + at)
        act, slope, curvature = gelu(dot(keys, f2, DOT))
        tl.store(work + here, act)
        tl.store(work + C * H + here, slope)
        act_v, slope_v, _ = gelu(dot(values, f2, DOT))
        if SAVE:
            tl.store(work + 3 * C * H + here, curvature)
            tl.store(work + 4 * C * H + here, act_v)
            tl.store(work + 5 * C * H + here, slope_v)
        if TARGET:
            r += dot(act_v, tl.trans(f1), DOT)
        else:
            r += dot(act - act_v, tl.trans(f1), DOT)
        if DELTA1:
            square += tl.sum(act * act, 1)
            acts = operand(act, DOT)
            gram += dot(acts, tl.trans(acts), DOT)
            lift += dot(act * prev[:, None], tl.trans(tl.load(delta + at)), DOT)
            if INITIAL:
                lift += dot(acts, tl.trans(tl.load(base + at)), DOT)
    return r, square, lift, gram


@triton.jit
def solve1(
    k, v, eta, frame, frozen, delta, base, work, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """r and U1 [C, D], and what makes W1's keys of activations [C]."""
    i = tl.arange(0, C)
    prev = tl.load(frame + 3 * C * C + i)
    r, square, lift, gram = frozen_sums(
        k, v, prev, frozen, delta, base, work, C, D, H, TILE, SAVE, INITIAL, DELTA1, TARGET, DOT
    )
    # Loaded here, and keys and values again, so that the loop above has their registers.
    key, value = load_rows(k, C, D), load_rows(v, C, D)
    step, ratio = tl.load(eta + i), load_rows(frame, C, C)
    short, length = square, tl.sqrt(square)
    if TARGET:
        goal = value + r
        short = inverse_length(goal)
        r = key - goal * short[:, None]
    else:
        r += key - value
    if DELTA1:
        inverse = 1.0 / tl.maximum(length, NORM_EPS)
        pace = length / (length * length + STEP_FLOOR)
        strict = gram * ratio * (step * inverse)[:, None] * inverse[None, :]
        system = unit_lower_inverse(strict, C, DOT)
        if SAVE:
            store_rows(kept + 2 * C * D, system, C, C)
        u1 = (r * pace[:, None] + lift * inverse[:, None]) * step[:, None]
        u1 = exact_dot(system, u1, DOT)
    else:
        inverse = length + 1.0  # length is zero
        u1 = r * step[:, None]
    if SAVE:
        store_rows(kept, r, C, D)
        store_rows(kept + C * D, u1, C, D)
        rows = kept + 2 * C * D + 2 * C * C + i
        tl.store(rows, short)
        tl.store(rows + C, length)
        tl.store(rows + 2 * C, inverse)
    return r, u1, inverse


@triton.jit
def read_start(
    q, frozen,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The frozen memory applied to q [C, D]: M(q) [C, D]."""
    out = q
    queries = operand(q, DOT)
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at = tile_at(first, D, H, TILE)
        f1, f2 = tl.load(frozen + at), tl.load(frozen + D * H + at)
        act, _, _ = gelu(dot(queries, f2, DOT))
        out += dot(act, tl.trans(f1), DOT)
    return out


@triton.jit
def solve2_and_advance(
    k, eta, frame, r, u1, inverse, query, closes, again, frozen, after, state, delta, base, fresh,
    work, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
    SAVE: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA2: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Move Delta over the block, or, where the row starts `again` after it, to that of M_0, and
    store W `after` it where its chunk `closes`. With a causal READ returns the memory of each
    token's predecessor applied to query [C, D] (Eq. 83); SAVE stores what that needs instead, and
    `delta`, Delta before the block."""
    prev, end, prev_lost, total, total_lost = load_decays(frame, C)
    step = tl.load(eta + tl.arange(0, C))
    key = load_rows(k, C, D)
    keys, ended = operand(key, DOT), operand(key * end[:, None], DOT)
    residual, written = operand(r, DOT), operand(u1, DOT)
    reach = inverse * end
    if DELTA2:
        system = load_rows(frame + C * C, C, C)
    if READ:
        queries = operand(query, DOT)
        if not TARGET:
            across2 = operand(load_rows(frame + 2 * C * C, C, C), DOT)
    out = tl.full((C, D), 0.0, key.dtype)
    across1 = tl.full((C, C), 0.0, key.dtype)
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        at2 = at + D * H
        act = tl.load(work + here)
        d1, d2 = tl.load(state + at), tl.load(state + at2)
        n1, n2 = d1 * total, d2 * total
        d1, d2 = operand(d1, DOT), operand(d2, DOT)
        if SAVE:
            tl.store(delta + at, d1)
            tl.store(delta + at2, d2)
        if INITIAL:
            b2 = tl.load(base + at2)
        if not TARGET:
            u2 = tl.load(work + C * H + here) * dot(residual, tl.load(frozen + at), DOT)
            if DELTA2:
                u2 += dot(keys, d2, DOT) * prev[:, None]
                if INITIAL:
                    u2 += dot(keys, b2, DOT)
                u2 = exact_dot(system, u2 * step[:, None], DOT)
            else:
                u2 = u2 * step[:, None]
            if SAVE:
                tl.store(work + 2 * C * H + here, u2)
            u2 = operand(u2, DOT)
            n2 -= dot(tl.trans(ended), u2, DOT)
        if READ:
            z = dot(queries, d2, DOT) * prev[:, None]
            if not TARGET:
                z -= dot(across2, u2, DOT)
            if INITIAL:
                z += dot(queries, b2, DOT)
            act_q, slope_q, _ = gelu(z)
            across1 += dot(act_q, tl.trans(act * inverse[:, None]), DOT)
            if SAVE:
                tl.store(work + 6 * C * H + here, act_q)
                tl.store(work + 7 * C * H + here, slope_q)
            else:
                out += dot(act_q * prev[:, None], tl.trans(d1), DOT)
                if INITIAL:
                    out += dot(act_q, tl.trans(tl.load(base + at)), DOT)
        n1 -= dot(tl.trans(written), act * reach[:, None], DOT)
        if HAS_RESET:
            if INITIAL:
                n1, n2 = tl.where(again, 0.0, n1), tl.where(again, 0.0, n2)
            else:
                n1 = tl.where(again, tl.load(fresh + at), n1)
                n2 = tl.where(again, tl.load(fresh + at2), n2)
        tl.store(state + at, n1)
        tl.store(state + at2, n2)
        if closes:
            store_whole(after, fresh, at, n1, INITIAL)
            store_whole(after, fresh, at2, n2, INITIAL)
    if READ:
        across1 *= load_rows(frame, C, C)
        if SAVE:
            store_rows(kept + 2 * C * D + C * C, across1, C, C)
        else:
            out += query - dot(across1, written, DOT)
    return out


@triton.jit
def starts_again(reset, row, end, chunks, CHUNK: tl.constexpr):
    """Whether a row starts again at token `end`: at the projection chunk that begins there."""
    chunk = end // CHUNK
    inside = (end % CHUNK == 0) & (chunk < chunks)
    return tl.load(reset + row * chunks + chunk, mask=inside, other=0) != 0


@launched
def write_forward(
    q, out, k, v, eta, frames, base, fresh, state, frozen, deltas, work, reset,
    q_stride, q_first, tokens, length, first_token, first, first_block, blocks, frame_blocks,
    opened, works, room, heads, chunks,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    CHUNK: tl.constexpr, READ: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr, DELTA2: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write blocks first_block, ..., whose tokens are from `first` on in the buffers, which begin
    at first_token of the sequence.

    READ: "causal" or "chunk_start", or "" for none; SAVE: keep what backward needs in `work` and
    `deltas`, else write the read to `out` [G, T, D]; OPEN: blocks that share a frozen state;
    CHUNK: tokens of a projection chunk; q: at g * q_stride + (q_first + token of the buffers) * D.
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    size = 2 * D * H
    base += (m * heads + g % heads) * size
    fresh += (m * heads + g % heads) * size
    state += (m * count + g) * size
    frozen += (m * count + g) * opened * size
    deltas += (m * count + g) * works * size
    work += (m * count + g) * works * room
    frames += (g * frame_blocks + first_block) * (3 * C * C + 4 * C)
    for i in range(blocks):
        j = first_block + i
        start = frozen + (j // OPEN % opened) * size
        after = frozen + ((j // OPEN + 1) % opened) * size
        delta = deltas + (j % works) * size
        local = first + i * C
        here = g * length + local
        frame = frames + i * (3 * C * C + 4 * C)
        block = work + (j % works) * room
        kept = block + WIDE * C * H
        r, u1, inverse = solve1(
            k + here * D, v + here * D, eta + here, frame, start, state, base, block, kept,
            C, D, H, TILE, SAVE, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        valid = (first_token + local + tl.arange(0, C)) < tokens
        query = r
        if READ != "":
            query = load_queries(q + g * q_stride + (q_first + local) * D, valid, k, C, D)
        at = out + (g * tokens + first_token + local) * D + tile_at(0, C, D, D)
        if (READ == "chunk_start") and (not SAVE):
            answer = read_start(query, start, D, H, TILE, DOT)
            tl.store(at, answer, mask=valid[:, None])
        again = False
        if HAS_RESET:
            again = starts_again(reset, g // heads, first_token + local + C, chunks, CHUNK)
        tl.debug_barrier()
        answer = solve2_and_advance(
            k + here * D, eta + here, frame, r, u1, inverse, query, j % OPEN == OPEN - 1, again,
            start, after, state, delta, base, fresh, block, kept,
            C, D, H, TILE, READ == "causal", SAVE, HAS_RESET, INITIAL, DELTA2, TARGET, DOT,
        )  # fmt: skip
        if (READ == "causal") and (not SAVE):
            tl.store(at, answer, mask=valid[:, None])
        tl.debug_barrier()
