"""M_k, M_v, M_eta, M_alpha and, with ADAPTIVE, M_q over the blocks of a segment (Eqs. 83-88).

They need each other: k, v, eta and alpha of a projection chunk come from the states at its start,
and all of them are written with these. One program per row and head takes them in turns, so that
nothing waits between programs; the states, too many to hold, lie in `scratch`.

Shapes as in memory.py, and: states [memories, G, 2, D, H], of which the first four or five are
these (M_q last, M_mem is not among them); base [boxes, heads, 2, D, H] with the boxes of
`hope.scan.contract`; scratch [memories, G, slots, 2, D, H], Delta before block j in slot
j % slots; readout [2, heads, D] and bias [2, heads] of eta and alpha; x, source (of M_q) and their
gradients [G, T, D]; query [G, F, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.blocks import key_inverse, write, write_backward
from hope.scan.kernels.primitives import (
    add_state,
    decays,
    dot,
    gelu,
    inverse_length,
    load_state,
    log_sigmoid,
    store_state,
    unit_backward,
)


@triton.jit
def frozen(base, delta, D: tl.constexpr, H: tl.constexpr, INITIAL: tl.constexpr):
    """W from pointers to M_0 and to Delta."""
    f1, f2 = load_state(delta, D, H)
    if INITIAL:
        b1, b2 = load_state(base, D, H)
        f1 += b1
        f2 += b2
    return f1, f2


@triton.jit
def unit_vector(x, f1, f2, DOT: tl.constexpr):
    """l2norm(M(x)) of x [C, D], and one over the length before [C]."""
    act, _, _ = gelu(dot(x, f2, DOT))
    y = x + dot(act, tl.trans(f1), DOT)
    inverse = inverse_length(y)
    return y * inverse[:, None], inverse


@triton.jit
def unit_vector_backward(x, dy, f1, f2, DOT: tl.constexpr):
    """From dy [C, D], the gradient before normalisation: dx, and into the frozen W."""
    act, slope, _ = gelu(dot(x, f2, DOT))
    dz = dot(dy, f1, DOT) * slope
    dx = dy + dot(dz, tl.trans(f2), DOT)
    return dx, dot(tl.trans(dy), act, DOT), dot(tl.trans(x), dz, DOT)


@triton.jit
def scalar(x, w, f1, f2, DOT: tl.constexpr):
    """<w, M(x)> of x [C, D], as <w, x> + <W1^T w, act>; also W1^T w [H], act and slope [C, H]."""
    act, slope, _ = gelu(dot(x, f2, DOT))
    pulled = tl.sum(w[:, None] * f1, 0)
    logit = tl.sum(x * w[None, :], 1) + tl.sum(act * pulled[None, :], 1)
    return logit, pulled, act, slope


@triton.jit
def scalar_backward(x, w, d_logit, f1, f2, DOT: tl.constexpr):
    """From d_logit [C]: dx [C, D], into the frozen W [D, H] twice, into w [D]."""
    _, pulled, act, slope = scalar(x, w, f1, f2, DOT)
    dz = d_logit[:, None] * pulled[None, :] * slope
    dx = d_logit[:, None] * w[None, :] + dot(dz, tl.trans(f2), DOT)
    d_pulled = tl.sum(d_logit[:, None] * act, 0)
    dw = tl.sum(f1 * d_pulled[None, :], 1) + tl.sum(d_logit[:, None] * x, 0)
    return dx, w[:, None] * d_pulled[None, :], dot(tl.trans(x), dz, DOT), dw


@triton.jit
def projections_forward(
    x, source, k, v, eta, log_alpha, query, base, readout, bias, scratch, reset,
    tokens, first_token, blocks, slots, heads, chunks, first_chunk, eta_max,
    D: tl.constexpr, H: tl.constexpr, C: tl.constexpr, PERIOD: tl.constexpr,
    ADAPTIVE: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
    DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fill k, v, eta, log_alpha (and query), and `scratch` from its slot 0 on.

    slots: more than PERIOD, the blocks of a projection chunk.
    """
    g = tl.program_id(0).to(tl.int64)
    memories = 5 if ADAPTIVE else 4
    size = 2 * D * H
    n = g % heads
    base += n * size
    scratch += g * slots * size
    per_memory = tl.num_programs(0).to(tl.int64) * slots * size
    feature = tl.arange(0, D)
    w_eta, w_alpha = (
        tl.load(readout + n * D + feature),
        tl.load(readout + (heads + n) * D + feature),
    )
    for j in range(blocks):
        opened = scratch + ((j - j % PERIOD) % slots) * size
        now, after = scratch + (j % slots) * size, scratch + ((j + 1) % slots) * size
        if HAS_RESET:
            at = (g // heads) * chunks + first_chunk + j // PERIOD
            if (j % PERIOD == 0) & (tl.load(reset + at) != 0):
                for m in range(memories):
                    b1, b2 = load_state(base + (m + m // 4) * heads * size, D, H)
                    if INITIAL:
                        b1, b2 = b1 * 0.0, b2 * 0.0
                    store_state(now + m * per_memory, b1, b2, D, H)
                tl.debug_barrier()
        local = j * C + tl.arange(0, C)
        here = g * (blocks * C) + local
        valid = (first_token + local) < tokens
        at_x = (g * tokens + first_token + local)[:, None] * D + feature[None, :]
        token = tl.load(x + at_x, mask=valid[:, None], other=0.0).to(w_eta.dtype)
        f1, f2 = frozen(base, opened, D, H, INITIAL)
        key, inverse = unit_vector(token, f1, f2, DOT)
        f1, f2 = frozen(base + heads * size, opened + per_memory, D, H, INITIAL)
        value, inverse = unit_vector(token, f1, f2, DOT)
        f1, f2 = frozen(base + 2 * heads * size, opened + 2 * per_memory, D, H, INITIAL)
        logit, pulled, act, slope = scalar(token, w_eta, f1, f2, DOT)
        step = eta_max / (1.0 + tl.exp(-(logit + tl.load(bias + n))))
        step = tl.where(valid, step, 0.0)
        f1, f2 = frozen(base + 3 * heads * size, opened + 3 * per_memory, D, H, INITIAL)
        logit, pulled, act, slope = scalar(token, w_alpha, f1, f2, DOT)
        decay = tl.where(valid, log_sigmoid(logit + tl.load(bias + heads + n)), 0.0)
        if ADAPTIVE:
            f1, f2 = frozen(base + 5 * heads * size, opened + 4 * per_memory, D, H, INITIAL)
            token = tl.load(source + at_x, mask=valid[:, None], other=0.0).to(w_eta.dtype)
            asked, inverse = unit_vector(token, f1, f2, DOT)
            tl.store(query + here[:, None] * D + feature[None, :], asked)
        tl.store(k + here[:, None] * D + feature[None, :], key)
        tl.store(v + here[:, None] * D + feature[None, :], value)
        tl.store(eta + here, step)
        tl.store(log_alpha + here, decay)

        prev, end, total, prev_lost, total_lost, ratio = decays(decay, C)
        inverse2 = key_inverse(key, step, ratio, C, DELTA2, DOT)
        for m in range(memories):
            b1, b2 = load_state(base + (m + m // 4) * heads * size, D, H)
            f1, f2 = load_state(opened + m * per_memory, D, H)
            if INITIAL:
                f1, f2 = f1 + b1, f2 + b2
            d1, d2 = load_state(now + m * per_memory, D, H)
            d1, d2, u1, u2, e = write(
                key, value, step, prev, end, total, ratio, inverse2, f1, f2, d1, d2, b1, b2,
                C, INITIAL, DELTA1, DELTA2, TARGET, DOT,
            )  # fmt: skip
            store_state(after + m * per_memory, d1, d2, D, H)
        tl.debug_barrier()


@triton.jit
def projections_backward(
    x, dx, source, d_source, k, v, eta, log_alpha, d_query, dk, dv, d_log_eta, d_log_alpha,
    base, d_base, d_state, d_frozen, readout, d_readout, bias, d_bias, scratch, reset,
    tokens, first_token, blocks, slots, heads, chunks, first_chunk, eta_max,
    D: tl.constexpr, H: tl.constexpr, C: tl.constexpr, PERIOD: tl.constexpr,
    ADAPTIVE: tl.constexpr, HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
    DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `projections_forward`, whose `scratch` holds the Delta before every block.

    d_query [G, F, D] and dk, dv, d_log_eta, d_log_alpha: what M_mem sends back. d_state
    [memories, G, 2, D, H]: gradient of W after the segment, becomes that of W before it. d_frozen:
    zeros of that shape, and zeros again afterwards. Writes dx (and d_source); adds to d_base
    [memories, G, 2, D, H], d_readout [2, G, D] and d_bias [2, G].
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    memories = 5 if ADAPTIVE else 4
    size = 2 * D * H
    n = g % heads
    base += n * size
    scratch += g * slots * size
    per_memory = count * slots * size
    d_base += g * size
    d_state += g * size
    d_frozen += g * size
    feature = tl.arange(0, D)
    w_eta, w_alpha = (
        tl.load(readout + n * D + feature),
        tl.load(readout + (heads + n) * D + feature),
    )
    dw_eta, dw_alpha = w_eta * 0.0, w_alpha * 0.0
    db_eta, db_alpha = tl.sum(dw_eta, 0), tl.sum(dw_alpha, 0)
    for back in range(blocks):
        j = blocks - 1 - back
        opened = scratch + ((j - j % PERIOD) % slots) * size
        now = scratch + (j % slots) * size
        local = j * C + tl.arange(0, C)
        here = g * (blocks * C) + local
        at_block = here[:, None] * D + feature[None, :]
        valid = (first_token + local) < tokens
        key, value = tl.load(k + at_block), tl.load(v + at_block)
        step = tl.load(eta + here)
        prev, end, total, prev_lost, total_lost, ratio = decays(tl.load(log_alpha + here), C)
        inverse2 = key_inverse(key, step, ratio, C, DELTA2, DOT)
        d_key, d_value = tl.load(dk + at_block), tl.load(dv + at_block)
        d_step, d_decay = tl.load(d_log_eta + here), tl.load(d_log_alpha + here)
        for m in range(memories):
            b1, b2 = load_state(base + (m + m // 4) * heads * size, D, H)
            f1, f2 = load_state(opened + m * per_memory, D, H)
            if INITIAL:
                f1, f2 = f1 + b1, f2 + b2
            d1, d2 = load_state(now + m * per_memory, D, H)
            s1, s2 = load_state(d_state + m * count * size, D, H)
            dq_m, dk_m, dv_m, p, dla, s1, s2, db1, db2, df1, df2 = write_backward(
                key, value, key, key, step, prev, end, total, prev_lost, total_lost, ratio,
                inverse2, f1, f2, d1, d2, b1, b2, s1, s2,
                C, False, INITIAL, DELTA1, DELTA2, TARGET, DOT,
            )  # fmt: skip
            d_key += dk_m
            d_value += dv_m
            d_step += p
            d_decay += dla
            store_state(d_state + m * count * size, s1, s2, D, H)
            add_state(d_frozen + m * count * size, df1, df2, D, H)
            if INITIAL:
                add_state(d_base + m * count * size, db1, db2, D, H)
        tl.debug_barrier()

        at_x = (g * tokens + first_token + local)[:, None] * D + feature[None, :]
        token = tl.load(x + at_x, mask=valid[:, None], other=0.0).to(key.dtype)
        f1, f2 = frozen(base, opened, D, H, INITIAL)
        unit, inverse = unit_vector(token, f1, f2, DOT)
        dy = unit_backward(d_key, unit, inverse)
        d_token, df1, df2 = unit_vector_backward(token, dy, f1, f2, DOT)
        add_state(d_frozen, df1, df2, D, H)
        f1, f2 = frozen(base + heads * size, opened + per_memory, D, H, INITIAL)
        unit, inverse = unit_vector(token, f1, f2, DOT)
        dy = unit_backward(d_value, unit, inverse)
        more, df1, df2 = unit_vector_backward(token, dy, f1, f2, DOT)
        d_token += more
        add_state(d_frozen + count * size, df1, df2, D, H)

        f1, f2 = frozen(base + 2 * heads * size, opened + 2 * per_memory, D, H, INITIAL)
        logit, pulled, act, slope = scalar(token, w_eta, f1, f2, DOT)
        d_logit = d_step / (1.0 + tl.exp(logit + tl.load(bias + n)))
        d_logit = tl.where(valid, d_logit, 0.0)
        more, df1, df2, dw = scalar_backward(token, w_eta, d_logit, f1, f2, DOT)
        d_token += more
        dw_eta += dw
        db_eta += tl.sum(d_logit, 0)
        add_state(d_frozen + 2 * count * size, df1, df2, D, H)
        f1, f2 = frozen(base + 3 * heads * size, opened + 3 * per_memory, D, H, INITIAL)
        logit, pulled, act, slope = scalar(token, w_alpha, f1, f2, DOT)
        d_logit = d_decay / (1.0 + tl.exp(logit + tl.load(bias + heads + n)))
        d_logit = tl.where(valid, d_logit, 0.0)
        more, df1, df2, dw = scalar_backward(token, w_alpha, d_logit, f1, f2, DOT)
        d_token += more
        dw_alpha += dw
        db_alpha += tl.sum(d_logit, 0)
        add_state(d_frozen + 3 * count * size, df1, df2, D, H)
        tl.store(dx + at_x, d_token, mask=valid[:, None])
        if ADAPTIVE:
            f1, f2 = frozen(base + 5 * heads * size, opened + 4 * per_memory, D, H, INITIAL)
            token = tl.load(source + at_x, mask=valid[:, None], other=0.0).to(key.dtype)
            unit, inverse = unit_vector(token, f1, f2, DOT)
            dy = unit_backward(tl.load(d_query + at_block), unit, inverse)
            d_token, df1, df2 = unit_vector_backward(token, dy, f1, f2, DOT)
            add_state(d_frozen + 4 * count * size, df1, df2, D, H)
            tl.store(d_source + at_x, d_token, mask=valid[:, None])
        tl.debug_barrier()
        if j % PERIOD == 0:
            for m in range(memories):
                s1, s2 = load_state(d_state + m * count * size, D, H)
                df1, df2 = load_state(d_frozen + m * count * size, D, H)
                s1, s2 = s1 + df1, s2 + df2
                if HAS_RESET:
                    at = (g // heads) * chunks + first_chunk + j // PERIOD
                    again = tl.load(reset + at) != 0
                    if again:
                        add_state(d_base + m * count * size, s1, s2, D, H)
                    s1, s2 = tl.where(again, 0.0, s1), tl.where(again, 0.0, s2)
                store_state(d_state + m * count * size, s1, s2, D, H)
                store_state(d_frozen + m * count * size, df1 * 0.0, df2 * 0.0, D, H)
            tl.debug_barrier()
    at_w = g * D + feature
    tl.store(d_readout + at_w, tl.load(d_readout + at_w) + dw_eta)
    tl.store(d_readout + count * D + at_w, tl.load(d_readout + count * D + at_w) + dw_alpha)
    tl.store(d_bias + g, tl.load(d_bias + g) + db_eta)
    tl.store(d_bias + count + g, tl.load(d_bias + count + g) + db_alpha)
