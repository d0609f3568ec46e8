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
    AHEAD,
    NORM_EPS,
    STEP_FLOOR,
    dot,
    exact_dot,
    launched,
    load_rows,
    log_decay_gradient,
    operand,
    store_rows,
    tile_at,
    unit_backward,
)
from hope.scan.kernels.projections import read_start_backward
from hope.scan.kernels.states import add_to, load_gradient, store_gradient
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
    keys = operand(load_rows(k, C, D), DOT)
    if DELTA2:
        system = load_rows(frame + C * C, C, C)
    if READ:
        sent_back, queries = operand(given, DOT), operand(query, DOT)
        d_across1, across2s = operand(d_across1, DOT), operand(across2, DOT)
    du1 = tl.full((C, D), 0.0, step.dtype)
    d_key = tl.full((C, D), 0.0, step.dtype)
    d_key_own = tl.full((C, D), 0.0, step.dtype)
    d_query = tl.full((C, D), 0.0, step.dtype)
    d_query_own = tl.full((C, D), 0.0, step.dtype)
    d_across2 = tl.full((C, C), 0.0, step.dtype)
    gram = tl.full((C, C), 0.0, step.dtype)
    along = tl.full((D,), 0.0, step.dtype)
    moved = tl.full((C, TILE), 0.0, step.dtype)
    p = tl.full((C, TILE), 0.0, step.dtype)
    bound = tl.full((C, TILE), 0.0, step.dtype)
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        at2 = at + D * H
        s1, _ = load_gradient(d_state, at, again, HAS_RESET)
        s2, sent = load_gradient(d_state, at2, again, HAS_RESET)
        d1, d2 = tl.load(delta + at), tl.load(delta + at2)
        along += tl.sum(s1 * d1 + s2 * d2, 1)
        before = s2 * total
        s2 = operand(s2, DOT)
        if INITIAL:
            b2 = tl.load(base + at2)
        gone = tl.full((D, TILE), 0.0, step.dtype)
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
    ratio = load_rows(frame, C, C)
    key = load_rows(k, C, D)
    boundary = total * tl.sum(along) + tl.sum(bound)
    rows = tl.sum(moved, 1)
    if DELTA2:
        gram *= ratio
        d_key -= dot(gram + tl.trans(gram), keys, DOT)
        if INITIAL:
            rows -= tl.sum(d_key_own * key, 1)
            d_key += d_key_own
    if READ:
        rows += tl.sum(d_query * query, 1)
        d_query += d_query_own + given
        if not TARGET:
            rows += tl.sum(d_across2 * across2, 1)
            d_across2 *= ratio
            d_query += dot(d_across2, keys, DOT)
            d_key += dot(tl.trans(d_across2), queries, DOT)
        tl.store(dq + tile_at(0, C, D, D), d_query, mask=valid[:, None])
    store_rows(dk, d_key, C, D)
    return du1, rows, tl.sum(p, 1), boundary


