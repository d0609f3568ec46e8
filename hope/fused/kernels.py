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
