"""M_mem over the blocks of a segment, forward and backward: one program per row and head.

Delta (forward) and the state's gradient (backward) stay in the program from block to block. A
memory chunk, whose start is the frozen state, is OPEN blocks; a projection chunk is PERIOD.

Shapes, with g = row * heads + head of G, F = blocks * C tokens of the segment and T = tokens of
the sequence: k, v [G, F, D]; eta, log_alpha [G, F]; states [G, 2, D, H] (W1, then W2 transposed);
base [heads, 2, D, H]; scratch [G, slots, 2, D, H], Delta before each block; reset [rows, chunks]
bytes. q and what is like it: g * q_stride + (q_first + token of the segment) * D. out: [G, T, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.blocks import (
    key_inverse,
    read_causal,
    read_start,
    read_start_backward,
    write,
    write_backward,
)
from hope.scan.kernels.primitives import add_state, decays, load_state, store_state


@triton.jit
def memory_forward(
    q, out, k, v, eta, log_alpha, base, state, scratch, reset,
    q_stride, q_first, tokens, first_token, blocks, slots, heads, chunks, first_chunk,
    D: tl.constexpr, H: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr, PERIOD: tl.constexpr,
    READ: tl.constexpr, SAVE: tl.constexpr, HAS_RESET: tl.constexpr,
    CAUSAL: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr, DELTA2: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Run from `state`, which becomes the state after the segment.

    READ: write `out`; SAVE: write `scratch`.
    """
    g = tl.program_id(0).to(tl.int64)
    base += (g % heads) * (2 * D * H)
    state += g * (2 * D * H)
    scratch += g * slots * (2 * D * H)
    column = tl.arange(0, D)[None, :]
    d1, d2 = load_state(state, D, H)
    f1, f2 = d1, d2
    for j in range(blocks):
        b1, b2 = load_state(base, D, H)
        if HAS_RESET:
            at = (g // heads) * chunks + first_chunk + j // PERIOD
            again = (j % PERIOD == 0) & (tl.load(reset + at) != 0)
            if INITIAL:
                d1, d2 = tl.where(again, 0.0, d1), tl.where(again, 0.0, d2)
            else:
                d1, d2 = tl.where(again, b1, d1), tl.where(again, b2, d2)
        if SAVE:
            store_state(scratch + j * (2 * D * H), d1, d2, D, H)
        now1, now2 = d1, d2
        if INITIAL:
            now1, now2 = d1 + b1, d2 + b2
        if OPEN == 1:
            f1, f2 = now1, now2
        else:
            opens = j % OPEN == 0
            f1, f2 = tl.where(opens, now1, f1), tl.where(opens, now2, f2)
        local = j * C + tl.arange(0, C)
        here = g * (blocks * C) + local
        key = tl.load(k + here[:, None] * D + column)
        value = tl.load(v + here[:, None] * D + column)
        step = tl.load(eta + here)
        prev, end, total, prev_lost, total_lost, ratio = decays(tl.load(log_alpha + here), C)
        inverse2 = key_inverse(key, step, ratio, C, DELTA2, DOT)
        old1, old2 = d1, d2
        d1, d2, u1, u2, e = write(
            key, value, step, prev, end, total, ratio, inverse2, f1, f2, d1, d2, b1, b2,
            C, INITIAL, DELTA1, DELTA2, TARGET, DOT,
        )  # fmt: skip
        if READ:
            valid = ((first_token + local) < tokens)[:, None]
            source = q + g * q_stride + (q_first + local)[:, None] * D + column
            query = tl.load(source, mask=valid, other=0.0).to(key.dtype)
            if CAUSAL:
                answer, act, slope, across1, across2 = read_causal(
                    query, key, prev, ratio, e, u1, u2, old1, old2, b1, b2, INITIAL, TARGET, DOT
                )
            else:
                answer, act, slope = read_start(query, f1, f2, DOT)
            target = out + (g * tokens + first_token + local)[:, None] * D + column
            tl.store(target, answer, mask=valid)
    store_state(state, d1, d2, D, H)


@triton.jit
def memory_backward(
    q, d_out, dq, k, v, eta, log_alpha, dk, dv, d_log_eta, d_log_alpha,
    base, d_base, d_state, scratch, reset,
    q_stride, q_first, tokens, first_token, blocks, slots, heads, chunks, first_chunk,
    D: tl.constexpr, H: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr, PERIOD: tl.constexpr,
    HAS_RESET: tl.constexpr, CAUSAL: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr,
    DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `memory_forward`: from d_out [G, T, D] and d_state, the gradient of W after
    the segment, which becomes that of W before it.

    Writes dq, dk, dv, d_log_eta, d_log_alpha, laid out as what they are gradients of, and adds to
    d_base [G, 2, D, H] what M_0 gets.
    """
    g = tl.program_id(0).to(tl.int64)
    base += (g % heads) * (2 * D * H)
    d_base += g * (2 * D * H)
    d_state += g * (2 * D * H)
    scratch += g * slots * (2 * D * H)
    column = tl.arange(0, D)[None, :]
    s1, s2 = load_state(d_state, D, H)
    a1, a2 = s1 * 0.0, s2 * 0.0  # what the frozen state has got since its chunk's last block
    for back in range(blocks):
        j = blocks - 1 - back
        b1, b2 = load_state(base, D, H)
        d1, d2 = load_state(scratch + j * (2 * D * H), D, H)
        f1, f2 = d1, d2
        if OPEN > 1:
            f1, f2 = load_state(scratch + (j - j % OPEN) * (2 * D * H), D, H)
        if INITIAL:
            f1, f2 = f1 + b1, f2 + b2
        local = j * C + tl.arange(0, C)
        here = g * (blocks * C) + local
        key = tl.load(k + here[:, None] * D + column)
        value = tl.load(v + here[:, None] * D + column)
        step = tl.load(eta + here)
        prev, end, total, prev_lost, total_lost, ratio = decays(tl.load(log_alpha + here), C)
        inverse2 = key_inverse(key, step, ratio, C, DELTA2, DOT)
        valid = ((first_token + local) < tokens)[:, None]
        at_q = g * q_stride + (q_first + local)[:, None] * D + column
        at_out = (g * tokens + first_token + local)[:, None] * D + column
        query = tl.load(q + at_q, mask=valid, other=0.0).to(key.dtype)
        d_answer = tl.load(d_out + at_out, mask=valid, other=0.0).to(key.dtype)
        d_query, d_key, d_value, p, d_decay, s1, s2, db1, db2, df1, df2 = write_backward(
            key, value, query, d_answer, step, prev, end, total, prev_lost, total_lost, ratio,
            inverse2, f1, f2, d1, d2, b1, b2, s1, s2,
            C, CAUSAL, INITIAL, DELTA1, DELTA2, TARGET, DOT,
        )  # fmt: skip
        if not CAUSAL:
            d_query, more1, more2 = read_start_backward(d_answer, query, f1, f2, DOT)
            df1 += more1
            df2 += more2
        if OPEN > 1:
            opens = j % OPEN == 0
            df1 += a1
            df2 += a2
            a1, a2 = tl.where(opens, 0.0, df1), tl.where(opens, 0.0, df2)
            df1, df2 = tl.where(opens, df1, 0.0), tl.where(opens, df2, 0.0)
        s1 += df1
        s2 += df2
        if INITIAL:
            tl.debug_barrier()
            add_state(d_base, db1, db2, D, H)
        if HAS_RESET:
            at = (g // heads) * chunks + first_chunk + j // PERIOD
            again = (j % PERIOD == 0) & (tl.load(reset + at) != 0)
            if again:
                tl.debug_barrier()
                add_state(d_base, s1, s2, D, H)
            s1, s2 = tl.where(again, 0.0, s1), tl.where(again, 0.0, s2)
        tl.store(dq + at_q, d_query, mask=valid)
        tl.store(dk + here[:, None] * D + column, d_key)
        tl.store(dv + here[:, None] * D + column, d_value)
        tl.store(d_log_eta + here, p)
        tl.store(d_log_alpha + here, d_decay)
    store_state(d_state, s1, s2, D, H)
