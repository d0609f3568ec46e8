"""A block of C tokens written into one memory, and M_mem's read of it: a program per (row, head,
memory), states in global memory (Eqs. 83-90).

The closed form of `hope.scan.writes` and `hope.scan.reads`. W2 and all that is shaped like it are
transposed here: w1 and w2 are both [D, H]. The hidden width is worked on in tiles of TILE, which
are loaded, used and stored; nothing larger than [C, D], [D, TILE] or [C, C] is held. What joins
tiles are sums [C, D] or [C, C], so that a block takes passes over them:

1. `frozen_sums`: the frozen terms; A A^T, A Delta^T and A M_0^T of the hidden activations A;
2. `solve2`: U2, which is a tile's own once W1^T r is known;
3. `read_causal` or `read_start`, M_mem only;
4. `advance`: Delta after the block.

Shapes, with g = row * heads + head of G, m of the launch's memories, F = `length` tokens of the
buffers: k, v [G, F, D]; eta, log_alpha [G, F]; base [memories, heads, 2, D, H] (W1, then W2
transposed); state [memories, G, slots, 2, D, H]: Delta before block j in slot j % slots; hidden
[memories, G, kinds, C, H]: what passes hand on. reset: [rows, chunks] bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import (
    NORM_EPS,
    STEP_FLOOR,
    decays,
    dot,
    exact_dot,
    gelu,
    inverse_length,
    load_frozen,
    tile_at,
    unit_lower_inverse,
)


@triton.jit
def frozen_sums(
    k, v, prev, frozen, delta, base, z_k, z_v,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What keys and values [C, D] give at the frozen state; stores z_k = W2 k (and z_v) [C, H].

    r [C, D]; short [C], one over the target's length (TARGET only); with DELTA1 length [C] of the
    activations, lift [C, D] = act W1_{t-1}^T without the block's own writes, gram [C, C].
    """
    r = tl.full((C, D), 0.0, k.dtype)
    lift = tl.full((C, D), 0.0, k.dtype)
    gram = tl.full((C, C), 0.0, k.dtype)
    square = tl.full((C,), 0.0, k.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        f2 = load_frozen(frozen + D * H, base + D * H, at, INITIAL)
        z = dot(k, f2, DOT)
        tl.store(z_k + here, z)
        act, _, _ = gelu(z)
        z = dot(v, f2, DOT)
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
    short = square
    if TARGET:
        goal = v + r
        short = inverse_length(goal)
        r = k - goal * short[:, None]
    else:
        r += k - v
    return r, short, tl.sqrt(square), lift, gram


@triton.jit
def solve1(
    eta, ratio, r, length, lift, gram, C: tl.constexpr, DELTA1: tl.constexpr, DOT: tl.constexpr
):
    """U1 [C, D], the inverse of W1's system [C, C], and what makes W1's keys of activations [C]."""
    if DELTA1:
        inverse = 1.0 / tl.maximum(length, NORM_EPS)
        step = length / (length * length + STEP_FLOOR)
        g1 = r * step[:, None] + lift * inverse[:, None]
        strict = gram * ratio * (eta * inverse)[:, None] * inverse[None, :]
        system = unit_lower_inverse(strict, C, DOT)
        u1 = exact_dot(system, g1 * eta[:, None], DOT)
    else:
        inverse = length + 1.0  # length is zero
        system = ratio  # not looked at
        u1 = r * eta[:, None]
    return u1, system, inverse


@triton.jit
def key_inverse(k, eta, ratio, C: tl.constexpr, DELTA2: tl.constexpr, DOT: tl.constexpr):
    """(I + T)^-1 of W2's system: from k [C, D], eta [C], ratio [C, C]."""
    if DELTA2:
        inverse = unit_lower_inverse(dot(k, tl.trans(k), DOT) * ratio * eta[:, None], C, DOT)
    else:
        inverse = ratio  # not looked at
    return inverse


@triton.jit
def solve2(
    k, eta, prev, system, r, frozen, delta, base, z_k, u2,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, INITIAL: tl.constexpr,
    DELTA2: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Store U2 [C, H]; system: W2's `key_inverse`."""
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        _, slope, _ = gelu(tl.load(z_k + here))
        g2 = slope * dot(r, load_frozen(frozen, base, at, INITIAL), DOT)
        if DELTA2:
            g2 += dot(k * prev[:, None], tl.load(delta + D * H + at), DOT)
            if INITIAL:
                g2 += dot(k, tl.load(base + D * H + at), DOT)
            g2 = exact_dot(system, g2 * eta[:, None], DOT)
        else:
            g2 = g2 * eta[:, None]
        tl.store(u2 + here, g2)


@triton.jit
def read_causal(
    q, prev, across2, ratio, u1, inverse, delta, base, z_k, u2, z_q,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, SAVE: tl.constexpr,
    INITIAL: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The memory of each token's predecessor applied to q [C, D] (Eq. 83): out [C, D] and across1
    [C, C], ratio * (act e^T). SAVE: store z_q [C, H] and leave `out` unfinished.

    across2: ratio * (q k^T).
    """
    out = tl.full((C, D), 0.0, q.dtype)
    across1 = tl.full((C, C), 0.0, q.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        z = dot(q * prev[:, None], tl.load(delta + D * H + at), DOT)
        if not TARGET:
            z -= dot(across2, tl.load(u2 + here), DOT)
        if INITIAL:
            z += dot(q, tl.load(base + D * H + at), DOT)
        act, _, _ = gelu(z)
        act_k, _, _ = gelu(tl.load(z_k + here))
        across1 += dot(act, tl.trans(act_k * inverse[:, None]), DOT)
        if SAVE:
            tl.store(z_q + here, z)
        else:
            out += dot(act * prev[:, None], tl.trans(tl.load(delta + at)), DOT)
            if INITIAL:
                out += dot(act, tl.trans(tl.load(base + at)), DOT)
    across1 *= ratio
    if not SAVE:
        out += q - dot(across1, u1, DOT)
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
    k, end, total, u1, inverse, again, delta, after, base, z_k, u2,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Store Delta after the block, or, where the row starts `again` after it, that of M_0."""
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        act, _, _ = gelu(tl.load(z_k + here))
        d1 = tl.load(delta + at) * total
        d1 -= dot(tl.trans(u1), act * (inverse * end)[:, None], DOT)
        d2 = tl.load(delta + D * H + at) * total
        if not TARGET:
            d2 -= dot(tl.trans(k * end[:, None]), tl.load(u2 + here), DOT)
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
    """Whether a row starts again at the projection chunk that begins at token `end`, if one does."""
    chunk = end // CHUNK
    inside = (end % CHUNK == 0) & (chunk < chunks)
    return tl.load(reset + row * chunks + chunk, mask=inside, other=0) != 0


@triton.jit
def write_forward(
    q, out, k, v, eta, log_alpha, base, state, hidden, reset,
    q_stride, q_first, tokens, length, first_token, first, first_block, blocks, slots, heads,
    chunks,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    CHUNK: tl.constexpr, READ: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
    DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write blocks first_block, ..., whose tokens are from `first` on in the buffers, which begin at
    first_token of the sequence.

    READ: "causal" or "chunk_start", which writes `out` [G, T, D], or ""; OPEN: blocks that share a
    frozen state; CHUNK: tokens of a projection chunk; q: at g * q_stride + (q_first + token of the
    buffers) * D.
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    base += (m * heads + g % heads) * (2 * D * H)
    state += (m * count + g) * slots * (2 * D * H)
    z_k = hidden + (m * count + g) * (2 * C * H)
    u2 = z_k + C * H
    column = tl.arange(0, D)[None, :]
    for i in range(blocks):
        j = first_block + i
        frozen = state + ((j - j % OPEN) % slots) * (2 * D * H)
        delta = state + (j % slots) * (2 * D * H)
        after = state + ((j + 1) % slots) * (2 * D * H)
        local = first + i * C + tl.arange(0, C)
        here = g * length + local
        at = here[:, None] * D + column
        step = tl.load(eta + here)
        prev, end, total, prev_lost, total_lost, ratio = decays(tl.load(log_alpha + here), C)
        key = tl.load(k + at)
        r, short, size, lift, gram = frozen_sums(
            key, tl.load(v + at), prev, frozen, delta, base, z_k, u2,
            C, D, H, TILE, False, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        u1, system, inverse = solve1(step, ratio, r, size, lift, gram, C, DELTA1, DOT)
        tl.debug_barrier()
        if not TARGET:
            system = key_inverse(key, step, ratio, C, DELTA2, DOT)
            solve2(
                key, step, prev, system, r, frozen, delta, base, z_k, u2,
                C, D, H, TILE, INITIAL, DELTA2, DOT,
            )  # fmt: skip
            tl.debug_barrier()
        if READ != "":
            valid = ((first_token + local) < tokens)[:, None]
            source = q + g * q_stride + (q_first + local)[:, None] * D + column
            query = tl.load(source, mask=valid, other=0.0).to(key.dtype)
            if READ == "causal":
                across2 = dot(query, tl.trans(key), DOT) * ratio
                answer, across1 = read_causal(
                    query, prev, across2, ratio, u1, inverse, delta, base, z_k, u2, u2,
                    C, D, H, TILE, False, INITIAL, TARGET, DOT,
                )  # fmt: skip
            else:
                answer = read_start(query, frozen, base, C, D, H, TILE, INITIAL, DOT)
            target = out + (g * tokens + first_token + local)[:, None] * D + column
            tl.store(target, answer, mask=valid)
            tl.debug_barrier()
        again = False
        if HAS_RESET:
            last = first_token + first + (i + 1) * C
            again = starts_again(reset, g // heads, last, chunks, CHUNK)
        advance(
            key, end, total, u1, inverse, again, delta, after, base, z_k, u2,
            C, D, H, TILE, HAS_RESET, INITIAL, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
