"""Derivative of a block of C tokens of one memory: the counterpart of `hope.scan.kernels.writes`,
which says how the hidden width is tiled; the mathematics is `hope.scan.writes_backward`'s.

After the forward passes again, over the tiles (S: the gradient of W after the block):

1. `read_causal_backward`, M_mem only: dq, and the gradient dz_q before the read's hidden layer;
2. `through_w2`: X2, the gradient of W2's right-hand sides, into k, and S2 before the block;
3. `through_w1`, once X1 is known: the gradient of W1's keys, that of r, and S1 before the block;
4. `through_frozen`: into the chunk-start W, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import (
    NORM_EPS,
    STEP_FLOOR,
    add_to,
    decays,
    dot,
    exact_dot,
    gelu,
    load_frozen,
    log_decay_gradient,
    tile_at,
    unit_backward,
)
from hope.scan.kernels.projections import read_start_backward
from hope.scan.kernels.writes import (
    frozen_sums,
    key_inverse,
    read_causal,
    solve1,
    solve2,
    starts_again,
)


@triton.jit
def read_causal_backward(
    d_out, q, k, prev, across2, d_across1, ratio, inverse, delta, base, z_k, u2, z_q, dz_q,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, INITIAL: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From d_out [C, D]: dq, dk [C, D]; rows [C], what decay before t multiplies; stores dz_q."""
    dq = tl.full((C, D), 0.0, q.dtype)
    d_across2 = tl.full((C, C), 0.0, q.dtype)
    rows = tl.full((C,), 0.0, q.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        z = tl.load(z_q + here)
        act, slope, _ = gelu(z)
        act_k, _, _ = gelu(tl.load(z_k + here))
        d_act = dot(d_out * prev[:, None], tl.load(delta + at), DOT)
        d_act += dot(d_across1, act_k * inverse[:, None], DOT)
        rows += tl.sum(d_act * act, 1)
        if INITIAL:
            d_act += dot(d_out, tl.load(base + at), DOT)
        dz = d_act * slope
        tl.store(dz_q + here, dz)
        dq += dot(dz * prev[:, None], tl.trans(tl.load(delta + D * H + at)), DOT)
        z = dot(q * prev[:, None], tl.load(delta + D * H + at), DOT)
        if not TARGET:
            u = tl.load(u2 + here)
            z -= dot(across2, u, DOT)
            d_across2 -= dot(dz, tl.trans(u), DOT)
        rows += tl.sum(dz * z, 1)
        if INITIAL:
            dq += dot(dz, tl.trans(tl.load(base + D * H + at)), DOT)
    dq += d_out
    dk = q * 0.0
    if not TARGET:
        d_across2 *= ratio
        dq += dot(d_across2, k, DOT)
        dk = dot(tl.trans(d_across2), q, DOT)
    return dq, dk, rows


@triton.jit
def through_w2(
    k, q, eta, prev, end, total, prev_lost, total_lost, ratio, system, across2, u1, inverse, again,
    dk, rows, delta, base, d_base, d_state, z_k, u2, x2, dz_q,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """From S: X2 [C, H] (stored), into U1 [C, D]; dk [C, D] and rows [C] with what they have; p [C]
    = <dU2, U2> and boundary = <S, Delta after the block> but for W1's writes. S2 moves on."""
    du1 = tl.full((C, D), 0.0, k.dtype)
    gram = tl.full((C, C), 0.0, k.dtype)
    p = tl.full((C,), 0.0, k.dtype)
    boundary = tl.sum(p, 0)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        s1 = tl.load(d_state + at)
        if HAS_RESET:
            s1 = tl.where(again, 0.0, s1)
        act, _, _ = gelu(tl.load(z_k + here))
        of_state = tl.sum(s1 * tl.load(delta + at))
        du1 -= dot(act * (inverse * end)[:, None], tl.trans(s1), DOT)
        s2 = tl.load(d_state + D * H + at)
        lost = s2 * total_lost
        if HAS_RESET:
            lost = tl.where(again, s2, lost)
            s2 = tl.where(again, 0.0, s2)
        d2 = tl.load(delta + D * H + at)
        of_state += tl.sum(s2 * d2)
        boundary += total * of_state
        before = s2 * total
        if READ:
            dz = tl.load(dz_q + here)
            before += dot(tl.trans(q * prev[:, None]), dz, DOT)
            if INITIAL:
                lost += dot(tl.trans(q * prev_lost[:, None]), dz, DOT)
        if not TARGET:
            u = tl.load(u2 + here)
            dk -= dot(u * end[:, None], tl.trans(s2), DOT)
            du = -dot(k * end[:, None], s2, DOT)
            boundary += tl.sum(du * u)
            if READ:
                du -= dot(tl.trans(across2), dz, DOT)
            if DELTA2:
                du = exact_dot(tl.trans(system), du, DOT)
            p += tl.sum(du * u, 1)
            du *= eta[:, None]
            tl.store(x2 + here, du)
            if DELTA2:
                gram += dot(du, tl.trans(u), DOT)
                dk += dot(du * prev[:, None], tl.trans(d2), DOT)
                before += dot(tl.trans(k * prev[:, None]), du, DOT)
                if INITIAL:
                    w = tl.load(base + D * H + at)
                    rows -= tl.sum(dot(k, w, DOT) * du, 1)
                    dk += dot(du, tl.trans(w), DOT)
                    lost += dot(tl.trans(k * prev_lost[:, None]), du, DOT)
        if INITIAL:
            add_to(d_base + D * H + at, lost)
        elif HAS_RESET:
            add_to(d_base + D * H + at, tl.where(again, lost, 0.0))
        tl.store(d_state + D * H + at, before)
    if DELTA2:
        gram *= ratio
        dk -= dot(gram + tl.trans(gram), k, DOT)
    return du1, dk, rows, p, boundary + tl.sum(du1 * u1)


@triton.jit
def through_w1(
    d_out, prev, end, total, prev_lost, total_lost, gram, d_across1, u1, x1, dr, inverse, again,
    rows, frozen, delta, base, d_base, d_state, z_k, x2, de, z_q,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, READ: tl.constexpr,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """From S1 and x1 [C, D]: the gradient of W1's keys [C, H] (stored) and its part along each key
    [C]; dr [C, D] and rows [C] with what they have. S1 moves on. gram [C, C]: ratio * (x1 u1^T)."""
    along = tl.full((C,), 0.0, dr.dtype)
    for first in range(0, H, TILE):
        at, here = tile_at(first, D, H, TILE), tile_at(first, C, H, TILE)
        s1 = tl.load(d_state + at)
        lost = s1 * total_lost
        if HAS_RESET:
            lost = tl.where(again, s1, lost)
            s1 = tl.where(again, 0.0, s1)
        act, slope, _ = gelu(tl.load(z_k + here))
        e = act * inverse[:, None]
        grad = -dot(u1 * end[:, None], s1, DOT)
        before = s1 * total
        if DELTA1:
            grad += dot(x1 * prev[:, None], tl.load(delta + at), DOT)
            grad -= dot(gram + tl.trans(gram), e, DOT)
            before += dot(tl.trans(x1), e * prev[:, None], DOT)
            if INITIAL:
                own = dot(x1, tl.load(base + at), DOT)
                grad += own
                rows -= tl.sum(own * e, 1)
                lost += dot(tl.trans(x1), e * prev_lost[:, None], DOT)
        if READ:
            act, _, _ = gelu(tl.load(z_q + here))
            grad += dot(tl.trans(d_across1), act, DOT)
            before += dot(tl.trans(d_out), act * prev[:, None], DOT)
            if INITIAL:
                lost += dot(tl.trans(d_out), act * prev_lost[:, None], DOT)
        if INITIAL:
            add_to(d_base + at, lost)
        elif HAS_RESET:
            add_to(d_base + at, tl.where(again, lost, 0.0))
        tl.store(d_state + at, before)
        tl.store(de + here, grad)
        along += tl.sum(grad * e, 1)
        if not TARGET:
            f1 = load_frozen(frozen, base, at, INITIAL)
            dr += dot(tl.load(x2 + here) * slope, tl.trans(f1), DOT)
    return along, dr, rows


@triton.jit
def move_frozen(d_state, d_frozen, grad, opens, OPEN: tl.constexpr):
    """Add a tile's gradient of the frozen W to the state's where its chunk `opens`, else keep it."""
    if OPEN == 1:
        add_to(d_state, grad)
    else:
        grad += tl.load(d_frozen)
        tl.store(d_frozen, tl.where(opens, 0.0, grad))
        add_to(d_state, tl.where(opens, grad, 0.0))


@triton.jit
def through_frozen(
    k, v, r, dr, d_value, along, inverse, along_act, rows, opens, frozen, base, d_state, d_frozen,
    z_k, z_v, x2, de, dk,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, OPEN: tl.constexpr,
    INITIAL: tl.constexpr, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From the gradients of the frozen terms: dk, dv [C, D] and rows [C], with what they have, and
    into the frozen W.

    d_value [C, D]: of M(v) (TARGET) or of v by itself; along, along_act [C]: the gradient of W1's
    keys along them, and that of the activations along the keys.
    """
    dv = d_value
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
            dz_v = dot(d_value, f1, DOT) * slope_v
            df1 = dot(tl.trans(d_value), act_v, DOT)
        else:
            x = tl.load(x2 + here)
            through = x * dot(r, f1, DOT)
            rows -= tl.sum(through * slope, 1)
            d_act = dot(dr, f1, DOT)
            dz_k = through * curvature + (da + d_act) * slope
            dz_v = -d_act * slope_v
            df1 = dot(tl.trans(r), x * slope, DOT) + dot(tl.trans(dr), act - act_v, DOT)
        move_frozen(d_state + at, d_frozen + at, df1, opens, OPEN)
        df2 = dot(tl.trans(k), dz_k, DOT) + dot(tl.trans(v), dz_v, DOT)
        move_frozen(d_state + D * H + at, d_frozen + D * H + at, df2, opens, OPEN)
        f2 = load_frozen(frozen + D * H, base + D * H, at, INITIAL)
        dk += dot(dz_k, tl.trans(f2), DOT)
        dv += dot(dz_v, tl.trans(f2), DOT)
    return dk, dv, rows


@triton.jit
def write_backward(
    q, d_out, dq, k, v, eta, log_alpha, dk, dv, d_log_eta, d_log_alpha,
    base, d_base, d_state, d_frozen, state, hidden, reset,
    q_stride, q_first, tokens, length, first_token, first, first_block, blocks, slots, heads,
    chunks,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    CHUNK: tl.constexpr, READ: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
    DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `write_forward`, from d_out [G, T, D] (of M_mem) and d_state [memories, G, 2,
    D, H], the gradient of W after the blocks, which becomes that of W before them.

    Writes dq, laid out as q, and each memory's dk, dv [memories, G, F, D], d_log_eta, d_log_alpha
    [memories, G, F]; adds to d_base, like d_state, what M_0 gets. d_frozen (OPEN > 1 only): zeros
    like d_state, and zeros again afterwards. hidden: seven kinds.
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
    z_k = hidden + (m * count + g) * (7 * C * H)
    z_v, u2, x2, de = z_k + C * H, z_k + 2 * C * H, z_k + 3 * C * H, z_k + 4 * C * H
    z_q, dz_q = z_k + 5 * C * H, z_k + 6 * C * H
    column = tl.arange(0, D)[None, :]
    for back in range(blocks):
        i = blocks - 1 - back
        j = first_block + i
        frozen = state + ((j - j % OPEN) % slots) * size
        delta = state + (j % slots) * size
        local = first + i * C + tl.arange(0, C)
        here = g * length + local
        at = here[:, None] * D + column
        step = tl.load(eta + here)
        prev, end, total, prev_lost, total_lost, ratio = decays(tl.load(log_alpha + here), C)
        key, value = tl.load(k + at), tl.load(v + at)
        again = False
        if HAS_RESET:
            last = first_token + first + (i + 1) * C
            again = starts_again(reset, g // heads, last, chunks, CHUNK)
        r, short, size1, lift, gram = frozen_sums(
            key, value, prev, frozen, delta, base, z_k, z_v,
            C, D, H, TILE, True, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        u1, system1, inverse = solve1(step, ratio, r, size1, lift, gram, C, DELTA1, DOT)
        tl.debug_barrier()
        system2 = ratio
        if not TARGET:
            system2 = key_inverse(key, step, ratio, C, DELTA2, DOT)
            solve2(
                key, step, prev, system2, r, frozen, delta, base, z_k, u2,
                C, D, H, TILE, INITIAL, DELTA2, DOT,
            )  # fmt: skip
            tl.debug_barrier()
        rows = step * 0.0
        d_key = key * 0.0
        query, d_answer, across2, d_across1 = key, key, ratio, ratio
        if READ != "":
            valid = ((first_token + local) < tokens)[:, None]
            at_q = g * q_stride + (q_first + local)[:, None] * D + column
            at_out = (g * tokens + first_token + local)[:, None] * D + column
            query = tl.load(q + at_q, mask=valid, other=0.0).to(key.dtype)
            d_answer = tl.load(d_out + at_out, mask=valid, other=0.0).to(key.dtype)
            if READ == "causal":
                across2 = dot(query, tl.trans(key), DOT) * ratio
                _, across1 = read_causal(
                    query, prev, across2, ratio, u1, inverse, delta, base, z_k, u2, z_q,
                    C, D, H, TILE, True, INITIAL, TARGET, DOT,
                )  # fmt: skip
                d_across1 = -dot(d_answer, tl.trans(u1), DOT) * ratio
                tl.debug_barrier()
                d_query, d_key, rows = read_causal_backward(
                    d_answer, query, key, prev, across2, d_across1, ratio, inverse, delta, base,
                    z_k, u2, z_q, dz_q, C, D, H, TILE, INITIAL, TARGET, DOT,
                )  # fmt: skip
                tl.store(dq + at_q, d_query, mask=valid)
                tl.debug_barrier()
        du1, d_key, rows, p, boundary = through_w2(
            key, query, step, prev, end, total, prev_lost, total_lost, ratio, system2, across2, u1,
            inverse, again, d_key, rows, delta, base, d_base, d_state, z_k, u2, x2, dz_q,
            C, D, H, TILE, READ == "causal", HAS_RESET, INITIAL, DELTA2, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
        if READ == "causal":
            du1 -= dot(tl.trans(across1), d_answer, DOT)
        if DELTA1:
            du1 = exact_dot(tl.trans(system1), du1, DOT)
        p += tl.sum(du1 * u1, 1)
        x1 = du1 * step[:, None]
        gram = ratio
        dr, d_step = x1, tl.sum(x1 * r, 1)
        if DELTA1:
            gram = dot(x1, tl.trans(u1), DOT) * ratio
            pace = size1 / (size1 * size1 + STEP_FLOOR)
            dr = x1 * pace[:, None]
            rows -= d_step * pace
        else:
            rows -= d_step
        along, dr, rows = through_w1(
            d_answer, prev, end, total, prev_lost, total_lost, gram, d_across1, u1, x1, dr,
            inverse, again, rows, frozen, delta, base, d_base, d_state, z_k, x2, de, z_q,
            C, D, H, TILE, READ == "causal", HAS_RESET, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        tl.debug_barrier()
        if READ == "chunk_start":
            into = d_state
            if OPEN > 1:
                into = d_frozen
            d_query = read_start_backward(
                d_answer, query, frozen, base, into, C, D, H, TILE, INITIAL, DOT
            )
            tl.store(dq + at_q, d_query, mask=valid)
            tl.debug_barrier()
        along_act = d_step
        if DELTA1:
            floor = size1 * size1 + STEP_FLOOR
            along = tl.where(inverse > 0.999 / NORM_EPS, 0.0, along)
            along_act = d_step * (2.0 * STEP_FLOOR - floor) / (floor * floor)
        d_value = -dr
        if TARGET:
            d_value = -unit_backward(dr, key - r, short)
        d_key, d_value, rows = through_frozen(
            key, value, r, dr, d_value, along, inverse, along_act, rows, j % OPEN == 0,
            frozen, base, d_state, d_frozen, z_k, z_v, x2, de, d_key + dr,
            C, D, H, TILE, OPEN, INITIAL, DELTA1, TARGET, DOT,
        )  # fmt: skip
        tl.store(dk + m * count * length * D + at, d_key)
        tl.store(dv + m * count * length * D + at, d_value)
        tl.store(d_log_eta + m * count * length + here, p)
        d_decay = log_decay_gradient(p, rows, boundary, C)
        tl.store(d_log_alpha + m * count * length + here, d_decay)
        tl.debug_barrier()
