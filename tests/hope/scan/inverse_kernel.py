"""A kernel around `unit_lower_inverse` alone; importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import unit_lower_inverse


@triton.jit
def invert(strict, out, C: tl.constexpr, DOT: tl.constexpr):
    """strict, out: [C, C]."""
    at = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(out + at, unit_lower_inverse(tl.load(strict + at), C, DOT))
