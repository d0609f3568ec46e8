"""Tiles of a memory's state and of its gradient S, loaded from global memory and stored there.

at: where a tile lies, from `tile_at`; INITIAL: states are Delta = W - M_0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_whole(frozen, fresh, at, delta, INITIAL: tl.constexpr):
    """Store a tile of W from that of Delta, as products take it; fresh: M_0."""
    if INITIAL:
        delta += tl.load(fresh + at)
    tl.store(frozen + at, delta)


@triton.jit
def add_to(pointer, x):
    """Add x to what lies at those addresses."""
    tl.store(pointer, tl.load(pointer) + x)


@triton.jit
def load_gradient(d_state, at, again, HAS_RESET: tl.constexpr):
    """A tile of S as the gradient of W after the block, and as it was sent back."""
    sent = tl.load(d_state + at)
    s = sent
    if HAS_RESET:
        s = tl.where(again, 0.0, s)
    return s, sent


@triton.jit
def store_gradient(
    d_state, d_base, at, s, sent, gone, total_lost, again,
    HAS_RESET: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Store a tile of S before the block, and add what M_0 gets."""
    tl.store(d_state + at, s)
    if INITIAL:
        lost = sent * total_lost
        if HAS_RESET:
            lost = tl.where(again, sent, lost)
        add_to(d_base + at, gone + lost)
    elif HAS_RESET:
        add_to(d_base + at, tl.where(again, sent, 0.0))
