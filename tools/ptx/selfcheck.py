"""Small Triton kernels whose results are known, for the machine itself: matrix products of many
shapes, operand orders and numbers of warps (mma, wgmma, ldmatrix, stmatrix and their layouts),
sums and functions along rows, loops that fetch ahead."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

SHAPES = (
    (16, 16, 16), (16, 64, 32), (32, 32, 64), (32, 64, 16), (64, 32, 64), (64, 64, 64),
    (128, 32, 64), (64, 128, 128),
)  # fmt: skip
SMALL = 64 * 64 * 64


@triton.jit
def product(
    a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] @ b [K, N]; a turned operand lies transposed."""
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if A_TURNED:
        left = tl.trans(tl.load(a + k[:, None] * M + i[None, :]))
    else:
        left = tl.load(a + i[:, None] * K + k[None, :])
    if B_TURNED:
        right = tl.trans(tl.load(b + j[:, None] * K + k[None, :]))
    else:
        right = tl.load(b + k[:, None] * N + j[None, :])
    tl.store(c + i[:, None] * N + j[None, :], tl.dot(left, right, input_precision=PRECISION))


@triton.jit
def row_functions(x, out, sums, rows, N: tl.constexpr, ROWS: tl.constexpr):
    """sigmoid(2 x) + sqrt(|x|) + sum of the row * largest of the row, below the diagonal, and x
    elsewhere: [rows, N]; and the sums [rows]. ROWS rows at a time, fetched ahead."""
    i, j = tl.arange(0, ROWS), tl.arange(0, N)
    for first in tl.range(0, rows, ROWS, num_stages=2):
        row = first + i[:, None]
        at = row * N + j[None, :]
        z = tl.load(x + at, mask=row < rows, other=0.0).to(tl.float32)
        total, most = tl.sum(z, 1), tl.max(z, 1)
        y = 1.0 / (1.0 + tl.exp(-2.0 * z)) + tl.sqrt(tl.abs(z)) + (total * most)[:, None]
        tl.store(out + at, tl.where(row > j[None, :], y, z), mask=row < rows)
        tl.store(sums + first + i, total, mask=first + i < rows)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def products(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(what was multiplied, error relative to the largest value) of every product."""
    generator = torch.Generator().manual_seed(0)
    for precision in ("tf32",) if dtype == torch.bfloat16 else ("tf32", "tf32x3"):
        for warps in (1, 2, 4, 8):
            for M, N, K in SHAPES:
                if M * N * K > SMALL and warps < 4:
                    continue
                for turned in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    a, b = (
                        torch.randn(*size, generator=generator).to(dtype)
                        for size in ((M, K), (K, N))
                    )
                    c = torch.full((M, N), torch.nan)
                    given = [
                        z.t().contiguous() if turn else z
                        for z, turn in zip((a, b), turned, strict=True)
                    ]
                    product[(1,)](*given, c, M, N, K, *turned, precision, num_warps=warps)
                    name = f"{M} x {N} x {K}, turned {turned}, {warps} warps, {precision}"
                    yield name, _error(c, a.double() @ b.double())


def functions(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(shape and warps, error) of `row_functions`."""
    generator = torch.Generator().manual_seed(0)
    for warps in (1, 2, 4):
        for rows, N in ((16, 16), (40, 64), (100, 32)):
            x = torch.randn(rows, N, generator=generator).to(dtype)
            out, sums = torch.full((rows, N), torch.nan), torch.full((rows,), torch.nan)
            row_functions[(1,)](x, out, sums, rows, N, 16, num_warps=warps)
            z = x.double()
            total, most = z.sum(1), z.max(1).values
            y = torch.sigmoid(2 * z) + z.abs().sqrt() + (total * most)[:, None]
            below = torch.arange(rows)[:, None] > torch.arange(N)[None, :]
            error = max(_error(out, torch.where(below, y, z)), _error(sums, total))
            yield f"rows of {rows} x {N}, {warps} warps", error
