"""What the memories of a head share in a block of C tokens: decays, the triangular system of W2 and
the queries' products with the keys, none of which depends on a memory's state.

One program per (row, head, block). A frame is stored as `ratio`, `system2` and `across2` [C, C],
`prev`, `end` and `prev_lost` [C], then `total` and `total_lost`, padded to [C]; letters as in
`hope.scan.closed_form.Frame`, and system2 = (I + eta ratio k k^T)^-1, across2 = ratio q k^T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import (
    decay_after,
    decay_ratio,
    dot,
    launched,
    load_rows,
    log_before,
    lost,
    store_rows,
    tile_at,
    unit_lower_inverse,
)


def frame_size(block: int) -> int:
    """Elements of a frame of that many tokens."""
    return 3 * block * block + 4 * block


@triton.jit
def load_queries(pointer, valid, like, C: tl.constexpr, D: tl.constexpr):
    """Rows [C, D] where valid [C], in the dtype that `like` points to, else zero."""
    return tl.load(pointer + tile_at(0, C, D, D), mask=valid[:, None], other=0.0).to(
        like.dtype.element_ty
    )


@triton.jit
def load_decays(frame, C: tl.constexpr):
    """prev, end, prev_lost [C], total and total_lost."""
    rows = frame + 3 * C * C
    i = tl.arange(0, C)
    return (
        tl.load(rows + i),
        tl.load(rows + C + i),
        tl.load(rows + 2 * C + i),
        tl.load(rows + 3 * C),
        tl.load(rows + 3 * C + 1),
    )


@launched
def make_frames(
    q, k, eta, log_alpha, frames,
    q_stride, q_first, tokens, length, first_token, first, first_block, frame_blocks,
    C: tl.constexpr, D: tl.constexpr, READ: tl.constexpr, DELTA2: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fill frames [G, frame_blocks, frame_size] from first_block on, a block for each program
    along the grid's second axis.

    k [G, F, D]; eta, log_alpha [G, F], F = `length`; `first`: where the first block begins in
    them; q as in `hope.scan.kernels.writes.write_forward`.
    """
    g = tl.program_id(0).to(tl.int64)
    local = first + tl.program_id(1) * C
    here = g * length + local
    block = g * frame_blocks + first_block + tl.program_id(1)
    frame = frames + block * (3 * C * C + 4 * C)
    rows = frame + 3 * C * C
    i = tl.arange(0, C)
    decay = tl.load(log_alpha + here + i)
    before = log_before(decay, C)
    tl.store(rows + i, tl.exp(before))
    tl.store(rows + C + i, decay_after(decay, C))
    tl.store(rows + 2 * C + i, lost(before))
    whole = tl.sum(decay, 0)
    tl.store(rows + 3 * C, tl.exp(whole))
    tl.store(rows + 3 * C + 1, lost(whole))
    ratio = decay_ratio(decay, C)
    store_rows(frame, ratio, C, C)
    key = load_rows(k + here * D, C, D)
    if DELTA2:
        step = tl.load(eta + here + i)
        strict = dot(key, tl.trans(key), DOT) * ratio * step[:, None]
        store_rows(frame + C * C, unit_lower_inverse(strict, C, DOT), C, C)
    if (READ == "causal") & (not TARGET):
        valid = (first_token + local + i) < tokens
        query = load_queries(q + g * q_stride + (q_first + local) * D, valid, k, C, D)
        store_rows(frame + 2 * C * C, dot(query, tl.trans(key), DOT) * ratio, C, C)
