"""Derivative of a block of C tokens of one memory: the counterpart of `hope.scan.kernels.writes`,
which says how the hidden width is tiled; the mathematics is `hope.scan.writes_backward`'s.

After the forward passes again, over the tiles (S: the gradient of W after the block):

1. `read_causal_backward`, M_mem only: dq, and the gradient dz_q before the read's hidden layer;
2. `into_written1`: the gradient of U1, and from it X1, that of W1's right-hand sides;
3. `through_w2`: X2, the same of W2, and into k;
4. `through_w1`: the gradient of W1's keys and that of r;
5. `move_state`: S before the block, and into M_0;
6. `through_frozen`: into the chunk-start W, k and v.

rows [C]: what the decay before each token multiplies; p [C]: <dU, U>, the gradient of log eta.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import (
    NORM_EPS,
    STEP_FLOOR,
    add_to,
    decay_after,
    decay_ratio,
    dot,
    exact_dot,
    gelu,
    load_frozen,
    load_rows,
    log_before,
    log_decay_gradient,
    lost,
    store_rows,
    tile_at,
    unit_backward,
)
from hope.scan.kernels.projections import read_start_backward
from hope.scan.kernels.writes import load_queries, read_causal, solve1, solve2, starts_again


@triton.jit
def read_causal_backward(
    d_out, q, valid, k, log_alpha, inverse, written1, delta, base, z_k, u2, z_q, dz_q, dq, dk,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, INITIAL: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From d_out [C, D]: stores dq, dk [C, D] and dz_q [C, H]; returns rows."""
    decay = tl.load(log_alpha + tl.arange(0, C))
    prev = tl.exp(log_before(decay, C))
    given = load_queries(d_out, valid, k, C, D)
    query = load_queries(q, valid, k, C, D)
    ratio = decay_ratio(decay, C)
    d_across1 = -dot(given, tl.trans(load_rows(written1, C, D)), DOT) * ratio
    across2 = dot(query, tl.trans(load_rows(k, C, D)), DOT) * ratio
    d_query = tl.full((C, D), 0.0, query.dtype)
    d_across2 = tl.full((C, C), 0.0, query.dtype)
    rows = tl.full((C,), 0.0, query.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        act, slope, _ = gelu(tl.load(z_q + here))
        act_k, _, _ = gelu(tl.load(z_k + here))
        d_act = dot(given, tl.load(delta + at), DOT) * prev[:, None]
        d_act += dot(d_across1, act_k * inverse[:, None], DOT)
        rows += tl.sum(d_act * act, 1)
        if INITIAL:
            d_act += dot(given, tl.load(base + at), DOT)
        dz = d_act * slope
        tl.store(dz_q + here, dz)
        d2 = tl.load(delta + D * H + at)
        d_query += dot(dz * prev[:, None], tl.trans(d2), DOT)
        z = dot(query, d2, DOT) * prev[:, None]
        if not TARGET:
            u = tl.load(u2 + here)
            z -= dot(across2, u, DOT)
            d_across2 -= dot(dz, tl.trans(u), DOT)
        rows += tl.sum(dz * z, 1)
        if INITIAL:
            d_query += dot(dz, tl.trans(tl.load(base + D * H + at)), DOT)
    d_query += load_queries(d_out, valid, k, C, D)
    d_key = d_query * 0.0
    if not TARGET:
        d_across2 *= decay_ratio(tl.load(log_alpha + tl.arange(0, C)), C)
        d_query += dot(d_across2, load_rows(k, C, D), DOT)
        d_key = dot(tl.trans(d_across2), load_queries(q, valid, k, C, D), DOT)
    tl.store(dq + tile_at(0, C, D, D), d_query, mask=valid[:, None])
    store_rows(dk, d_key, C, D)
    return rows


@triton.jit
def into_written1(
    log_alpha, inverse, again, delta, d_state, z_k,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr,
    HAS_RESET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What S1 sends to U1 [C, D], and <S1, Delta1 before the block>."""
    end = decay_after(tl.load(log_alpha + tl.arange(0, C)), C) * inverse
    du = tl.full((C, D), 0.0, end.dtype)
    along = tl.sum(end, 0) * 0.0
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        s1 = tl.load(d_state + at)
        if HAS_RESET:
            s1 = tl.where(again, 0.0, s1)
        along += tl.sum(s1 * tl.load(delta + at))
        act, _, _ = gelu(tl.load(z_k + here))
        du -= dot(act * end[:, None], tl.trans(s1), DOT)
    return du, along


@triton.jit
def through_w2(
    k, q, valid, eta, log_alpha, system2, again, rows, delta, base, d_state, u2, x2, dz_q, dk,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """From S2: stores X2 [C, H] and dk [C, D] (READ: adds to it); returns rows, p and <S2, Delta2
    after the block>."""
    decay = tl.load(log_alpha + tl.arange(0, C))
    prev, end = tl.exp(log_before(decay, C)), decay_after(decay, C)
    total = tl.exp(tl.sum(decay, 0))
    step = tl.load(eta + tl.arange(0, C))
    key = load_rows(k, C, D)
    if READ:
        query = load_queries(q, valid, k, C, D)
        across2 = dot(query, tl.trans(key), DOT) * decay_ratio(decay, C)
    if DELTA2:
        system = load_rows(system2, C, C)
    d_key = tl.full((C, D), 0.0, key.dtype)
    gram = tl.full((C, C), 0.0, key.dtype)
    p = step * 0.0
    boundary = tl.sum(p, 0)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE) + D * H, tile_at(first, C, H, TILE)
        s2 = tl.load(d_state + at)
        if HAS_RESET:
            s2 = tl.where(again, 0.0, s2)
        d2 = tl.load(delta + at)
        boundary += total * tl.sum(s2 * d2)
        if not TARGET:
            u = tl.load(u2 + here)
            d_key -= dot(u * end[:, None], tl.trans(s2), DOT)
            du = -dot(key, s2, DOT) * end[:, None]
            boundary += tl.sum(du * u)
            if READ:
                du -= dot(tl.trans(across2), tl.load(dz_q + here), DOT)
            if DELTA2:
                du = exact_dot(tl.trans(system), du, DOT)
            p += tl.sum(du * u, 1)
            du *= step[:, None]
            tl.store(x2 + here, du)
            if DELTA2:
                gram += dot(du, tl.trans(u), DOT)
                d_key += dot(du * prev[:, None], tl.trans(d2), DOT)
                if INITIAL:
                    w = tl.load(base + at)
                    rows -= tl.sum(dot(key, w, DOT) * du, 1)
                    d_key += dot(du, tl.trans(w), DOT)
    if DELTA2:
        gram *= decay_ratio(tl.load(log_alpha + tl.arange(0, C)), C)
        d_key -= dot(gram + tl.trans(gram), load_rows(k, C, D), DOT)
    if READ:
        d_key += load_rows(dk, C, D)
    store_rows(dk, d_key, C, D)
    return rows, p, boundary


@triton.jit
def through_w1(
    d_out, valid, k, log_alpha, inverse, written1, x1, again, rows, frozen, delta, base, d_state,
    z_k, x2, de, z_q, dr,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """From S1 and X1: stores the gradient of W1's keys [C, H], adds to dr [C, D]; returns that
    gradient's part along each key [C], and rows."""
    decay = tl.load(log_alpha + tl.arange(0, C))
    prev, end = tl.exp(log_before(decay, C)), decay_after(decay, C)
    x, u1 = load_rows(x1, C, D), load_rows(written1, C, D)
    if DELTA1:
        gram = dot(x, tl.trans(u1), DOT) * decay_ratio(decay, C)
        gram += tl.trans(gram)
    if READ:
        given = load_queries(d_out, valid, k, C, D)
        d_across1 = -dot(given, tl.trans(u1), DOT) * decay_ratio(decay, C)
    grad_r = tl.full((C, D), 0.0, x.dtype)
    along = end * 0.0
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        s1 = tl.load(d_state + at)
        if HAS_RESET:
            s1 = tl.where(again, 0.0, s1)
        act, slope, _ = gelu(tl.load(z_k + here))
        e = act * inverse[:, None]
        grad = -dot(u1, s1, DOT) * end[:, None]
        if DELTA1:
            grad += dot(x, tl.load(delta + at), DOT) * prev[:, None]
            grad -= dot(gram, e, DOT)
            if INITIAL:
                own = dot(x, tl.load(base + at), DOT)
                grad += own
                rows -= tl.sum(own * e, 1)
        if READ:
            act, _, _ = gelu(tl.load(z_q + here))
            grad += dot(tl.trans(d_across1), act, DOT)
        tl.store(de + here, grad)
        along += tl.sum(grad * e, 1)
        if not TARGET:
            f1 = load_frozen(frozen, base, at, INITIAL)
            grad_r += dot(tl.load(x2 + here) * slope, tl.trans(f1), DOT)
    if not TARGET:
        store_rows(dr, grad_r + load_rows(dr, C, D), C, D)
    return along, rows


@triton.jit
def move_state(
    left, right, scale, read_left, read_right, valid, like, log_alpha, again, d_base, d_state,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, ACT: tl.constexpr,
    DELTA: tl.constexpr, READ: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """S1 or S2 before the block, in place, and what M_0 gets: from left [C, D] and right [C, H],
    the gradient and the keys of W1 (ACT: right is before the activation, which `scale` [C] makes
    keys) or W2's keys and the gradient; likewise from the read's."""
    decay = tl.load(log_alpha + tl.arange(0, C))
    before = log_before(decay, C)
    prev, prev_lost = tl.exp(before), lost(before)
    total, total_lost = tl.exp(tl.sum(decay, 0)), lost(tl.sum(decay, 0))
    if DELTA:
        x = load_rows(left, C, D)
    if READ:
        y = load_queries(read_left, valid, like, C, D)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        s = tl.load(d_state + at)
        gone = s * total_lost
        if HAS_RESET:
            gone = tl.where(again, s, gone)
            s = tl.where(again, 0.0, s)
        s *= total
        if DELTA:
            z = tl.load(right + here)
            if ACT:
                z, _, _ = gelu(z)
                z *= scale[:, None]
            s += dot(tl.trans(x), z * prev[:, None], DOT)
            if INITIAL:
                gone += dot(tl.trans(x), z * prev_lost[:, None], DOT)
        if READ:
            z = tl.load(read_right + here)
            if ACT:
                z, _, _ = gelu(z)
            s += dot(tl.trans(y), z * prev[:, None], DOT)
            if INITIAL:
                gone += dot(tl.trans(y), z * prev_lost[:, None], DOT)
        tl.store(d_state + at, s)
        if INITIAL:
            add_to(d_base + at, gone)
        elif HAS_RESET:
            add_to(d_base + at, tl.where(again, gone, 0.0))


@triton.jit
def move_frozen(d_state, d_frozen, grad, opens, OPEN: tl.constexpr):
    """Add a tile's gradient of the frozen W to S where its chunk `opens`, else keep it."""
    if OPEN == 1:
        add_to(d_state, grad)
    else:
        grad += tl.load(d_frozen)
        tl.store(d_frozen, tl.where(opens, 0.0, grad))
        add_to(d_state, tl.where(opens, grad, 0.0))


@triton.jit
def through_frozen(
    k, v, residual, dr, short, along, along_act, inverse, rows, opens, frozen, base, d_state,
    d_frozen, z_k, z_v, x2, de, dk, dv,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, OPEN: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From the gradients of the frozen terms: adds to dk, stores dv [C, D], moves what the frozen
    W gets; returns rows.

    along, along_act [C]: the gradient of W1's keys along them, and that of the activations along
    the keys.
    """
    key, value = load_rows(k, C, D), load_rows(v, C, D)
    if TARGET:
        grad_r = -unit_backward(load_rows(dr, C, D), key - load_rows(residual, C, D), short)
    else:
        grad_r, r = load_rows(dr, C, D), load_rows(residual, C, D)
    d_key = tl.full((C, D), 0.0, key.dtype)
    d_value = tl.full((C, D), 0.0, key.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        act, slope, curvature = gelu(tl.load(z_k + here))
        act_v, slope_v, _ = gelu(tl.load(z_v + here))
        da = tl.load(de + here)
        if DELTA1:
            e = act * inverse[:, None]
            da = (da - e * along[:, None]) * inverse[:, None] + e * along_act[:, None]
        f1 = load_frozen(frozen, base, at, INITIAL)
        if TARGET:
            dz_k = da * slope
            dz_v = dot(grad_r, f1, DOT) * slope_v
            df = dot(tl.trans(grad_r), act_v, DOT)
        else:
            x = tl.load(x2 + here)
            through = x * dot(r, f1, DOT)
            rows -= tl.sum(through * slope, 1)
            d_act = dot(grad_r, f1, DOT)
            dz_k = through * curvature + (da + d_act) * slope
            dz_v = -d_act * slope_v
            df = dot(tl.trans(r), x * slope, DOT) + dot(tl.trans(grad_r), act - act_v, DOT)
        move_frozen(d_state + at, d_frozen + at, df, opens, OPEN)
        df = dot(tl.trans(key), dz_k, DOT) + dot(tl.trans(value), dz_v, DOT)
        move_frozen(d_state + D * H + at, d_frozen + D * H + at, df, opens, OPEN)
        f2 = load_frozen(frozen + D * H, base + D * H, at, INITIAL)
        d_key += dot(dz_k, tl.trans(f2), DOT)
        d_value += dot(dz_v, tl.trans(f2), DOT)
    grad_r = load_rows(dr, C, D)
    store_rows(dk, d_key + grad_r + load_rows(dk, C, D), C, D)
    if TARGET:
        unit = load_rows(k, C, D) - load_rows(residual, C, D)
        store_rows(dv, d_value - unit_backward(grad_r, unit, short), C, D)
    else:
        store_rows(dv, d_value - grad_r, C, D)
    return rows


@triton.jit
def write_backward(
    q, d_out, dq, k, v, eta, log_alpha, dk, dv, d_log_eta, d_log_alpha,
    base, d_base, d_state, d_frozen, state, scratch, reset,
    q_stride, q_first, tokens, length, first_token, first, first_block, blocks, slots, room, heads,
    chunks,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    CHUNK: tl.constexpr, READ: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
    DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `write_forward`, from d_out [G, T, D] (of M_mem) and d_state [memories, G, 2,
    D, H], the gradient of W after the blocks, which becomes that of W before them.

    Writes dq, laid out as q, and each memory's dk, dv [memories, G, F, D], d_log_eta, d_log_alpha
    [memories, G, F]; adds to d_base, like d_state, what M_0 gets. d_frozen (OPEN > 1 only): zeros
    like d_state, and zeros again afterwards. scratch: 7 C H, 4 C D and 2 C C elements for each
    program.
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    size = 2 * D * H
    base += (m * heads + g % heads) * size
    state += (m * count + g) * slots * size
    d_base += (m * count + g) * size
    d_state += (m * count + g) * size
    d_frozen += (m * count + g) * size
    z_k = scratch + (m * count + g) * room
    z_v, u2, x2, de = z_k + C * H, z_k + 2 * C * H, z_k + 3 * C * H, z_k + 4 * C * H
    z_q, dz_q, residual = z_k + 5 * C * H, z_k + 6 * C * H, z_k + 7 * C * H
    written1, x1, dr = residual + C * D, residual + 2 * C * D, residual + 3 * C * D
    system1 = residual + 4 * C * D
    system2 = system1 + C * C
    i = tl.arange(0, C)
    for back in range(blocks):
        j = first_block + blocks - 1 - back
        frozen = state + ((j - j % OPEN) % slots) * size
        delta = state + (j % slots) * size
        local = first + (blocks - 1 - back) * C
        here = g * length + local
        key, value, step, decay = k + here * D, v + here * D, eta + here, log_alpha + here
        d_key = dk + (m * count * length + here) * D
        valid = (first_token + local + i) < tokens
        query = q + g * q_stride + (q_first + local) * D
        d_query = dq + g * q_stride + (q_first + local) * D
        given = d_out + (g * tokens + first_token + local) * D
        again = False
        if HAS_RESET:
            again = starts_again(reset, g // heads, first_token + local + C, chunks, CHUNK)
        short, extent, inverse = solve1(
            key, value, step, decay, frozen, delta, base, z_k, z_v, residual, written1, system1,
            C, D, H, TILE, True, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
        if not TARGET:
            solve2(
                key, step, decay, residual, frozen, delta, base, z_k, u2, system2,
                C, D, H, TILE, True, INITIAL, DELTA2, DOT,
            )  # fmt: skip
            tl.debug_barrier()
        rows = inverse * 0.0
        if READ == "causal":
            _, across1 = read_causal(
                query, valid, key, decay, inverse, written1, delta, base, z_k, u2, z_q,
                C, D, H, TILE, True, INITIAL, TARGET, DOT,
            )  # fmt: skip
            store_rows(x1, -dot(tl.trans(across1), load_queries(given, valid, k, C, D), DOT), C, D)
            tl.debug_barrier()
            rows = read_causal_backward(
                given, query, valid, key, decay, inverse, written1, delta, base, z_k, u2, z_q,
                dz_q, d_query, d_key, C, D, H, TILE, INITIAL, TARGET, DOT,
            )  # fmt: skip
            tl.debug_barrier()
        du1, boundary = into_written1(
            decay, inverse, again, delta, d_state, z_k, C, D, H, TILE, HAS_RESET, DOT
        )
        u1 = load_rows(written1, C, D)
        boundary = boundary * tl.exp(tl.sum(tl.load(decay + i), 0)) + tl.sum(du1 * u1)
        if READ == "causal":
            du1 += load_rows(x1, C, D)
        if DELTA1:
            du1 = exact_dot(tl.trans(load_rows(system1, C, C)), du1, DOT)
        p1 = tl.sum(du1 * u1, 1)
        du1 *= tl.load(step + i)[:, None]
        along_act = tl.sum(du1 * load_rows(residual, C, D), 1)
        tl.debug_barrier()
        store_rows(x1, du1, C, D)
        if DELTA1:
            floor = extent * extent + STEP_FLOOR
            store_rows(dr, du1 * (extent / floor)[:, None], C, D)
            rows -= along_act * extent / floor
            along_act *= (2.0 * STEP_FLOOR - floor) / (floor * floor)
        else:
            store_rows(dr, du1, C, D)
            rows -= along_act
        tl.debug_barrier()
        rows, p, boundary2 = through_w2(
            key, query, valid, step, decay, system2, again, rows, delta, base, d_state, u2, x2,
            dz_q, d_key,
            C, D, H, TILE, READ == "causal", HAS_RESET, INITIAL, DELTA2, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
        along, rows = through_w1(
            given, valid, key, decay, inverse, written1, x1, again, rows, frozen, delta, base,
            d_state, z_k, x2, de, z_q, dr,
            C, D, H, TILE, READ == "causal", HAS_RESET, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
        move_state(
            x1, z_k, inverse, given, z_q, valid, k, decay, again, d_base, d_state,
            C, D, H, TILE, True, DELTA1, READ == "causal", HAS_RESET, INITIAL, DOT,
        )  # fmt: skip
        move_state(
            key, x2, inverse, query, dz_q, valid, k, decay, again, d_base + D * H,
            d_state + D * H,
            C, D, H, TILE, False, DELTA2, READ == "causal", HAS_RESET, INITIAL, DOT,
        )  # fmt: skip
        tl.debug_barrier()
        if DELTA1:
            along = tl.where(inverse > 0.999 / NORM_EPS, 0.0, along)
        if READ == "chunk_start":
            into = d_state
            if OPEN > 1:
                into = d_frozen
            grad = read_start_backward(
                load_queries(given, valid, k, C, D), load_queries(query, valid, k, C, D),
                frozen, base, into, C, D, H, TILE, INITIAL, DOT,
            )  # fmt: skip
            tl.store(d_query + tile_at(0, C, D, D), grad, mask=valid[:, None])
            tl.debug_barrier()
        rows = through_frozen(
            key, value, residual, dr, short, along, along_act, inverse, rows, j % OPEN == 0,
            frozen, base, d_state, d_frozen, z_k, z_v, x2, de, d_key,
            dv + (m * count * length + here) * D,
            C, D, H, TILE, OPEN, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        p += p1
        tl.store(d_log_eta + m * count * length + here + i, p)
        d_decay = log_decay_gradient(p, rows, boundary + boundary2, C)
        tl.store(d_log_alpha + m * count * length + here + i, d_decay)
        tl.debug_barrier()
