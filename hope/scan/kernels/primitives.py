"""What the scan's kernels are built from: products, activations, decays, triangular inverses.

Everything is computed in the dtype of the buffers (float32, float64 under the interpreter); DOT
says how products are taken: "bf16" rounds the operands to bfloat16 and accumulates in float32,
otherwise it is Triton's input_precision. Letters: C tokens of a block, D the head's width, H the
memory's hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

launched = triton.jit(do_not_specialize=["first_block"])
"""Marks a kernel that is launched chunk by chunk. Triton would compile it for a first_block of 0, a
segment's first chunk, and once more for those of all others."""

NORM_EPS = tl.constexpr(1e-6)
STEP_FLOOR = tl.constexpr(0.01)
AHEAD = tl.constexpr(2)
"""Stages of a loop over tiles: what the next tile needs is on its way to shared memory while one is
worked on. What such a loop stores, it must not load in a later round."""
_GELU_1 = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_GELU_3 = tl.constexpr(0.07135481627260025)  # that times 0.044715


@triton.jit
def operand(x, DOT: tl.constexpr):
    """x as `dot` takes it; for what goes into several products.

    In bfloat16 it is rounded here, where it was computed. The compiler would move that behind the
    exchange that makes operands of matrix products, and compute x there again in every warp; it
    moves nothing across assembly that may have effects.
    """
    if (DOT == "bf16") & (x.dtype != tl.bfloat16):
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x.to(tl.bfloat16)], tl.bfloat16, is_pure=False, pack=2
        )
    return x


@triton.jit
def dot(a, b, DOT: tl.constexpr):
    """a [i, j] @ b [j, l], in the dtype of the buffers."""
    if DOT == "bf16":
        product = tl.dot(operand(a, DOT), operand(b, DOT))
    else:
        product = tl.dot(a, b, input_precision=DOT)
    return product


@triton.jit
def exact_dot(a, b, DOT: tl.constexpr):
    """The same for triangular systems. With bfloat16 inputs they are solved in TF32: its operands
    have three bits more than those of all other products, for a third of float32's instructions."""
    if DOT != "bf16":
        product = tl.dot(a, b, input_precision=DOT)
    else:
        product = tl.dot(a, b, input_precision="tf32")
    return product


@triton.jit
def gelu(z):
    """tanh-GELU of z, z * sigmoid(w(z)), and its first and second derivative."""
    square = z * z
    gate = 1.0 / (1.0 + tl.exp(-z * (_GELU_1 + _GELU_3 * square)))
    rise = _GELU_1 + 3.0 * _GELU_3 * square
    tilt = gate * (1.0 - gate)
    slope = gate + z * tilt * rise
    curvature = tilt * (rise * (2.0 + z * rise * (1.0 - 2.0 * gate)) + 6.0 * _GELU_3 * square)
    return z * gate, slope, curvature


@triton.jit
def inverse_length(z):
    """1 / |z| of each row of z [C, i], with |z| at least NORM_EPS -> [C]."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(z * z, 1)), NORM_EPS)


@triton.jit
def unit_backward(grad, e, inverse):
    """Gradient of z from that of e = z * inverse [C, i], inverse = `inverse_length(z)` [C]."""
    along = tl.where(inverse > 0.999 / NORM_EPS, 0.0, tl.sum(grad * e, 1))
    return (grad - e * along[:, None]) * inverse[:, None]


@triton.jit
def log_sigmoid(z):
    """ln(sigmoid(z)), accurate where it is close to 0: ln(1 + y) as a series in y / (2 + y)."""
    y = tl.exp(-tl.abs(z))
    s = y / (2.0 + y)
    t = s * s
    series = 1 / 11 + t * (1 / 13 + t * (1 / 15 + t * (1 / 17 + t * (1 / 19 + t / 21))))
    series = 1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * series)))
    return tl.minimum(z, 0.0) - 2.0 * s * (1.0 + t * series)


@triton.jit
def lost(log_share):
    """1 - exp(log_share) for log_share <= 0, accurate where it is close to 0."""
    y = -log_share
    series = 1 / 720 - y * (1 / 5040 - y * (1 / 40320 - y * (1 / 362880 - y / 3628800)))
    series = 1.0 - y * (1 / 2 - y * (1 / 6 - y * (1 / 24 - y * (1 / 120 - y * series))))
    return tl.where(y < 0.5, y * series, 1.0 - tl.exp(log_share))


@triton.jit
def log_before(log_alpha, C: tl.constexpr):
    """Log of the decay from the block's start to before each token [C]. A masked sum, not a
    difference: exactly independent of the token's own decay."""
    i = tl.arange(0, C)
    return tl.sum(tl.where(i[None, :] < i[:, None], log_alpha[None, :], 0.0), 1)


