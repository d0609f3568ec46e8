"""A projection chunk of the closed form, tile by tile: forward and backward.

A tile is a run of tokens whose intermediate values stay in the caches: at most a projection chunk,
and a whole number of memory chunks or a part of one. All memories are written together; M_mem's
frozen state is renewed wherever a memory chunk begins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope.scan.closed_form import Frame, block_length, make_frame, split_frame
from hope.scan.contract import MEM, Q, ScanConfig
from hope.scan.products import Scratch, with_base
from hope.scan.projections import (
    Projected,
    Queried,
    project,
    project_backward,
    project_query,
    project_query_backward,
)
from hope.scan.reads import (
    Blocks,
    CausalRead,
    StartRead,
    read_causal,
    read_causal_backward,
    read_start,
    read_start_backward,
    stack_blocks,
)
from hope.scan.writes import Memories, Written, write
from hope.scan.writes_backward import ReadGradient, Sums, write_backward

TILE = 64
"""Tokens of a tile, at most (more only where memory chunks have no divisor near it)."""
_MEM, _Q = slice(MEM, MEM + 1), slice(Q, Q + 1)


class Params(NamedTuple):
    """The weights of some heads: M_0, and readout [2, N, d] and bias [2, N] of eta and alpha."""

    start: Memories
    readout: Tensor
    bias: Tensor

    def base(self, config: ScanConfig) -> Memories | None:
        """What states are kept relative to: M_0, or nothing with decay towards zero."""
        return self.start if config.decay_to == "initial" else None


class Shape(NamedTuple):
    """How a projection chunk is cut: tokens of a tile, of a part (what shares M_mem's frozen
    state within a tile), of a block of the recurrence and of a memory chunk."""

    tile: int
    part: int
    block: int
    mem: int


def chunk_shape(config: ScanConfig, tokens: int, width: int) -> Shape:
    """The cut for a chunk of that many tokens (padded) of memories `width` wide."""
    mem = min(config.memory_chunk, tokens)
    block = block_length(mem, width)
    parts = [n for n in range(block, min(mem, TILE) + 1, block) if mem % n == 0]
    part = parts[-1] if parts else block
    tile = part
    if part == mem:
        tile = [n for n in range(mem, max(mem, TILE) + 1, mem) if tokens % n == 0][-1]
    return Shape(tile, part, block, mem)


class Part(NamedTuple):
    """Written tokens that share a frozen state; origin: M_mem's Delta at its chunk's start,
    [1, G, ...]; read is theirs when reads are at chunk starts."""

    written: Written
    origin: Memories
    opens: bool
    frame: Frame
    read: StartRead | None


class Tile(NamedTuple):
    """A tile after its forward pass; blocks and read are there when reads are causal."""

    projected: Projected
    queried: Queried | None
    frame: Frame
    parts: list[Part]
    blocks: Blocks | None
    read: CausalRead | None


class Chunk(NamedTuple):
    """A projection chunk after its forward pass, its Deltas before and after."""

    tiles: list[Tile]
    start: Memories
    end: Memories


def freeze(delta: Memories, base: Memories | None, frozen: Memories) -> None:
    """W = base + Delta, written into `frozen`."""
    with_base(delta.w1, None if base is None else base.w1, frozen.w1)
    with_base(delta.w2, None if base is None else base.w2, frozen.w2)


def frozen_buffer(delta: Memories, scratch: Scratch) -> Memories:
    """Where a call keeps the frozen state it is working with."""
    w1, w2 = delta
    return Memories(scratch("frozen w1", *w1.shape), scratch("frozen w2", *w2.shape))


def _mem_base(base: Memories | None) -> Memories | None:
    return None if base is None else base.some(_MEM)


def run_chunk(
    config: ScanConfig,
    params: Params,
    start: Memories,
    x: Tensor,
    q: Tensor,
    valid: int,
    scratch: Scratch,
    slot: int | None,
) -> tuple[Tensor, Chunk]:
    """Read and write one projection chunk.

    x, q: [G, F, d], padded behind `valid` tokens to a multiple of the memory chunk (or shorter
    than one); start: Delta before the chunk; slot: the chunk's place among those whose records
    are kept for `chunk_backward`, None where none will follow (its end is then good until the
    next but one call). Returns out [G, F, d] and the chunk's record.
    """
    base = params.base(config)
    tokens, width = x.shape[1], min(start.w1.shape[2:])
    shape = chunk_shape(config, tokens, width)
    frozen = frozen_buffer(start, scratch)
    freeze(start, base, frozen)
    delta, origin = start, start.some(_MEM)
    tiles, outs = [], []
    for first in range(0, tokens, shape.tile):
        here = slice(first, first + shape.tile)
        number = first // shape.tile
        # Without records the two latest tiles alternate: one holds the state of the other's start.
        place = (slot, number) if slot is not None else ("passing", scratch.turn())
        x_i, q_i = x[:, here].contiguous(), q[:, here].contiguous()
        # A tile of a long memory chunk may be padding altogether.
        left = max(0, valid - first)
        projected = project(
            x_i, frozen, params.readout, params.bias, config.eta_max, left, scratch, place
        )
        queried = None
        if frozen.w1.shape[0] > Q:
            queried = project_query(q_i, frozen.some(_Q), scratch, place)
            q_i = queried.q
        k, v = projected.kv
        frame = make_frame(k, projected.eta, projected.log_alpha, shape.block)
        parts = []
        for i, part_frame in enumerate(split_frame(frame, shape.tile // shape.part)):
            inside = slice(i * shape.part, (i + 1) * shape.part)
            opens = (first + inside.start) % shape.mem == 0
            if opens and first + i > 0:
                origin = delta.some(_MEM)
                freeze(origin, _mem_base(base), frozen.some(_MEM))
            kv = torch.cat([k[:, inside], v[:, inside]], 1)
            mark = (place, i)
            written = write(config.delta_rule, part_frame, kv, frozen, delta, base, scratch, mark)
            delta = written.deltas[-1]
            read = None
            if config.read == "chunk_start":
                out, read = read_start(frozen.one(MEM), q_i[:, inside], scratch)
                outs.append(out)
            parts.append(Part(written, origin, opens, part_frame, read))
        blocks = causal = None
        if config.read == "causal":
            blocks = stack_blocks([part.written for part in parts], shape.block)
            mem_base = None if base is None else base.one(MEM)
            out, causal = read_causal(frame, blocks, q_i, mem_base, scratch)
            outs.append(out)
        tiles.append(Tile(projected, queried, frame, parts, blocks, causal))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    return out, Chunk(tiles, start, delta)


def chunk_backward(
    config: ScanConfig,
    params: Params,
    chunk: Chunk,
    d_out: Tensor,
    d_state: Memories,
    sums: Sums,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Derivative of `run_chunk`: (dx, dq).

    d_out: [G, F, d], zero on padding; d_state: gradient of the state after the chunk, which
    becomes that of the state before it; sums: the weights' gradients, added to in place.
    """
    frozen = frozen_buffer(chunk.start, scratch)
    freeze(chunk.start, params.base(config), frozen)
    sums.frozen.zero_()
    pairs = []
    length = chunk.tiles[0].frame.eta.shape[0] * chunk.tiles[0].frame.eta.shape[2]
    for tile, d in zip(reversed(chunk.tiles), reversed(d_out.split(length, 1)), strict=True):
        pairs.append(_tile_backward(config, params, tile, frozen, d, d_state, sums, scratch))
    d_state.add_(sums.frozen)
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([dx for dx, _ in pairs[::-1]], 1), torch.cat([dq for _, dq in pairs[::-1]], 1)


