"""The bookkeeping of one call: its heads in slices, its sequence in chunks, its states by group."""

from __future__ import annotations

import torch
from torch import Tensor

from hope.scan.contract import ScanConfig, ScanWeights, compute_dtype
from hope.scan.products import Scratch
from hope.scan.tiles import Chunk, Params, run_chunk
from hope.scan.writes import Memories

_CPU_SLICE = 1 << 20
"""Heads are taken together on a CPU while a chunk's hidden values stay below this (caches)."""


class Run:
    """The tensors of one call, by slices of heads and by chunks."""

    def __init__(
        self, config: ScanConfig, x: Tensor, q: Tensor, weights: list[Tensor], reset: Tensor | None
    ) -> None:
        self.config, self.x, self.q, self.reset = config, x, q, reset
        self.dtype = compute_dtype(x)
        self.weights = ScanWeights(*(w.to(self.dtype) for w in weights))
        self.rows, self.num_heads, self.tokens, _ = x.shape
        self.num_chunks = -(-self.tokens // config.projection_chunk)

    def head_slices(self, device: str | None = None) -> list[slice]:
        """Heads that are worked on together: all of them on a GPU, few on a CPU (device: of that
        type, by default where the tensors are)."""
        per_head = self.rows * min(self.tokens, self.config.projection_chunk)
        per_head *= self.weights.w1.shape[0] * self.weights.w1.shape[3]
        slices = 1
        if (device or self.x.device.type) == "cpu":
            slices = -(-self.num_heads // max(1, _CPU_SLICE // per_head))
        step = -(-self.num_heads // slices)
        return [slice(n, min(n + step, self.num_heads)) for n in range(0, self.num_heads, step)]

    def params(self, heads: slice) -> Params:
        w = self.weights
        readout = torch.stack([w.w_eta[heads], w.w_alpha[heads]])
        bias = torch.stack([w.b_eta[heads], w.b_alpha[heads]])
        start = Memories(w.w1[:, heads].contiguous(), w.w2[:, heads].contiguous())
        return Params(start, readout, bias)

    def fresh(self, params: Params) -> Memories:
        """The state of a row that starts from the weights, as Delta."""
        deltas = []
        for w in params.start:
            shape = (w.shape[0], w.shape[1], self.rows, *w.shape[2:])
            start = w.unsqueeze(2).expand(shape)
            if self.config.decay_to == "initial":
                start = torch.zeros_like(start)
            deltas.append(start.flatten(1, 2).contiguous())
        return Memories(*deltas)

    def load(self, delta1: Tensor, delta2: Tensor, heads: slice) -> Memories:
        """Deltas [M, N, B, ...] of some heads."""
        return Memories(*(z[:, heads].flatten(1, 2).contiguous() for z in (delta1, delta2)))

    def start(self, params: Params, state: tuple[Tensor, Tensor] | None, heads: slice) -> Memories:
        """The state before the first token, as Delta."""
        if state is None:
            return self.fresh(params)
        fast = self.load(state[0].transpose(1, 2), state[1].transpose(1, 2), heads)
        if self.config.decay_to == "zero":
            return fast
        return Memories(
            *(
                (z.unflatten(1, (-1, self.rows)) - w.unsqueeze(2)).flatten(1, 2)
                for z, w in zip(fast, params.start, strict=True)
            )
        )

    def again(self, chunk: int, heads: slice) -> Tensor | None:
        """Which of the G rows start again at a chunk: bool [1, G, 1, 1], or None for no resets."""
        if self.reset is None:
            return None
        rows = self.reset[:, chunk * self.config.projection_chunk]
        count = len(range(*heads.indices(self.num_heads)))
        return rows.repeat(count).view(1, -1, 1, 1)

    def valid(self, chunk: int) -> int:
        """Tokens of a chunk that are not padding."""
        start = chunk * self.config.projection_chunk
        return min(self.config.projection_chunk, self.tokens - start)

    def take(self, z: Tensor, chunk: int, heads: slice) -> Tensor:
        """A chunk of [B, N, T, d] as [G, F, d] in the compute dtype, padded with zeros."""
        start, valid = chunk * self.config.projection_chunk, self.valid(chunk)
        z = z[:, heads, start : start + valid].transpose(0, 1).to(self.dtype)
        mem = self.config.memory_chunk
        padding = -valid % mem if valid > mem else 0
        if padding:
            z = torch.nn.functional.pad(z, (0, 0, 0, padding))
        return z.flatten(0, 1).contiguous()

    def take_gradient(self, d_out: Tensor | None, chunk: int, heads: slice) -> Tensor:
        """A chunk of the output's gradient as [G, F, d], zero where there is none."""
        if d_out is None:
            return torch.zeros_like(self.take(self.x, chunk, heads))
        return self.take(d_out, chunk, heads)

    def gradient(
        self, d_final: tuple[Tensor | None, Tensor | None], params: Params, heads: slice
    ) -> Memories:
        """The gradient of the final state, in memory of its own."""
        zeros = Memories(*(torch.zeros_like(z) for z in self.fresh(params)))
        for target, z in zip(zeros, d_final, strict=True):
            if z is not None:
                target.copy_(z.transpose(1, 2)[:, heads].flatten(1, 2))
        return zeros

    def put(self, target: Tensor, z: Tensor, chunk: int, heads: slice) -> None:
        """The inverse of `take`: write a chunk [G, F, d] into target [B, N, T, d]."""
        start, valid = chunk * self.config.projection_chunk, self.valid(chunk)
        z = z.unflatten(0, (-1, self.rows))[:, :, :valid]
        target[:, heads, start : start + valid] = z.transpose(0, 1)

    def store(self, target: Tensor, z: Tensor, heads: slice) -> None:
        """Write [m, G, ...] of some heads into target [m, N, B, ...]."""
        target[:, heads] = z.unflatten(1, (-1, self.rows))

    def forward_chunk(
        self,
        params: Params,
        fast: Memories,
        chunk: int,
        heads: slice,
        scratch: Scratch,
        slot: int | None,
    ) -> tuple[Tensor, Chunk]:
        """Run a chunk of some heads from Delta before it: out [G, F, d] and its record; see
        `run_chunk`."""
        x, q = self.take(self.x, chunk, heads), self.take(self.q, chunk, heads)
        return run_chunk(self.config, params, fast, x, q, self.valid(chunk), scratch, slot)
