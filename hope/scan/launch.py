"""Launching the scan's Triton kernels: layouts, segments, and what is kept for backward.

A segment is `segment_chunks` projection chunks. Forward runs the projection memories over a
segment, then M_mem with the keys, values, steps and decays that they gave, and keeps the states
between segments. Backward goes from the last segment to the first: it runs both again to have
the state before every block, then M_mem's derivative, then that of the projection memories.
Nothing is waited for and no shape depends on values, so a CUDA graph can capture all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope.scan.contract import MEM, ScanConfig, compute_dtype
from hope.scan.kernels.memory import memory_backward, memory_forward
from hope.scan.kernels.projections import projections_backward, projections_forward
from hope.scan.writes import W1_DELTA, W2_DELTA

BLOCK = 16
"""Tokens of a block of the recurrence, in all memories; memory chunks are multiples of it. The
kernels take 32 and 64 too, but hold so much then that they spill to memory (docs/gpu.md)."""


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


COMPILE_OPTIONS = {"num_warps": 8, "num_stages": 1}
"""Four warps spill more in all. Loads must not move over the stores of an earlier round of a loop,
so no loop is pipelined."""


class Launcher:
    """The tensors of one call in the kernels' layouts, and the launches over them.

    Memories are in the order k, v, eta, alpha (, q), mem; g = row * heads + head.
    """

    def __init__(
        self, config: ScanConfig, x: Tensor, q: Tensor, weights: list[Tensor], reset: Tensor | None
    ) -> None:
        self.config = config
        self.rows, self.heads, self.tokens, self.width = x.shape
        self.hidden = weights[0].shape[3]
        self.dtype = compute_dtype(x)
        self.x, self.q = x.contiguous(), q.contiguous()
        w1, w2, w_eta, b_eta, w_alpha, b_alpha = (w.to(self.dtype) for w in weights)
        self.base = _pack(w1, w2)
        self.readout = torch.stack([w_eta, w_alpha])
        self.bias = torch.stack([b_eta, b_alpha])
        self.memories = w1.shape[0]
        self.adaptive = self.memories > MEM + 1
        self.projections = self.memories - 1
        self.count = self.rows * self.heads
        chunk = config.projection_chunk
        self.block = BLOCK
        self.chunks = -(-self.tokens // chunk)
        self.reset = x.new_zeros(1, dtype=torch.uint8)
        if reset is not None:
            self.reset = reset[:, ::chunk].to(torch.uint8).contiguous()
        self.has_reset = reset is not None
        self.segments = -(-self.chunks // config.segment_chunks)
        self.flags = kernel_flags(config, x.dtype)

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory of the compute dtype."""
        return self.x.new_empty(shape, dtype=self.dtype)

    def mem_last(self, z: Tensor) -> Tensor:
        """Memories [memories, ...] from the contract's order to the kernels', or back: M_q and
        M_mem change places. (A list as an index would be copied to the device, and waited for.)"""
        return torch.cat([z[:MEM], z[MEM + 1 :], z[MEM : MEM + 1]]) if self.adaptive else z

    def state_shape(self) -> tuple[int, ...]:
        """Of the states of all memories: [memories, G, 2, D, H]."""
        return (self.memories, self.count, 2, self.width, self.hidden)

    def length(self, segment: int) -> int:
        """Tokens of a segment, the last one's padded to whole blocks."""
        whole = self.config.segment_chunks * self.config.projection_chunk
        rest = self.tokens - segment * whole
        return min(whole, -(-rest // self.block) * self.block)

    def start(self, state: tuple[Tensor, Tensor] | None) -> Tensor:
        """Delta before the first token."""
        shape = (self.memories, self.rows, self.heads, 2, self.width, self.hidden)
        base = self.mem_last(self.base).unsqueeze(1)
        initial = self.config.decay_to == "initial"
        if state is not None:
            packed = self.mem_last(_pack(*state))
            packed = packed - base if initial else packed
        elif initial:
            packed = base.new_zeros(1).expand(shape)
        else:
            packed = base.expand(shape).clone()  # kernels write into it
        return packed.reshape(self.state_shape()).contiguous()

    def pack_gradient(self, d_final1: Tensor | None, d_final2: Tensor | None) -> Tensor:
        """The gradient of the final state, zero where there is none, in memory of its own."""
        if d_final1 is None and d_final2 is None:
            return self.new(*self.state_shape()).zero_()
        memories, shape = self.memories, (self.rows, self.heads, self.width, self.hidden)
        if d_final1 is None:
            d_final1 = self.new(memories, *shape).zero_()
        if d_final2 is None:
            d_final2 = self.new(memories, *shape).zero_().mT
        return self.mem_last(_pack(d_final1, d_final2)).reshape(self.state_shape())

    def unpack(self, packed: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
        """[memories, G, 2, D, H], plus base where given, as w1 [M, B, N, d, h] and w2."""
        shape = (self.memories, self.rows, self.heads, 2, self.width, self.hidden)
        packed = self.mem_last(packed.view(shape))
        if base is not None:
            packed = packed + base.unsqueeze(1)
        return packed[:, :, :, 0].contiguous(), packed[:, :, :, 1].mT.contiguous()

    def buffers(self) -> dict[str, Tensor]:
        """k, v, eta, log_alpha and query of a segment."""
        length = self.length(0)
        wide, narrow = (self.count, length, self.width), (self.count, length)
        shapes = {"k": wide, "v": wide, "eta": narrow, "log_alpha": narrow}
        if self.adaptive:
            shapes["query"] = wide
        return {name: self.new(*shape) for name, shape in shapes.items()}

    def launch(self, kernel: Any, segment: int, **arguments: Any) -> None:
        """Run a kernel over a segment."""
        first_chunk = segment * self.config.segment_chunks
        kernel[(self.count,)](
            reset=self.reset,
            tokens=self.tokens,
            first_token=first_chunk * self.config.projection_chunk,
            blocks=self.length(segment) // self.block,
            heads=self.heads,
            chunks=self.chunks,
            first_chunk=first_chunk,
            D=self.width,
            H=self.hidden,
            C=self.block,
            PERIOD=self.config.projection_chunk // self.block,
            HAS_RESET=self.has_reset,
            **self.flags,
            **arguments,
            **COMPILE_OPTIONS,
        )

    def queries(self, segment: int, buffers: dict[str, Tensor]) -> dict[str, Any]:
        """Where M_mem's queries of a segment lie: in the call's q, or in the segment's buffer."""
        if self.adaptive:
            length = self.length(segment) * self.width
            return {"q": buffers["query"], "q_stride": length, "q_first": 0}
        first = segment * self.config.segment_chunks * self.config.projection_chunk
        return {"q": self.q, "q_stride": self.tokens * self.width, "q_first": first}

    def project(self, segment: int, buffers: dict[str, Tensor], scratch: Tensor) -> None:
        """The projection memories over a segment, from slot 0 of scratch."""
        self.launch(
            projections_forward,
            segment,
            base=self.base,
            x=self.x,
            source=self.q,
            query=buffers.get("query", buffers["k"]),
            **{name: buffers[name] for name in ("k", "v", "eta", "log_alpha")},
            readout=self.readout,
            bias=self.bias,
            scratch=scratch,
            slots=scratch.shape[2],
            eta_max=float(self.config.eta_max),
            ADAPTIVE=self.adaptive,
        )

    def memorise(
        self,
        segment: int,
        buffers: dict[str, Tensor],
        state: Tensor,
        out: Tensor | None,
        scratch: Tensor | None,
    ) -> None:
        """M_mem over a segment from `state`, which moves on; writes `out` and `scratch` if
        given."""
        self.launch(
            memory_forward,
            segment,
            OPEN=self.config.memory_chunk // self.block,
            **self.queries(segment, buffers),
            **{name: buffers[name] for name in ("k", "v", "eta", "log_alpha")},
            base=self.base[MEM],
            out=state if out is None else out,
            state=state,
            scratch=state if scratch is None else scratch,
            slots=0 if scratch is None else scratch.shape[1],
            READ=out is not None,
            SAVE=scratch is not None,
            CAUSAL=self.config.read == "causal",
        )

    def slots(self, blocks: int) -> Tensor:
        """Scratch for the projection memories' states: [memories, G, blocks + 1, 2, D, H]."""
        return self.new(self.projections, self.count, blocks + 1, 2, self.width, self.hidden)

    def forward(self, state: tuple[Tensor, Tensor] | None, out: Tensor, saved: Tensor) -> Tensor:
        """Fill `out` and `saved`, Delta before every segment but the first (as far as it goes);
        returns Delta after the last."""
        now = self.start(state)
        scratch = self.slots(self.config.projection_chunk // self.block)
        buffers = self.buffers()
        mem = now[self.projections]
        scratch[:, :, 0] = now[: self.projections]
        for segment in range(self.segments):
            if 0 < segment <= saved.shape[0]:
                saved[segment - 1, : self.projections] = scratch[:, :, 0]
                saved[segment - 1, self.projections] = mem
            self.project(segment, buffers, scratch)
            self.memorise(segment, buffers, mem, out, None)
            last = self.length(segment) // self.block % scratch.shape[2]
            if last:
                scratch[:, :, 0] = scratch[:, :, last]
        now[: self.projections] = scratch[:, :, 0]
        return now

    def backward(
        self,
        state: tuple[Tensor, Tensor] | None,
        d_out: Tensor,
        d_state: Tensor,
        saved: Tensor,
        dx: Tensor,
        dq: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fill dx and dq; d_state becomes the gradient of W before the first token. Returns those
        of M_0 at fixed states [memories, G, 2, D, H], of readout [2, G, D] and of bias [2, G]."""
        config = self.config
        whole = self.length(0)
        scratch = self.slots(whole // self.block)
        mem_scratch = self.new(self.count, whole // self.block, 2, self.width, self.hidden)
        buffers = self.buffers()
        grads = {f"d_{name}": torch.empty_like(z) for name, z in buffers.items()}
        d_key, d_value = grads["d_k"], grads["d_v"]
        d_base, d_frozen = torch.zeros_like(d_state), torch.zeros_like(d_state[:-1])
        d_readout = self.new(2, self.count, self.width).zero_()
        d_bias = self.new(2, self.count).zero_()
        both = {
            **{name: buffers[name] for name in ("k", "v", "eta", "log_alpha")},
            "dk": d_key,
            "dv": d_value,
            "d_log_eta": grads["d_eta"],
            "d_log_alpha": grads["d_log_alpha"],
        }
        for segment in reversed(range(self.segments)):
            before = saved[segment - 1] if segment else self.start(state)
            scratch[:, :, 0] = before[: self.projections]
            self.project(segment, buffers, scratch)
            mem = before[self.projections].clone()
            self.memorise(segment, buffers, mem, None, mem_scratch)
            self.launch(
                memory_backward,
                segment,
                OPEN=config.memory_chunk // self.block,
                **self.queries(segment, buffers),
                **both,
                d_out=d_out,
                dq=grads["d_query"] if self.adaptive else dq,
                base=self.base[MEM],
                d_base=d_base[self.projections],
                d_state=d_state[self.projections],
                scratch=mem_scratch,
                slots=mem_scratch.shape[1],
                CAUSAL=config.read == "causal",
            )
            self.launch(
                projections_backward,
                segment,
                **both,
                base=self.base,
                x=self.x,
                dx=dx,
                source=self.q,
                d_source=dq,
                d_query=grads["d_query"] if self.adaptive else d_key,
                d_base=d_base,
                d_state=d_state,
                d_frozen=d_frozen,
                readout=self.readout,
                d_readout=d_readout,
                bias=self.bias,
                d_bias=d_bias,
                scratch=scratch,
                slots=scratch.shape[2],
                eta_max=float(config.eta_max),
                ADAPTIVE=self.adaptive,
            )
        return d_base, d_readout, d_bias


def _pack(w1: Tensor, w2: Tensor) -> Tensor:
    """[..., d, h] and [..., h, d] as [..., 2, d, h]."""
    return torch.stack([w1, w2.mT], -3).contiguous()