def _tile_backward(
    config: ScanConfig,
    params: Params,
    tile: Tile,
    frozen: Memories,
    d_out: Tensor,
    d_state: Memories,
    sums: Sums,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    base = params.base(config)
    count, _, block, _ = tile.frame.k.shape
    parts = len(tile.parts)
    tokens = count * block // parts
    d_kv = scratch("d kv tile", *tile.projected.kv.shape)
    into: list[ReadGradient] = []
    if tile.read is not None:
        assert tile.blocks is not None
        mem_base = None if base is None else base.one(MEM)
        d_base = sums.weights.one(MEM)
        d_q, d_kv[0], whole = read_causal_backward(
            tile.frame, tile.blocks, tile.read, mem_base, d_base, d_out
        )
        d_kv[1].zero_()
        into = [
            ReadGradient(*z) for z in zip(*(z.split(count // parts) for z in whole), strict=True)
        ]
    else:
        d_kv.zero_()
        d_q = torch.empty_like(d_out)

    d_mem = sums.frozen.some(_MEM)
    log_eta, log_alpha = [], []
    for i in reversed(range(parts)):
        part = tile.parts[i]
        inside = slice(i * tokens, (i + 1) * tokens)
        freeze(part.origin, _mem_base(base), frozen.some(_MEM))
        read = (MEM, into[i]) if into else None
        grad = write_backward(
            config.delta_rule, part.frame, part.written, frozen, base, d_state, sums, read, scratch
        )
        if part.read is not None:
            d_q[:, inside] = read_start_backward(
                frozen.one(MEM), part.read, d_out[:, inside], sums.frozen.one(MEM)
            )
        d_kv[0][:, inside] += grad.kv[:, :tokens]
        d_kv[1][:, inside] += grad.kv[:, tokens:]
        log_eta.append(grad.log_eta)
        log_alpha.append(grad.log_alpha)
        if part.opens:
            d_state.some(_MEM).add_(d_mem)
            d_mem.zero_()
    if tile.queried is not None:
        d_q = project_query_backward(
            tile.queried, frozen.some(_Q), d_q, sums.frozen.some(_Q), scratch
        )
    d_x = project_backward(
        tile.projected,
        frozen,
        params.readout,
        d_kv,
        _tokens(log_eta),
        _tokens(log_alpha),
        sums,
        scratch,
    )
    return d_x, d_q


def _tokens(parts: list[Tensor]) -> Tensor:
    """Of each part from the last to the first [n, G, c] -> [G, tokens]."""
    return torch.cat(parts[::-1]).transpose(0, 1).flatten(1)
