"""The tensors of one call of the scan's Triton kernels, in the layouts that these take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope.scan.contract import MEM, ScanConfig, compute_dtype
from hope.scan.kernels.frames import frame_size
from hope.scan.kernels.writes import work_matrices, work_size
from hope.scan.writes import W1_DELTA, W2_DELTA

BLOCK, FLOAT32_BLOCK = 32, 16
"""Most tokens of a block of the recurrence, inside a chunk that shares a frozen state. In float32 a
product is three. (Triton 3.6 compiles products of 64 rows and four warps or more into reads past
the end of shared memory.)"""


def kernel_flags(config: ScanConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments that all kernels share, for activations of that dtype."""
    precision = {torch.bfloat16: "bf16", torch.float64: "ieee"}.get(dtype, "tf32x3")
    return {
        "INITIAL": config.decay_to == "initial",
        "DELTA1": config.delta_rule in W1_DELTA,
        "DELTA2": config.delta_rule in W2_DELTA,
        "TARGET": config.delta_rule == "target",
        "DOT": precision,
    }


def block_lengths(config: ScanConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of a block of the memories that project, and of M_mem: powers of two, at least 16
    where memory_chunk is a multiple of 16."""
    chunk, mem = config.projection_chunk, config.memory_chunk
    most = FLOAT32_BLOCK if dtype == torch.float32 else BLOCK
    return min(most, chunk & -chunk), min(most, mem & -mem)


class Layouts:
    """The tensors of one call in the kernels' layouts.

    Memories are in the order k, v, eta, alpha (, q), mem; g = row * heads + head. Where a memory's
    hidden features are split into `shards`, each counts as a memory of `hidden` of them, one behind
    another.
    """

    def __init__(
        self, config: ScanConfig, x: Tensor, q: Tensor, weights: list[Tensor], reset: Tensor | None
    ) -> None:
        self.config = config
        self.rows, self.heads, self.tokens, self.width = x.shape
        self.shards = self.shards_of(weights[0].shape[3])
        self.hidden = weights[0].shape[3] // self.shards
        self.dtype = compute_dtype(x)
        self.x, self.q = x.contiguous(), q.contiguous()
        w1, w2, w_eta, b_eta, w_alpha, b_alpha = (w.to(self.dtype) for w in weights)
        self.adaptive = w1.shape[0] > MEM + 1
        self.memories = w1.shape[0] * self.shards
        self.projections = self.memories - self.shards
        self.fresh = self.packed(w1, w2)
        self.readout = torch.stack([w_eta, w_alpha])
        self.bias = torch.stack([b_eta, b_alpha])
        self.count = self.rows * self.heads
        chunk = config.projection_chunk
        self.block, self.mem_block = block_lengths(config, x.dtype)
        self.period, self.open = chunk // self.block, config.memory_chunk // self.mem_block
        self.chunks = -(-self.tokens // chunk)
        self.reset = x.new_zeros(1, dtype=torch.uint8)
        if reset is not None:
            self.reset = reset[:, ::chunk].to(torch.uint8).contiguous()
        self.has_reset = reset is not None
        self.segments = -(-self.chunks // config.segment_chunks)
        self.flags = kernel_flags(config, x.dtype)
        self.base = self.fresh.to(torch.bfloat16 if self.flags["DOT"] == "bf16" else self.dtype)

    def shards_of(self, hidden: int) -> int:
        """Into how many a memory of that hidden width is split."""
        return 1

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory of the compute dtype."""
        return self.x.new_empty(shape, dtype=self.dtype)

    def frame_size(self, block: int) -> int:
        """Numbers of what all memories share of a block of that many tokens."""
        return frame_size(block)

    def work_size(self, block: int, read: str, keep: bool) -> int:
        """Numbers of what passes over a block hand on in one memory, and backward needs."""
        wide = work_matrices(read == "causal", keep)
        return work_size(wide, block, self.width, self.hidden, keep)

    def mem_last(self, z: Tensor) -> Tensor:
        """Memories [memories, ...] from the contract's order to the kernels', or back: M_q and
        M_mem change places. (A list as an index would be copied to the device, and waited for.)"""
        return torch.cat([z[:MEM], z[MEM + 1 :], z[MEM : MEM + 1]]) if self.adaptive else z

    def states(self, memories: int, *slots: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for states [memories, G, slots, 2, D, H], of the compute dtype by default."""
        shape = (memories, self.count, *slots, 2, self.width, self.hidden)
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def length(self, segment: int) -> int:
        """Tokens of a segment, the last one's padded to whole blocks."""
        whole = self.config.segment_chunks * self.config.projection_chunk
        rest = self.tokens - self.first_token(segment)
        return min(whole, -(-rest // self.block) * self.block)

    def first_token(self, segment: int) -> int:
        """Where a segment begins in the sequence."""
        return segment * self.config.segment_chunks * self.config.projection_chunk

    def start(self, state: tuple[Tensor, Tensor] | None) -> Tensor:
        """Delta before the first token: [memories, G, 2, D, H], in memory of its own."""
        shape = (self.memories, self.rows, self.heads, 2, self.width, self.hidden)
        base = self.fresh.unsqueeze(1)
        initial = self.config.decay_to == "initial"
        fresh = base.new_zeros(1) if initial else base
        packed = fresh.expand(shape)
        if state is not None:
            packed = self.packed(*state)
            packed = packed - base if initial else packed
            if self.has_reset:
                packed = torch.where(self.first_reset(), fresh, packed)
        return packed.reshape(self.memories, self.count, *shape[3:]).clone()

    def add_base(self, delta: Tensor) -> Tensor:
        """W from Delta [memories, G, 2, D, H]."""
        if self.config.decay_to != "initial":
            return delta
        parts = delta.view(self.memories, self.rows, self.heads, *delta.shape[2:])
        return (parts + self.fresh.unsqueeze(1)).view(delta.shape)

    def first_reset(self) -> Tensor:
        """Which rows start again at the first token: bool [1, rows, 1, 1, 1, 1]."""
        return (self.reset[:, 0] != 0).view(1, -1, 1, 1, 1, 1)

    def first_gradient(self, d_state: Tensor, d_base: Tensor) -> None:
        """What rows that start again at the first token send to M_0 and not to the state before."""
        if self.has_reset:
            shape = (self.memories, self.rows, self.heads, 2, self.width, self.hidden)
            again, given = self.first_reset(), d_state.view(shape)
            d_base.view(shape).add_(torch.where(again, given, 0.0))
            given.masked_fill_(again, 0.0)

    def pack_gradient(self, d_final1: Tensor | None, d_final2: Tensor | None) -> Tensor:
        """The gradient of the final state, zero where there is none, in memory of its own."""
        if d_final1 is None and d_final2 is None:
            return self.states(self.memories).zero_()
        hidden, memories = self.hidden * self.shards, self.memories // self.shards
        shape = (self.rows, self.heads, self.width, hidden)
        if d_final1 is None:
            d_final1 = self.new(memories, *shape).zero_()
        if d_final2 is None:
            d_final2 = self.new(memories, *shape).zero_().mT
        packed = self.packed(d_final1, d_final2)
        return packed.reshape(self.memories, self.count, 2, self.width, self.hidden)

    def packed(self, w1: Tensor, w2: Tensor) -> Tensor:
        """w1 [M, ..., d, h] and w2 [M, ..., h, d], in the contract's order, as [memories, ..., 2,
        D, H]."""
        z = self.mem_last(torch.stack([w1, w2.mT], -3))
        if self.shards > 1:
            z = z.unflatten(-1, (self.shards, self.hidden)).movedim(-2, 1).flatten(0, 1)
        return z.contiguous()

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """[memories, G, 2, D, H] as w1 [M, B, N, d, h] and w2."""
        shape = (self.memories, self.rows, self.heads, 2, self.width, self.hidden)
        packed = packed.view(shape)
        if self.shards > 1:
            packed = packed.unflatten(0, (-1, self.shards)).movedim(1, -2).flatten(-2)
        packed = self.mem_last(packed)
        return packed[:, :, :, 0].contiguous(), packed[:, :, :, 1].mT.contiguous()