@triton.jit
def through_w1(
    frame, inverse, u1, x1, given, d_across1, again, rows, frozen, delta, base, d_base, d_state,
    work, de,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
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
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        s1, sent = load_gradient(d_state, at, again, HAS_RESET)
        e = tl.load(work + here) * inverse[:, None]
        grad = -dot(written, s1, DOT) * end[:, None]
        before = s1 * total
        gone = tl.full((D, TILE), 0.0, x1.dtype)
        if DELTA1:
            grad += dot(x, tl.load(delta + at), DOT) * prev[:, None]
            grad -= dot(gram, e, DOT)
            before += dot(tl.trans(x), e * prev[:, None], DOT)
            if INITIAL:
                own = dot(x, tl.load(base + at), DOT)
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
            grad_r += dot(through, tl.trans(tl.load(frozen + at)), DOT)
        store_gradient(
            d_state, d_base, at, before, sent, gone, total_lost, again, HAS_RESET, INITIAL
        )
    return grad_r, tl.sum(along, 1), rows - tl.sum(own_along, 1)


@triton.jit
def through_frozen(
    k, v, kept, frozen, d_state, work, de, dk, dv, d_log_alpha,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, DELTA1: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From the gradients of the frozen terms, which `keep_gradients` kept: adds to dk [C, D],
    d_log_alpha [C] and S what they get; stores dv."""
    i = tl.arange(0, C)
    rows = kept + 2 * C * D + 2 * C * C + i
    key, value = load_rows(k, C, D), load_rows(v, C, D)
    r, dr = load_rows(kept, C, D), load_rows(kept + C * D, C, D)
    if DELTA1:
        along, inverse, along_act = tl.load(rows + C), tl.load(rows + 2 * C), tl.load(rows + 3 * C)
    grad_r = dr
    if TARGET:
        grad_r = -unit_backward(dr, key - r, tl.load(rows))
    keys, values = operand(key, DOT), operand(value, DOT)
    residual, back = operand(r, DOT), operand(grad_r, DOT)
    d_key = dr
    d_value = tl.full((C, D), 0.0, key.dtype)
    turned = tl.full((C, TILE), 0.0, key.dtype)
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        f1, f2 = tl.load(frozen + at), tl.load(frozen + D * H + at)
        act, slope = tl.load(work + here), tl.load(work + C * H + here)
        act_v, slope_v = tl.load(work + 4 * C * H + here), tl.load(work + 5 * C * H + here)
        da = tl.load(de + here)
        if DELTA1:
            e = act * inverse[:, None]
            da = (da - e * along[:, None]) * inverse[:, None] + e * along_act[:, None]
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
        add_to(d_state + at, df)
        dz_k, dz_v = operand(dz_k, DOT), operand(dz_v, DOT)
        df = dot(tl.trans(keys), dz_k, DOT) + dot(tl.trans(values), dz_v, DOT)
        add_to(d_state + D * H + at, df)
        d_key += dot(dz_k, tl.trans(f2), DOT)
        d_value += dot(dz_v, tl.trans(f2), DOT)
    add_to(dk + tile_at(0, C, D, D), d_key)
    if TARGET:
        store_rows(dv, d_value + grad_r, C, D)
    else:
        store_rows(dv, d_value - dr, C, D)
        add_to(d_log_alpha + i, log_decay_gradient(0.0, -tl.sum(turned, 1), 0.0, C))


@triton.jit
def keep_gradients(
    kept, dr, along, along_act,
    C: tl.constexpr, D: tl.constexpr, DELTA1: tl.constexpr,
):  # fmt: skip
    """Keep for `through_frozen`, where U1 and `extent` were: dr [C, D], the gradient of r, and [C]
    the gradient of W1's keys along them and that of the activations along the keys."""
    store_rows(kept + C * D, dr, C, D)
    if DELTA1:
        rows = kept + 2 * C * D + 2 * C * C + tl.arange(0, C)
        tl.store(rows + C, along)
        tl.store(rows + 3 * C, along_act)


@launched
def write_backward(
    q, d_out, dq, k, v, eta, frames, dk, dv, d_log_eta, d_log_alpha,
    base, d_base, d_state, frozen, deltas, work, scratch, reset,
    q_stride, q_first, tokens, length, first_token, first, first_block, blocks, frame_blocks,
    opened, works, room, heads, chunks,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    CHUNK: tl.constexpr, READ: tl.constexpr, WIDE: tl.constexpr, HAS_RESET: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `write_forward`, from what it kept, d_out [G, T, D] (of M_mem) and d_state
    [memories, G, 2, D, H], the gradient of W after the blocks, which becomes that of W before them.

    Writes dq, laid out as q, and each memory's dk, dv [memories, G, F, D], d_log_eta, d_log_alpha
    [memories, G, F]; adds to d_base, like d_state, what M_0 gets; spoils `work`. scratch:
    [memories, G, OPEN, C, H]. The blocks that share a frozen state, last to first, take the first
    two passes, then the third.
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    size = 2 * D * H
    base += (m * heads + g % heads) * size
    frozen += (m * count + g) * opened * size
    deltas += (m * count + g) * works * size
    work += (m * count + g) * works * room
    d_base += (m * count + g) * size
    d_state += (m * count + g) * size
    scratch += (m * count + g) * (OPEN * C * H)
    frames += (g * frame_blocks + first_block) * (3 * C * C + 4 * C)
    dk += m * count * length * D
    dv += m * count * length * D
    d_log_eta += m * count * length
    d_log_alpha += m * count * length
    i = tl.arange(0, C)
    sets = (blocks + OPEN - 1) // OPEN
    for back in range(sets):
        opening = (sets - 1 - back) * OPEN
        start = frozen + ((first_block + opening) // OPEN % opened) * size
        shared = 1
        if OPEN > 1:
            shared = tl.minimum(blocks - opening, OPEN)
        for behind in range(shared):
            nth = shared - 1 - behind
            local = first + (opening + nth) * C
            here = g * length + local
            key, step = k + here * D, eta + here
            frame = frames + (opening + nth) * (3 * C * C + 4 * C)
            j = first_block + opening + nth
            delta = deltas + j * size
            block = work + j * room
            kept = block + WIDE * C * H
            lengths = kept + 2 * C * D + 2 * C * C + i
            inverse = tl.load(lengths + 2 * C)
            valid = (first_token + local + i) < tokens
            at_q = (q_first + local) * D + g * q_stride
            given, query, across2, d_across1 = inverse, inverse, inverse, inverse
            if READ != "":
                at_out = (g * tokens + first_token + local) * D
                given = load_queries(d_out + at_out, valid, k, C, D)
                query = load_queries(q + at_q, valid, k, C, D)
            if READ == "causal":
                u1 = load_rows(kept + C * D, C, D)
                d_across1 = -dot(given, tl.trans(u1), DOT) * load_rows(frame, C, C)
                if not TARGET:
                    across2 = load_rows(frame + 2 * C * C, C, C)
            again = False
            if HAS_RESET:
                again = starts_again(reset, g // heads, first_token + local + C, chunks, CHUNK)
            du1, rows, p, boundary = through_w2(
                key, step, frame, inverse, given, query, across2, d_across1, again, delta, base,
                d_base, d_state, block, dk + here * D, dq + at_q, valid,
                C, D, H, TILE, READ == "causal", HAS_RESET, INITIAL, DELTA2, TARGET, DOT,
            )  # fmt: skip
            # Loaded here, and some again, so that the loops have their registers.
            u1, r = load_rows(kept + C * D, C, D), load_rows(kept, C, D)
            if DELTA1:
                system1 = load_rows(kept + 2 * C * D, C, C)
            if READ == "causal":
                across1 = load_rows(kept + 2 * C * D + C * C, C, C)
            boundary += tl.sum(du1 * u1)
            if READ == "causal":
                du1 -= dot(tl.trans(across1), given, DOT)
            if DELTA1:
                du1 = exact_dot(tl.trans(system1), du1, DOT)
            p += tl.sum(du1 * u1, 1)
            x1 = du1 * tl.load(step + i)[:, None]
            along_act = tl.sum(x1 * r, 1)
            dr = x1
            if DELTA1:
                extent = tl.load(lengths + C)
                floor = extent * extent + STEP_FLOOR
                dr = x1 * (extent / floor)[:, None]
                rows -= along_act * extent / floor
                along_act *= (2.0 * STEP_FLOOR - floor) / (floor * floor)
                # e is act / max(|act|, NORM_EPS), and |act| has the gradient act / |act|.
                held = (inverse > 0.999 / NORM_EPS) & (extent > 0.0)
                along_act *= tl.where(held, NORM_EPS, 1.0) / tl.where(held, extent, 1.0)
            else:
                rows -= along_act
            tl.debug_barrier()
            grad_r, along, rows = through_w1(
                frame, inverse, u1, x1, given, d_across1, again, rows, start, delta, base,
                d_base, d_state, block, scratch + nth * C * H,
                C, D, H, TILE, READ == "causal", HAS_RESET, INITIAL, DELTA1, TARGET, DOT,
            )  # fmt: skip
            if DELTA1:
                along = tl.where(inverse > 0.999 / NORM_EPS, 0.0, along)
            keep_gradients(kept, dr + grad_r, along, along_act, C, D, DELTA1)
            tl.store(d_log_eta + here + i, p)
            tl.store(d_log_alpha + here + i, log_decay_gradient(p, rows, boundary, C))
            tl.debug_barrier()
        for nth in range(shared):
            local = first + (opening + nth) * C
            here = g * length + local
            block = work + (first_block + opening + nth) * room
            if READ == "chunk_start":
                valid = (first_token + local + i) < tokens
                at_q = (q_first + local) * D + g * q_stride
                at_out = (g * tokens + first_token + local) * D
                given = load_queries(d_out + at_out, valid, k, C, D)
                query = load_queries(q + at_q, valid, k, C, D)
                grad = read_start_backward(given, query, start, d_state, D, H, TILE, DOT)
                tl.store(dq + at_q + tile_at(0, C, D, D), grad, mask=valid[:, None])
                tl.debug_barrier()
            through_frozen(
                k + here * D, v + here * D, block + WIDE * C * H, start, d_state, block,
                scratch + nth * C * H, dk + here * D, dv + here * D, d_log_alpha + here,
                C, D, H, TILE, DELTA1, TARGET, DOT,
            )  # fmt: skip
            tl.debug_barrier()