@triton.jit
def decay_after(log_alpha, C: tl.constexpr):
    """Decay from each token to the block's end [C]."""
    i = tl.arange(0, C)
    return tl.exp(tl.sum(tl.where(i[None, :] > i[:, None], log_alpha[None, :], 0.0), 1))


@triton.jit
def decay_ratio(log_alpha, C: tl.constexpr):
    """A_{t-1} / A_s for s < t, else zero [C, C]."""
    i = tl.arange(0, C)
    before = i[None, :] < i[:, None]
    log_end = tl.sum(tl.where(i[None, :] <= i[:, None], log_alpha[None, :], 0.0), 1)
    between = log_before(log_alpha, C)[:, None] - log_end[None, :]
    return tl.where(before, tl.exp(tl.where(before, between, 0.0)), 0.0)


@triton.jit
def log_decay_gradient(p, rows, boundary, C: tl.constexpr):
    """Gradient of log_alpha [C]; see `hope.scan.closed_form.log_decay_gradient`."""
    i = tl.arange(0, C)
    later = tl.sum(tl.where(i[None, :] > i[:, None], rows[None, :], 0.0), 1)
    return later - p + boundary


@triton.jit
def diagonal_inverse(strict, C: tl.constexpr, DOT: tl.constexpr):
    """(I + strict)^-1 of the blocks of 16 on the diagonal of strictly lower [C, C], zero around
    them; see `unit_lower_inverse`."""
    COUNT: tl.constexpr = C // 16
    at = tl.arange(0, COUNT)
    on_diagonal = at[:, None, None, None] == at[None, None, :, None]
    blocks = tl.reshape(strict, (COUNT, 16, COUNT, 16))
    blocks = tl.sum(tl.where(on_diagonal, blocks, 0.0), 2)
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    eye = tl.where(row == column, 1.0, 0.0).to(strict.dtype)
    near = row // 4 == column // 4
    x = tl.where(near, blocks, 0.0)
    square = exact_dot(x, x, DOT)
    inverse = eye - x + square - exact_dot(x, square, DOT)
    x = exact_dot(inverse, tl.where(near, 0.0, blocks), DOT)
    square = exact_dot(x, x, DOT)
    inverse = exact_dot(eye - x + square - exact_dot(x, square, DOT), inverse, DOT)
    whole = tl.where(on_diagonal, inverse[:, :, None, :], 0.0)
    return tl.reshape(whole, (C, C))


@triton.jit
def unit_lower_inverse(strict, C: tl.constexpr, DOT: tl.constexpr):
    """(I + strict)^-1 for strictly lower triangular [C, C], C = 16, 32 or 64.

    By blocks of 4, 16 and 64: with the inverse V of the diagonal blocks known and L what is
    below them in blocks four times as large, (I + V L)^-1 V = (I - X + X^2 - X^3) V for X = V L,
    because X^4 = 0. Higher powers, whose terms grow and cancel, never appear.
    """
    inverse = diagonal_inverse(strict, C, DOT)
    if C > 16:
        row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        eye = tl.where(row == column, 1.0, 0.0).to(strict.dtype)
        x = exact_dot(inverse, tl.where(row // 16 == column // 16, 0.0, strict), DOT)
        series = eye - x
        if C > 32:
            square = exact_dot(x, x, DOT)
            series += square - exact_dot(x, square, DOT)
        inverse = exact_dot(series, inverse, DOT)
    return inverse


@triton.jit
def tile_at(first, ROWS: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr):
    """Offsets of the columns from `first` on, TILE of them, of a matrix [ROWS, H]."""
    row, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    return row[:, None] * H + column[None, :] + first


@triton.jit
def load_rows(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix [ROWS, COLUMNS] that lies row after row."""
    return tl.load(pointer + tile_at(0, ROWS, COLUMNS, COLUMNS))


@triton.jit
def store_rows(pointer, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `load_rows`."""
    tl.store(pointer + tile_at(0, ROWS, COLUMNS, COLUMNS), x)
