"""k, v, eta, alpha and the adaptive query of a projection chunk, read out of the memories that
make them (Eqs. 84-86): a program per (row, head, memory).

Memory m is k, v, eta, alpha or, with an adaptive query, q; shapes and tiles as in
`hope.scan.kernels.writes`. x, source (of M_q) [G, T, D]; readout [2, heads, D] and bias [2, heads]
of eta and alpha; query [G, F, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import (
    AHEAD,
    dot,
    gelu,
    inverse_length,
    launched,
    log_sigmoid,
    tile_at,
    unit_backward,
)
from hope.scan.kernels.states import add_to
from hope.scan.kernels.writes import read_start


@triton.jit
def read_scalar(
    x, w, frozen,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """<w, M(x)> of x [C, D] -> [C], as <w, x> + <W1^T w, act>."""
    logit = tl.sum(x * w[None, :], 1)
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at = tile_at(first, D, H, TILE)
        z = dot(x, tl.load(frozen + D * H + at), DOT)
        act, _, _ = gelu(z)
        pulled = tl.sum(w[:, None] * tl.load(frozen + at), 0)
        logit += tl.sum(act * pulled[None, :], 1)
    return logit


@launched
def project_forward(
    x, source, k, v, eta, log_alpha, query, readout, bias, frozen,
    tokens, length, first_token, first, first_block, opened, heads, eta_max,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Fill the buffers from token `first` on, C of them for each program along the grid's third
    axis, from the W of the projection chunk that block first_block, the first of OPEN, opens."""
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    n = g % heads
    frozen += ((m * count + g) * opened + first_block // OPEN % opened) * (2 * D * H)
    column = tl.arange(0, D)
    local = first + tl.program_id(2) * C + tl.arange(0, C)
    here = g * length + local
    valid = (first_token + local) < tokens
    at = here[:, None] * D + column[None, :]
    at_x = (g * tokens + first_token + local)[:, None] * D + column[None, :]
    if (m == 2) | (m == 3):
        token = tl.load(x + at_x, mask=valid[:, None], other=0.0).to(eta.dtype.element_ty)
        weight = tl.load(readout + ((m - 2) * heads + n) * D + column)
        logit = read_scalar(token, weight, frozen, D, H, TILE, DOT)
        logit += tl.load(bias + (m - 2) * heads + n)
        if m == 2:
            tl.store(eta + here, tl.where(valid, eta_max / (1.0 + tl.exp(-logit)), 0.0))
        else:
            tl.store(log_alpha + here, tl.where(valid, log_sigmoid(logit), 0.0))
    else:
        given, made = x, k
        if m == 1:
            made = v
        if m == 4:
            given, made = source, query
        token = tl.load(given + at_x, mask=valid[:, None], other=0.0).to(k.dtype.element_ty)
        y = read_start(token, frozen, D, H, TILE, DOT)
        tl.store(made + at, y * inverse_length(y)[:, None])


@triton.jit
def read_start_backward(
    d_out, q, frozen, d_state,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `read_start` from d_out [C, D]: dq; adds to d_state what the frozen W gets."""
    dq = d_out
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at = tile_at(first, D, H, TILE)
        f2 = tl.load(frozen + D * H + at)
        act, slope, _ = gelu(dot(q, f2, DOT))
        dz = dot(d_out, tl.load(frozen + at), DOT) * slope
        dq += dot(dz, tl.trans(f2), DOT)
        add_to(d_state + at, dot(tl.trans(d_out), act, DOT))
        add_to(d_state + D * H + at, dot(tl.trans(q), dz, DOT))
    return dq


@triton.jit
def read_scalar_backward(
    d_logit, x, w, frozen, d_state,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `read_scalar` from d_logit [C]: dx, dw; adds to d_state like the above."""
    dx = d_logit[:, None] * w[None, :]
    dw = tl.sum(d_logit[:, None] * x, 0)
    for first in tl.range(0, H, TILE, num_stages=AHEAD):
        at = tile_at(first, D, H, TILE)
        f2 = tl.load(frozen + D * H + at)
        act, slope, _ = gelu(dot(x, f2, DOT))
        f1 = tl.load(frozen + at)
        dz = d_logit[:, None] * tl.sum(w[:, None] * f1, 0)[None, :] * slope
        dx += dot(dz, tl.trans(f2), DOT)
        d_pulled = tl.sum(d_logit[:, None] * act, 0)
        dw += tl.sum(f1 * d_pulled[None, :], 1)
        add_to(d_state + at, w[:, None] * d_pulled[None, :])
        add_to(d_state + D * H + at, dot(tl.trans(x), dz, DOT))
    return dx, dw


@triton.jit
def sum_over(pointer, at, stride, memories: tl.constexpr):
    """Sum over the memories of what lies `stride` apart."""
    total = tl.load(pointer + at)
    for m in tl.static_range(1, memories):
        total += tl.load(pointer + m * stride + at)
    return total


@launched
def project_backward(
    x, source, dx, d_query, dk, dv, d_log_eta, d_log_alpha, d_state,
    readout, d_readout, bias, d_bias, frozen,
    tokens, length, first_token, first, first_block, blocks, opened, heads,
    D: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
    MEMORIES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `project_forward` over the `blocks` of a chunk.

    dk, dv [memories, G, F, D], d_log_eta, d_log_alpha [memories, G, F]: what each memory sends
    back; d_query [G, F, D]. Adds to d_state [memories, G, 2, D, H], d_readout [2, G, D] and d_bias
    [2, G]; writes dx [projections, G, F, D], each memory's own.
    """
    g = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64)
    n = g % heads
    d_state += (m * count + g) * (2 * D * H)
    frozen += ((m * count + g) * opened + first_block // OPEN % opened) * (2 * D * H)
    dx += m * count * length * D
    column = tl.arange(0, D)
    for i in range(blocks):
        local = first + i * C + tl.arange(0, C)
        here = g * length + local
        valid = (first_token + local) < tokens
        at = here[:, None] * D + column[None, :]
        at_x = (g * tokens + first_token + local)[:, None] * D + column[None, :]
        if (m == 2) | (m == 3):
            at_w = ((m - 2) * count + g) * D + column
            weight = tl.load(readout + ((m - 2) * heads + n) * D + column)
            token = tl.load(x + at_x, mask=valid[:, None], other=0.0).to(weight.dtype)
            logit = read_scalar(token, weight, frozen, D, H, TILE, DOT)
            logit += tl.load(bias + (m - 2) * heads + n)
            sent = d_log_eta
            if m == 3:
                sent = d_log_alpha
            d_logit = sum_over(sent, here, count * length, MEMORIES) / (1.0 + tl.exp(logit))
            d_logit = tl.where(valid, d_logit, 0.0)
            d_token, dw = read_scalar_backward(
                d_logit, token, weight, frozen, d_state, D, H, TILE, DOT
            )
            add_to(d_readout + at_w, dw)
            at_b = d_bias + (m - 2) * count + g
            add_to(at_b, tl.sum(d_logit, 0))
            tl.store(dx + at, d_token)
        else:
            if m == 4:
                given = source
                grad = tl.load(d_query + at, mask=valid[:, None], other=0.0)
            else:
                given, d_made = x, dk
                if m == 1:
                    d_made = dv
                grad = sum_over(d_made, at, count * length * D, MEMORIES)
            token = tl.load(given + at_x, mask=valid[:, None], other=0.0).to(grad.dtype)
            y = read_start(token, frozen, D, H, TILE, DOT)
            inverse = inverse_length(y)
            grad = unit_backward(grad, y * inverse[:, None], inverse)
            d_token = read_start_backward(grad, token, frozen, d_state, D, H, TILE, DOT)
            tl.store(dx + at, d_token)
        tl.debug_barrier()
