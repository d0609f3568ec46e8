"""The kernels of `hope.fused`; imported only when they are launched, since they need triton.

All arithmetic is in the dtype of `weight` or `lse`: float32, or float64 under the interpreter.
What is loaded is rounded at most once, when it is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gated_norm_rows(
    read, gate, row, inside, n, length, heads, row_stride, head_stride, token_stride,
    D: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Rows of `read` and of `gate`, as loaded; where their features lie in what is laid out like
    the gate; which of them exist."""
    feature = tl.arange(0, FEATURES)
    mask = inside[:, None] & (feature < D)[None, :]
    row = row.to(tl.int64)
    start = (row // length) * row_stride + n * head_stride + (row % length) * token_stride
    x = tl.load(read + start[:, None] + feature[None, :], mask=mask, other=0.0)
    at = ((row * heads + n) * D)[:, None] + feature[None, :]
    return x, tl.load(gate + at, mask=mask, other=0.0), at, mask


@triton.jit
def gated_norm_forward(
    read, weight, gate, out, rows, length, heads, row_stride, head_stride, token_stride, eps,
    D: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = RMSNorm(read) * weight * silu(gate), ROWS tokens of head n = program_id(1) a program.

    read [B, heads, length, D] with those strides; weight [heads, D]; gate and out [rows, heads, D],
    rows = B * length. FEATURES: D, or the power of two above it.
    """
    n = tl.program_id(1).to(tl.int64)
    feature = tl.arange(0, FEATURES)
    w = tl.load(weight + n * D + feature, mask=feature < D, other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x, g, at, mask = _gated_norm_rows(
        read, gate, row, row < rows, n, length, heads, row_stride, head_stride, token_stride,
        D, FEATURES,
    )  # fmt: skip
    x, g = x.to(w.dtype), g.to(w.dtype)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    y = x * scale[:, None] * w[None, :] * (g / (1.0 + tl.exp(-g)))
    tl.store(out + at, y, mask=mask)


@triton.jit
def gated_norm_backward(
    read, weight, gate, d_out, d_read, d_weight, d_gate,
    rows, length, heads, row_stride, head_stride, token_stride, eps,
    D: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Derivative of `gated_norm_forward`; every num_programs(0)-th group of ROWS tokens a program.

    d_out and d_gate are laid out like gate; d_read [B, heads, length, D] is contiguous; d_weight
    [num_programs(0), heads, D] gets each program's sum.
    """
    n = tl.program_id(1).to(tl.int64)
    feature = tl.arange(0, FEATURES)
    w = tl.load(weight + n * D + feature, mask=feature < D, other=0.0)
    dw = w * 0.0
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        x, g, at, mask = _gated_norm_rows(
            read, gate, row, row < rows, n, length, heads, row_stride, head_stride, token_stride,
            D, FEATURES,
        )  # fmt: skip
        x, g = x.to(w.dtype), g.to(w.dtype)
        dy = tl.load(d_out + at, mask=mask, other=0.0).to(w.dtype)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
        unit = x * scale[:, None]
        opened = 1.0 / (1.0 + tl.exp(-g))
        silu = g * opened
        along = dy * unit
        dw += tl.sum(along * silu, 0)
        d_silu = along * w[None, :]
        tl.store(d_gate + at, d_silu * (opened + silu * (1.0 - opened)), mask=mask)
        du = dy * silu * w[None, :]
        dx = (du - unit * (tl.sum(du * unit, 1) / D)[:, None]) * scale[:, None]
        row = row.to(tl.int64)
        start = (((row // length) * heads + n) * length + row % length) * D
        tl.store(d_read + start[:, None] + feature[None, :], dx, mask=mask)
    own = (tl.program_id(0) * heads + n) * D
    tl.store(d_weight + own + feature, dw, mask=feature < D)


@triton.jit
def cross_entropy_forward(logits, labels, lse, picked, columns, BLOCK: tl.constexpr):
    """Of a row a program: lse, the logarithm of the sum of exp(logits), in one pass with a running
    maximum (arXiv 1805.02867); picked, the label's logit, 0 where the label is no column.

    logits [rows, columns], labels int64 [rows], lse and picked [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    kind = lse.dtype.element_ty
    logits += row * columns
    largest = tl.full((), -3e38, kind)
    total = tl.full((), 0.0, kind)
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < columns, other=-float("inf")).to(kind)
        higher = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0)
        largest = higher
    tl.store(lse + row, largest + tl.log(total))
    label = tl.load(labels + row)
    own = (label >= 0) & (label < columns)
    tl.store(picked + row, tl.load(logits + label, mask=own, other=0.0).to(kind))


@triton.jit
def cross_entropy_backward(
    logits, labels, lse, d_lse, d_picked, d_logits, columns, BLOCK: tl.constexpr
):
    """d_logits = softmax * d_lse + [column is the label] * d_picked, BLOCK columns of a row a
    program; shapes as in `cross_entropy_forward`. Rows whose d_lse is 0 are not read."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    share, own = tl.load(d_lse + row), tl.load(d_picked + row)
    read = tl.where(share != 0.0, columns, 0)
    z = tl.load(logits + row * columns + at, mask=at < read, other=-float("inf")).to(share.dtype)
    grad = tl.exp(z - tl.load(lse + row)) * share
    grad += tl.where(at == tl.load(labels + row), own, 0.0)
    tl.store(d_logits + row * columns + at, grad, mask=at < columns)


@triton.jit
def _inputs(
    x, tail, row, position, mask, column, tokens, channels,
    WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The inputs of a row at positions from its first token on, those before it from the tail."""
    at = (row * tokens + position)[:, None] * channels + column[None, :]
    value = tl.load(x + at, mask=mask & (position >= 0)[:, None], other=0.0)
    if TAIL:
        at = (row * (WIDTH - 1) + WIDTH - 1 + position)[:, None] * channels + column[None, :]
        before = mask & (position < 0)[:, None] & (position > -WIDTH)[:, None]
        value += tl.load(tail + at, mask=before, other=0.0)
    return value


@triton.jit
def convolve_forward(
    x, weight, tail, reach, out, tokens, channels, WIDTH: tl.constexpr,
    TAIL: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out_t = sum of weight[WIDTH - 1 - j] * x_{t-j} over j up to reach_t, ROWS tokens and COLUMNS
    channels of row program_id(2) a program.

    x, out [rows, tokens, channels]; tail [rows, WIDTH - 1, channels], looked at with TAIL; weight
    [WIDTH, channels]; reach [rows, tokens], looked at with REACH.
    """
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, real = token < tokens, column < channels
    total = tl.zeros((ROWS, COLUMNS), weight.dtype.element_ty)
    known = tl.full((ROWS,), WIDTH, tl.int32)
    if REACH:
        known = tl.load(reach + row * tokens + token, mask=inside, other=0)
    for back in tl.static_range(WIDTH):
        tap = tl.load(weight + (WIDTH - 1 - back) * channels + column, mask=real, other=0.0)
        mask = (inside & (known >= back))[:, None] & real[None, :]
        value = _inputs(
            x, tail, row, token - back, mask, column, tokens, channels, WIDTH, TAIL
        )  # fmt: skip
        total += tap[None, :] * value.to(total.dtype)
    at = (row * tokens + token)[:, None] * channels + column[None, :]
    tl.store(out + at, total, mask=inside[:, None] & real[None, :])


@triton.jit
def convolve_backward(
    x, weight, tail, reach, d_out, d_x, d_weight, d_tail, rows, tokens, channels,
    TAPS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, REACH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Derivative of `convolve_forward`; every num_programs(0)-th group of ROWS inputs a program.

    d_out, d_x like x; d_tail like tail; d_weight [num_programs(0), WIDTH, channels] gets each
    program's sum. TAPS: WIDTH, or the power of two above it.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < channels
    taps = tl.arange(0, TAPS)
    d_taps = tl.zeros((TAPS, COLUMNS), weight.dtype.element_ty)
    before = WIDTH - 1 if TAIL else 0
    groups = tl.cdiv(tokens + before, ROWS)
    for group in range(tl.program_id(0), rows * groups, tl.num_programs(0)):
        row = (group // groups).to(tl.int64)
        position = (group % groups) * ROWS + tl.arange(0, ROWS) - before
        inside = position < tokens
        whole = inside[:, None] & real[None, :]
        value = _inputs(
            x, tail, row, position, whole, column, tokens, channels, WIDTH, TAIL
        ).to(d_taps.dtype)  # fmt: skip
        total = tl.zeros((ROWS, COLUMNS), d_taps.dtype)
        for back in tl.static_range(WIDTH):
            token = position + back
            reached = (token >= 0) & (token < tokens)
            if REACH:
                known = tl.load(reach + row * tokens + token, mask=reached, other=-1)
                reached = reached & (known >= back)
            at = (row * tokens + token)[:, None] * channels + column[None, :]
            mask = reached[:, None] & real[None, :]
            gradient = tl.load(d_out + at, mask=mask, other=0.0).to(d_taps.dtype)
            tap = tl.load(weight + (WIDTH - 1 - back) * channels + column, mask=real, other=0.0)
            total += tap[None, :] * gradient
            along = tl.sum(value * gradient, 0)
            d_taps += tl.where((taps == WIDTH - 1 - back)[:, None], along[None, :], 0.0)
        at = (row * tokens + position)[:, None] * channels + column[None, :]
        tl.store(d_x + at, total, mask=whole & (position >= 0)[:, None])
        if TAIL:
            at = (row * before + before + position)[:, None] * channels + column[None, :]
            tl.store(d_tail + at, total, mask=whole & (position < 0)[:, None])
    own = (tl.program_id(0) * WIDTH + taps)[:, None] * channels + column[None, :]
    tl.store(d_weight + own, d_taps, mask=(taps < WIDTH)[:, None] & real[None, :])
