"""Derivative of a block of C tokens of one memory: the counterpart of `hope.scan.kernels.writes`,
which says how the hidden width is tiled; the mathematics is `hope.scan.writes_backward`'s.

From what the forward pass kept, three passes over the tiles (S: the gradient of W after the block):

1. `through_w2`: the read's derivative; X2, the gradient of W2's right-hand sides; S2 before the
   block; the sum that becomes X1;
2. `through_w1`: the gradient of W1's keys, that of r, and S1 before the block;
3. `through_frozen`: into the chunk-start W, k and v.

rows [C]: what the decay before each token multiplies; p [C]: <dU, U>, the gradient of log eta.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.frames import load_decays, load_queries
from hope.scan.kernels.primitives import (
    NORM_EPS,
    STEP_FLOOR,
    dot,
    exact_dot,
    load_rows,
    log_decay_gradient,
    operand,
    store_rows,
    tile_at,
    unit_backward,
)
from hope.scan.kernels.projections import read_start_backward
from hope.scan.kernels.states import (
    load_both,
    load_frozen,
    load_gradient,
    move_frozen,
    store_gradient,
)
from hope.scan.kernels.writes import starts_again


@triton.jit
def through_w2(
    k, eta, frame, inverse, given, query, across2, d_across1, again, delta, base, d_base, d_state,
    work, dk, dq, valid,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Stores X2 [C, H] over U2, S2, dq and what W2 sends to dk [C, D]; returns what S1 sends to U1
    [C, D], rows, p and <S, Delta after the block>, where W1's is still to be completed."""
    i = tl.arange(0, C)
    prev, end, prev_lost, total, total_lost = load_decays(frame, C)
    step = tl.load(eta + i)
    key = load_rows(k, C, D)
    keys = operand(key, DOT)
    if DELTA2:
        system = load_rows(frame + C * C, C, C)
    if READ:
        sent_back, queries = operand(given, DOT), operand(query, DOT)
        d_across1, across2s = operand(d_across1, DOT), operand(across2, DOT)
    du1 = tl.full((C, D), 0.0, key.dtype)
    d_key = tl.full((C, D), 0.0, key.dtype)
    d_key_own = tl.full((C, D), 0.0, key.dtype)
    d_query = tl.full((C, D), 0.0, key.dtype)
    d_query_own = tl.full((C, D), 0.0, key.dtype)
    d_across2 = tl.full((C, C), 0.0, key.dtype)
    gram = tl.full((C, C), 0.0, key.dtype)
    along = tl.full((D, TILE), 0.0, key.dtype)
    moved = tl.full((C, TILE), 0.0, key.dtype)
    p = tl.full((C, TILE), 0.0, key.dtype)
    bound = tl.full((C, TILE), 0.0, key.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        at2 = at + D * H
        s1, _ = load_gradient(d_state, at, again, HAS_RESET)
        s2, sent = load_gradient(d_state, at2, again, HAS_RESET)
        d1, d2 = tl.load(delta + at), tl.load(delta + at2)
        along += s1 * d1 + s2 * d2
        before = s2 * total
        d2, s2 = operand(d2, DOT), operand(s2, DOT)
        if INITIAL:
            b2 = operand(tl.load(base + at2), DOT)
        gone = tl.full((D, TILE), 0.0, key.dtype)
        e = tl.load(work + here) * inverse[:, None]
        du1 -= dot(e * end[:, None], tl.trans(s1), DOT)
        if READ:
            act_q = tl.load(work + 6 * C * H + here)
            d_act = dot(sent_back, d1, DOT) * prev[:, None] + dot(d_across1, e, DOT)
            moved += d_act * act_q
            if INITIAL:
                d_act += dot(sent_back, tl.load(base + at), DOT)
            dz = d_act * tl.load(work + 7 * C * H + here)
            moved_dz, own_dz = operand(dz * prev[:, None], DOT), operand(dz, DOT)
            d_query += dot(moved_dz, tl.trans(d2), DOT)
            before += dot(tl.trans(queries), moved_dz, DOT)
            if INITIAL:
                d_query_own += dot(own_dz, tl.trans(b2), DOT)
                gone += dot(tl.trans(queries), dz * prev_lost[:, None], DOT)
        if not TARGET:
            u = tl.load(work + 2 * C * H + here)
            us = operand(u, DOT)
            d_key -= dot(u * end[:, None], tl.trans(s2), DOT)
            du = -dot(keys, s2, DOT) * end[:, None]
            bound += du * u
            if READ:
                d_across2 -= dot(own_dz, tl.trans(us), DOT)
                du -= dot(tl.trans(across2s), own_dz, DOT)
            if DELTA2:
                du = exact_dot(tl.trans(system), du, DOT)
            p += du * u
            du *= step[:, None]
            tl.store(work + 2 * C * H + here, du)
            if DELTA2:
                moved_du, own_du = operand(du * prev[:, None], DOT), operand(du, DOT)
                gram += dot(own_du, tl.trans(us), DOT)
                d_key += dot(moved_du, tl.trans(d2), DOT)
                before += dot(tl.trans(keys), moved_du, DOT)
                if INITIAL:
                    d_key_own += dot(own_du, tl.trans(b2), DOT)
                    gone += dot(tl.trans(keys), du * prev_lost[:, None], DOT)
        store_gradient(
            d_state, d_base, at2, before, sent, gone, total_lost, again, HAS_RESET, INITIAL
        )
    boundary = total * tl.sum(along) + tl.sum(bound)
    rows = tl.sum(moved, 1)
    if DELTA2:
        gram *= load_rows(frame, C, C)
        d_key -= dot(gram + tl.trans(gram), keys, DOT)
        if INITIAL:
            rows -= tl.sum(d_key_own * key, 1)
            d_key += d_key_own
    if READ:
        rows += tl.sum(d_query * query, 1)
        d_query += d_query_own + given
        if not TARGET:
            rows += tl.sum(d_across2 * across2, 1)
            d_across2 *= load_rows(frame, C, C)
            d_query += dot(d_across2, keys, DOT)
            d_key += dot(tl.trans(d_across2), queries, DOT)
        tl.store(dq + tile_at(0, C, D, D), d_query, mask=valid[:, None])
    store_rows(dk, d_key, C, D)
    return du1, rows, tl.sum(p, 1), boundary


@triton.jit
def through_w1(
    frame, inverse, u1, x1, given, d_across1, again, rows, frozen, delta, base, d_base, d_state,
    work, de,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, OPEN: tl.constexpr,
    READ: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From X1: stores the gradient of W1's keys [C, H] and S1; returns what W2's steps send to r
    [C, D], the gradient of the keys along each [C], and rows."""
    prev, end, prev_lost, total, total_lost = load_decays(frame, C)
    x, written = operand(x1, DOT), operand(u1, DOT)
    if DELTA1:
        gram = dot(x, tl.trans(written), DOT) * load_rows(frame, C, C)
        gram = operand(gram + tl.trans(gram), DOT)
    if READ:
        sent_back, d_across1 = operand(given, DOT), operand(d_across1, DOT)
    grad_r = tl.full((C, D), 0.0, x1.dtype)
    along = tl.full((C, TILE), 0.0, x1.dtype)
    own_along = tl.full((C, TILE), 0.0, x1.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        s1, sent = load_gradient(d_state, at, again, HAS_RESET)
        d1, b1, f1 = load_both(delta, frozen, base, at, OPEN, INITIAL)
        e = tl.load(work + here) * inverse[:, None]
        grad = -dot(written, s1, DOT) * end[:, None]
        before = s1 * total
        gone = tl.full((D, TILE), 0.0, x1.dtype)
        if DELTA1:
            grad += dot(x, d1, DOT) * prev[:, None]
            grad -= dot(gram, e, DOT)
            before += dot(tl.trans(x), e * prev[:, None], DOT)
            if INITIAL:
                own = dot(x, b1, DOT)
                grad += own
                own_along += own * e
                gone += dot(tl.trans(x), e * prev_lost[:, None], DOT)
        if READ:
            act_q = tl.load(work + 6 * C * H + here)
            grad += dot(tl.trans(d_across1), act_q, DOT)
            before += dot(tl.trans(sent_back), act_q * prev[:, None], DOT)
            if INITIAL:
                gone += dot(tl.trans(sent_back), act_q * prev_lost[:, None], DOT)
        tl.store(de + here, grad)
        along += grad * e
        if not TARGET:
            through = tl.load(work + 2 * C * H + here) * tl.load(work + C * H + here)
            grad_r += dot(through, tl.trans(f1), DOT)
        store_gradient(
            d_state, d_base, at, before, sent, gone, total_lost, again, HAS_RESET, INITIAL
        )
    return grad_r, tl.sum(along, 1), rows - tl.sum(own_along, 1)


@triton.jit
def through_frozen(
    k, v, r, dr, short, along, along_act, inverse, rows, opens, frozen, base, d_state,
    d_frozen, work, de, dk, dv,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, OPEN: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From the gradients of the frozen terms: adds to dk, stores dv [C, D], moves what the frozen
    W gets; returns rows.

    dr [C, D]: the gradient of r; along, along_act [C]: the gradient of W1's keys along them, and
    that of the activations along the keys.
    """
    key, value = load_rows(k, C, D), load_rows(v, C, D)
    grad_r = dr
    if TARGET:
        grad_r = -unit_backward(dr, key - r, short)
    keys, values = operand(key, DOT), operand(value, DOT)
    residual, back = operand(r, DOT), operand(grad_r, DOT)
    d_key = tl.full((C, D), 0.0, key.dtype)
    d_value = tl.full((C, D), 0.0, key.dtype)
    turned = tl.full((C, TILE), 0.0, key.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        act, slope = tl.load(work + here), tl.load(work + C * H + here)
        act_v, slope_v = tl.load(work + 4 * C * H + here), tl.load(work + 5 * C * H + here)
        da = tl.load(de + here)
        if DELTA1:
            e = act * inverse[:, None]
            da = (da - e * along[:, None]) * inverse[:, None] + e * along_act[:, None]
        f1 = operand(load_frozen(frozen, base, at, INITIAL), DOT)
        if TARGET:
            dz_k = da * slope
            dz_v = dot(back, f1, DOT) * slope_v
            df = dot(tl.trans(back), act_v, DOT)
        else:
            x = tl.load(work + 2 * C * H + here)
            through = x * dot(residual, f1, DOT)
            turned += through * slope
            d_act = dot(back, f1, DOT)
            dz_k = through * tl.load(work + 3 * C * H + here) + (da + d_act) * slope
            dz_v = -d_act * slope_v
            df = dot(tl.trans(residual), x * slope, DOT)
            df += dot(tl.trans(back), act - act_v, DOT)
        move_frozen(d_state + at, d_frozen + at, df, opens, OPEN)
        dz_k, dz_v = operand(dz_k, DOT), operand(dz_v, DOT)
        df = dot(tl.trans(keys), dz_k, DOT) + dot(tl.trans(values), dz_v, DOT)
        move_frozen(d_state + D * H + at, d_frozen + D * H + at, df, opens, OPEN)
        f2 = operand(load_frozen(frozen + D * H, base + D * H, at, INITIAL), DOT)
        d_key += dot(dz_k, tl.trans(f2), DOT)
        d_value += dot(dz_v, tl.trans(f2), DOT)
    store_rows(dk, d_key + dr + load_rows(dk, C, D), C, D)
    if TARGET:
        store_rows(dv, d_value + grad_r, C, D)
    else:
        store_rows(dv, d_value - dr, C, D)
    return rows - tl.sum(turned, 1)


@triton.jit
def write_backward(
    q, d_out, dq, k, v, eta, frames, dk, dv, d_log_eta, d_log_alpha,
    base, d_base, d_state, d_frozen, state, work, scratch, reset,
    q_stride, q_first, tokens, length, first_token, first, first_block, blocks, frame_blocks,
    slots, works, room, heads, chunks,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    CHUNK: tl.constexpr, READ: tl.constexpr, WIDE: tl.constexpr, HAS_RESET: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `write_forward`, from what it kept, d_out [G, T, D] (of M_mem) and d_state
    [memories, G, 2, D, H], the gradient of W after the blocks, which becomes that of W before them.

    Writes dq, laid out as q, and each memory's dk, dv [memories, G, F, D], d_log_eta, d_log_alpha
    [memories, G, F]; adds to d_base, like d_state, what M_0 gets; spoils `work`. d_frozen (OPEN > 1
    only): zeros like d_state, and zeros again afterwards. scratch: [memories, G, C, H].
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    size = 2 * D * H
    base += (m * heads + g % heads) * size
    state += (m * count + g) * slots * size
    work += (m * count + g) * works * room
    d_base += (m * count + g) * size
    d_state += (m * count + g) * size
    d_frozen += (m * count + g) * size
    de = scratch + (m * count + g) * (C * H)
    frames += (g * frame_blocks + first_block) * (3 * C * C + 4 * C)
    i = tl.arange(0, C)
    for back in range(blocks):
        ahead = blocks - 1 - back
        j = first_block + ahead
        frozen = state + ((j - j % OPEN) % slots) * size
        delta = state + (j % slots) * size
        local = first + ahead * C
        here = g * length + local
        key, value, step = k + here * D, v + here * D, eta + here
        d_key = dk + (m * count * length + here) * D
        frame = frames + ahead * (3 * C * C + 4 * C)
        block = work + (j % works) * room
        kept = block + WIDE * C * H
        u1 = load_rows(kept + C * D, C, D)
        lengths = kept + 2 * C * D + 2 * C * C + i
        inverse = tl.load(lengths + 2 * C)
        valid = (first_token + local + i) < tokens
        at_q = (q_first + local) * D + g * q_stride
        given, query, across2, d_across1 = u1, u1, u1, u1
        if READ != "":
            at_out = (g * tokens + first_token + local) * D
            given = load_queries(d_out + at_out, valid, k, C, D)
            query = load_queries(q + at_q, valid, k, C, D)
        if READ == "causal":
            d_across1 = -dot(given, tl.trans(u1), DOT) * load_rows(frame, C, C)
            if not TARGET:
                across2 = load_rows(frame + 2 * C * C, C, C)
        again = False
        if HAS_RESET:
            again = starts_again(reset, g // heads, first_token + local + C, chunks, CHUNK)
        du1, rows, p, boundary = through_w2(
            key, step, frame, inverse, given, query, across2, d_across1, again, delta, base,
            d_base, d_state, block, d_key, dq + at_q, valid,
            C, D, H, TILE, READ == "causal", HAS_RESET, INITIAL, DELTA2, TARGET, DOT,
        )  # fmt: skip
        boundary += tl.sum(du1 * u1)
        if READ == "causal":
            across1 = load_rows(kept + 2 * C * D + C * C, C, C)
            du1 -= dot(tl.trans(across1), given, DOT)
        if DELTA1:
            du1 = exact_dot(tl.trans(load_rows(kept + 2 * C * D, C, C)), du1, DOT)
        p += tl.sum(du1 * u1, 1)
        x1 = du1 * tl.load(step + i)[:, None]
        r = load_rows(kept, C, D)
        along_act = tl.sum(x1 * r, 1)
        dr = x1
        if DELTA1:
            extent = tl.load(lengths + C)
            floor = extent * extent + STEP_FLOOR
            dr = x1 * (extent / floor)[:, None]
            rows -= along_act * extent / floor
            along_act *= (2.0 * STEP_FLOOR - floor) / (floor * floor)
        else:
            rows -= along_act
        tl.debug_barrier()
        grad_r, along, rows = through_w1(
            frame, inverse, u1, x1, given, d_across1, again, rows, frozen, delta, base,
            d_base, d_state, block, de,
            C, D, H, TILE, OPEN, READ == "causal", HAS_RESET, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        dr += grad_r
        tl.debug_barrier()
        if DELTA1:
            along = tl.where(inverse > 0.999 / NORM_EPS, 0.0, along)
        if READ == "chunk_start":
            into = d_state
            if OPEN > 1:
                into = d_frozen
            grad = read_start_backward(
                given, query, frozen, base, into, C, D, H, TILE, INITIAL, DOT
            )
            tl.store(dq + at_q + tile_at(0, C, D, D), grad, mask=valid[:, None])
            tl.debug_barrier()
        rows = through_frozen(
            key, value, r, dr, tl.load(lengths), along, along_act, inverse, rows, j % OPEN == 0,
            frozen, base, d_state, d_frozen, block, de, d_key,
            dv + (m * count * length + here) * D,
            C, D, H, TILE, OPEN, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        tl.store(d_log_eta + m * count * length + here + i, p)
        d_decay = log_decay_gradient(p, rows, boundary, C)
        tl.store(d_log_alpha + m * count * length + here + i, d_decay)
        tl.debug_barrier()
