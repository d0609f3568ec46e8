"""A block of C tokens written into one memory, and M_mem's read of it: a program per (row, head,
memory), states in global memory (Eqs. 83-90).

The closed form of `hope.scan.writes` and `hope.scan.reads`. W2 and all that is shaped like it are
transposed here: w1 and w2 are both [D, H]. The hidden width is worked on in tiles of TILE, which
are loaded, used and stored; nothing larger than [C, D], [D, TILE] or [C, C] is held. What joins
tiles are sums [C, D] or [C, C], so that a block takes passes over them:

1. `solve1`: the frozen terms; U1 from A A^T, A Delta^T, A M_0^T of the hidden activations A;
2. `solve2`: U2, which is a tile's own once W1^T r is known;
3. `read_causal` or `read_start`, M_mem only;
4. `advance`: Delta after the block.

Shapes, with g = row * heads + head of G, m of the launch's memories, F = `length` tokens of the
buffers: k, v [G, F, D]; eta, log_alpha [G, F]; base [memories, heads, 2, D, H] (W1, then W2
transposed); state [memories, G, slots, 2, D, H]: Delta before block j in slot j % slots; scratch
[memories, G, room]: what passes hand on. reset: [rows, chunks] bytes. Passes take pointers, to the
block's own k [C, D], eta [C] and so on: what they load anew they need not hold in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import (
    NORM_EPS,
    STEP_FLOOR,
    decay_after,
    decay_ratio,
    dot,
    exact_dot,
    gelu,
    inverse_length,
    load_frozen,
    load_rows,
    log_before,
    store_rows,
    tile_at,
    unit_lower_inverse,
)


@triton.jit
def frozen_sums(
    k, v, log_alpha, frozen, delta, base, z_k, z_v,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What keys and values give at the frozen state; stores z_k = W2 k (and z_v) [C, H].

    r [C, D]; short [C], one over the target's length (TARGET only); with DELTA1 length [C] of the
    activations, lift [C, D] = act W1_{t-1}^T without the block's own writes, gram [C, C].
    """
    key, value = load_rows(k, C, D), load_rows(v, C, D)
    prev = tl.exp(log_before(tl.load(log_alpha + tl.arange(0, C)), C))
    r = tl.full((C, D), 0.0, key.dtype)
    lift = tl.full((C, D), 0.0, key.dtype)
    gram = tl.full((C, C), 0.0, key.dtype)
    square = tl.full((C,), 0.0, key.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        f2 = load_frozen(frozen + D * H, base + D * H, at, INITIAL)
        z = dot(key, f2, DOT)
        tl.store(z_k + here, z)
        act, _, _ = gelu(z)
        z = dot(value, f2, DOT)
        if SAVE:
            tl.store(z_v + here, z)
        act_v, _, _ = gelu(z)
        f1 = load_frozen(frozen, base, at, INITIAL)
        if TARGET:
            r += dot(act_v, tl.trans(f1), DOT)
        else:
            r += dot(act - act_v, tl.trans(f1), DOT)
        if DELTA1:
            square += tl.sum(act * act, 1)
            gram += dot(act, tl.trans(act), DOT)
            lift += dot(act * prev[:, None], tl.trans(tl.load(delta + at)), DOT)
            if INITIAL:
                lift += dot(act, tl.trans(tl.load(base + at)), DOT)
    key, value = load_rows(k, C, D), load_rows(v, C, D)
    short = square
    if TARGET:
        goal = value + r
        short = inverse_length(goal)
        r = key - goal * short[:, None]
    else:
        r += key - value
    return r, short, tl.sqrt(square), lift, gram


@triton.jit
def solve1(
    k, v, eta, log_alpha, frozen, delta, base, z_k, z_v, residual, written1, system1,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Store r and U1 [C, D] (SAVE: and the inverse of W1's system [C, C], and z_v); returns short
    and length of `frozen_sums`, and what makes W1's keys of activations [C]."""
    r, short, length, lift, gram = frozen_sums(
        k, v, log_alpha, frozen, delta, base, z_k, z_v,
        C, D, H, TILE, SAVE, INITIAL, DELTA1, TARGET, DOT,
    )  # fmt: skip
    store_rows(residual, r, C, D)
    step = tl.load(eta + tl.arange(0, C))
    if DELTA1:
        inverse = 1.0 / tl.maximum(length, NORM_EPS)
        pace = length / (length * length + STEP_FLOOR)
        store_rows(written1, (r * pace[:, None] + lift * inverse[:, None]) * step[:, None], C, D)
        strict = gram * decay_ratio(tl.load(log_alpha + tl.arange(0, C)), C)
        strict = strict * (step * inverse)[:, None] * inverse[None, :]
        system = unit_lower_inverse(strict, C, DOT)
        if SAVE:
            store_rows(system1, system, C, C)
        tl.debug_barrier()
        g1 = load_rows(written1, C, D)
        tl.debug_barrier()
        store_rows(written1, exact_dot(system, g1, DOT), C, D)
    else:
        inverse = length + 1.0  # length is zero
        store_rows(written1, r * step[:, None], C, D)
    return short, length, inverse


@triton.jit
def solve2(
    k, eta, log_alpha, residual, frozen, delta, base, z_k, u2, system2,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, DELTA2: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Store U2 [C, H] (SAVE: and the inverse of W2's system [C, C])."""
    i = tl.arange(0, C)
    step = tl.load(eta + i)
    key = load_rows(k, C, D)
    if DELTA2:
        strict = dot(key, tl.trans(key), DOT) * decay_ratio(tl.load(log_alpha + i), C)
        system = unit_lower_inverse(strict * step[:, None], C, DOT)
        if SAVE:
            store_rows(system2, system, C, C)
        prev = tl.exp(log_before(tl.load(log_alpha + i), C))
    r = load_rows(residual, C, D)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        _, slope, _ = gelu(tl.load(z_k + here))
        g2 = slope * dot(r, load_frozen(frozen, base, at, INITIAL), DOT)
        if DELTA2:
            g2 += dot(key, tl.load(delta + D * H + at), DOT) * prev[:, None]
            if INITIAL:
                g2 += dot(key, tl.load(base + D * H + at), DOT)
            g2 = exact_dot(system, g2 * step[:, None], DOT)
        else:
            g2 = g2 * step[:, None]
        tl.store(u2 + here, g2)


@triton.jit
def load_queries(pointer, valid, like, C: tl.constexpr, D: tl.constexpr):
    """Rows [C, D] where valid [C], in the dtype that `like` points to, else zero."""
    return tl.load(pointer + tile_at(0, C, D, D), mask=valid[:, None], other=0.0).to(
        like.dtype.element_ty
    )


@triton.jit
def read_causal(
    q, valid, k, log_alpha, inverse, written1, delta, base, z_k, u2, z_q,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The memory of each token's predecessor applied to q [C, D] (Eq. 83): out [C, D] and across1
    [C, C], ratio * (act e^T). SAVE: store z_q [C, H] and leave `out` unfinished."""
    decay = tl.load(log_alpha + tl.arange(0, C))
    prev = tl.exp(log_before(decay, C))
    query = load_queries(q, valid, k, C, D)
    across2 = dot(query, tl.trans(load_rows(k, C, D)), DOT) * decay_ratio(decay, C)
    out = tl.full((C, D), 0.0, query.dtype)
    across1 = tl.full((C, C), 0.0, query.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        z = dot(query, tl.load(delta + D * H + at), DOT) * prev[:, None]
        if not TARGET:
            z -= dot(across2, tl.load(u2 + here), DOT)
        if INITIAL:
            z += dot(query, tl.load(base + D * H + at), DOT)
        act, _, _ = gelu(z)
        act_k, _, _ = gelu(tl.load(z_k + here))
        across1 += dot(act, tl.trans(act_k * inverse[:, None]), DOT)
        if SAVE:
            tl.store(z_q + here, z)
        else:
            out += dot(act * prev[:, None], tl.trans(tl.load(delta + at)), DOT)
            if INITIAL:
                out += dot(act, tl.trans(tl.load(base + at)), DOT)
    across1 *= decay_ratio(tl.load(log_alpha + tl.arange(0, C)), C)
    if not SAVE:
        out += load_queries(q, valid, k, C, D) - dot(across1, load_rows(written1, C, D), DOT)
    return out, across1


@triton.jit
def read_start(
    q, frozen, base,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, INITIAL: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The frozen memory applied to q [C, D]: M(q) [C, D]."""
    out = q
    for first in range(0, H, TILE):
        at = tile_at(first, D, H, TILE)
        z = dot(q, load_frozen(frozen + D * H, base + D * H, at, INITIAL), DOT)
        act, _, _ = gelu(z)
        out += dot(act, tl.trans(load_frozen(frozen, base, at, INITIAL)), DOT)
    return out


@triton.jit
def advance(
    k, log_alpha, inverse, written1, again, delta, after, base, z_k, u2,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Store Delta after the block, or, where the row starts `again` after it, that of M_0."""
    decay = tl.load(log_alpha + tl.arange(0, C))
    total = tl.exp(tl.sum(decay, 0))
    end = decay_after(decay, C)
    key = load_rows(k, C, D) * end[:, None]
    u1 = load_rows(written1, C, D)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        act, _, _ = gelu(tl.load(z_k + here))
        d1 = tl.load(delta + at) * total
        d1 -= dot(tl.trans(u1), act * (inverse * end)[:, None], DOT)
        d2 = tl.load(delta + D * H + at) * total
        if not TARGET:
            d2 -= dot(tl.trans(key), tl.load(u2 + here), DOT)
        if HAS_RESET:
            if INITIAL:
                d1, d2 = tl.where(again, 0.0, d1), tl.where(again, 0.0, d2)
            else:
                d1 = tl.where(again, tl.load(base + at), d1)
                d2 = tl.where(again, tl.load(base + D * H + at), d2)
        tl.store(after + at, d1)
        tl.store(after + D * H + at, d2)


@triton.jit
def starts_again(reset, row, end, chunks, CHUNK: tl.constexpr):
    """Whether a row starts again at token `end`: at the projection chunk that begins there."""
    chunk = end // CHUNK
    inside = (end % CHUNK == 0) & (chunk < chunks)
    return tl.load(reset + row * chunks + chunk, mask=inside, other=0) != 0


@triton.jit
def write_forward(
    q, out, k, v, eta, log_alpha, base, state, scratch, reset,
    q_stride, q_first, tokens, length, first_token, first, first_block, blocks, slots, room, heads,
    chunks,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    CHUNK: tl.constexpr, READ: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
    DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write blocks first_block, ..., whose tokens are from `first` on in the buffers, which begin
    at first_token of the sequence.

    READ: "causal" or "chunk_start", which writes `out` [G, T, D], or ""; OPEN: blocks that share a
    frozen state; CHUNK: tokens of a projection chunk; q: at g * q_stride + (q_first + token of the
    buffers) * D. scratch: 2 C H and 2 C D elements for each program.
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    base += (m * heads + g % heads) * (2 * D * H)
    state += (m * count + g) * slots * (2 * D * H)
    z_k = scratch + (m * count + g) * room
    u2, residual = z_k + C * H, z_k + 2 * C * H
    written1 = residual + C * D
    for i in range(blocks):
        j = first_block + i
        frozen = state + ((j - j % OPEN) % slots) * (2 * D * H)
        delta = state + (j % slots) * (2 * D * H)
        after = state + ((j + 1) % slots) * (2 * D * H)
        local = first + i * C
        here = g * length + local
        key, decay = k + here * D, log_alpha + here
        short, size, inverse = solve1(
            key, v + here * D, eta + here, decay, frozen, delta, base, z_k, z_k, residual,
            written1, z_k, C, D, H, TILE, False, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
        if not TARGET:
            solve2(
                key, eta + here, decay, residual, frozen, delta, base, z_k, u2, z_k,
                C, D, H, TILE, False, INITIAL, DELTA2, DOT,
            )  # fmt: skip
            tl.debug_barrier()
        if READ != "":
            valid = (first_token + local + tl.arange(0, C)) < tokens
            query = q + g * q_stride + (q_first + local) * D
            if READ == "causal":
                answer, across1 = read_causal(
                    query, valid, key, decay, inverse, written1, delta, base, z_k, u2, u2,
                    C, D, H, TILE, False, INITIAL, TARGET, DOT,
                )  # fmt: skip
            else:
                asked = load_queries(query, valid, k, C, D)
                answer = read_start(asked, frozen, base, C, D, H, TILE, INITIAL, DOT)
            at = out + (g * tokens + first_token + local) * D + tile_at(0, C, D, D)
            tl.store(at, answer, mask=valid[:, None])
            tl.debug_barrier()
        again = False
        if HAS_RESET:
            again = starts_again(reset, g // heads, first_token + local + C, chunks, CHUNK)
        advance(
            key, decay, inverse, written1, again, delta, after, base, z_k, u2,
            C, D, H, TILE, HAS_RESET, INITIAL, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
