"""Launching the scan's Triton kernels: layouts, chunks, segments, and what is kept for backward.

The projection memories need each other at every projection chunk: one launch reads k, v, eta and
alpha out of them, one writes them, a program per (row, head, memory) with the states in global
memory. M_mem needs what they give but gives them nothing: it runs over a whole segment of
`segment_chunks` projection chunks in one launch. Forward keeps the states between segments.
Backward goes from the last segment to the first: it runs both again to have the state before every
block, then M_mem's derivative, then that of the projection memories, chunk by chunk.
Nothing is waited for and no shape depends on values, so a CUDA graph can capture all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope.scan.contract import MEM, ScanConfig, compute_dtype
from hope.scan.kernels.projections import project_backward, project_forward
from hope.scan.kernels.writes import write_forward
from hope.scan.kernels.writes_backward import write_backward
from hope.scan.writes import W1_DELTA, W2_DELTA

BLOCK, MEM_BLOCK, FLOAT32_BLOCK = 64, 32, 16
"""Most tokens of a block of the recurrence, inside a chunk that shares a frozen state: in the
memories that project, in M_mem, whose read needs registers too, and in float32, where a product
is three."""
TILE = 32
"""Hidden features that a program holds at a time."""
FORWARD_ROOM, BACKWARD_ROOM = (2, 2, 0), (7, 4, 2)
"""Matrices [C, H], [C, D] and [C, C] that the passes over a block hand on through memory."""
COMPILE_OPTIONS = {"num_warps": 8, "num_stages": 1}
"""Loads must not move over the stores of an earlier round of a loop, so no loop is pipelined."""


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
    return min(most, chunk & -chunk), min(most, MEM_BLOCK, mem & -mem)


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
        self.memories = w1.shape[0]
        self.adaptive = self.memories > MEM + 1
        self.projections = self.memories - 1
        self.base = self.mem_last(_pack(w1, w2))
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

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory of the compute dtype."""
        return self.x.new_empty(shape, dtype=self.dtype)

    def mem_last(self, z: Tensor) -> Tensor:
        """Memories [memories, ...] from the contract's order to the kernels', or back: M_q and
        M_mem change places. (A list as an index would be copied to the device, and waited for.)"""
        return torch.cat([z[:MEM], z[MEM + 1 :], z[MEM : MEM + 1]]) if self.adaptive else z

    def states(self, memories: int, *slots: int) -> Tensor:
        """Memory for states [memories, G, slots, 2, D, H]."""
        return self.new(memories, self.count, *slots, 2, self.width, self.hidden)

    def scratch(self, memories: int, room: tuple[int, int, int], block: int) -> Tensor:
        """What the programs of that many memories need: [memories * G, elements]."""
        widths = (self.hidden, self.width, block)
        elements = block * sum(n * width for n, width in zip(room, widths, strict=True))
        return self.new(memories * self.count, elements)

    def length(self, segment: int) -> int:
        """Tokens of a segment, the last one's padded to whole blocks."""
        whole = self.config.segment_chunks * self.config.projection_chunk
        rest = self.tokens - segment * whole
        return min(whole, -(-rest // self.block) * self.block)

    def start(self, state: tuple[Tensor, Tensor] | None) -> Tensor:
        """Delta before the first token: [memories, G, 2, D, H], in memory of its own."""
        shape = (self.memories, self.rows, self.heads, 2, self.width, self.hidden)
        base = self.base.unsqueeze(1)
        initial = self.config.decay_to == "initial"
        fresh = base.new_zeros(1) if initial else base
        packed = fresh.expand(shape)
        if state is not None:
            packed = self.mem_last(_pack(*state))
            packed = packed - base if initial else packed
            if self.has_reset:
                packed = torch.where(self.first_reset(), fresh, packed)
        return packed.reshape(self.memories, self.count, *shape[3:]).clone()

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
        memories, shape = self.memories, (self.rows, self.heads, self.width, self.hidden)
        if d_final1 is None:
            d_final1 = self.new(memories, *shape).zero_()
        if d_final2 is None:
            d_final2 = self.new(memories, *shape).zero_().mT
        packed = self.mem_last(_pack(d_final1, d_final2))
        return packed.reshape(memories, self.count, 2, self.width, self.hidden)

    def unpack(self, packed: Tensor, with_base: bool = False) -> tuple[Tensor, Tensor]:
        """[memories, G, 2, D, H], plus M_0 if asked for, as w1 [M, B, N, d, h] and w2."""
        shape = (self.memories, self.rows, self.heads, 2, self.width, self.hidden)
        packed = packed.view(shape)
        packed = self.mem_last(packed + self.base.unsqueeze(1) if with_base else packed)
        return packed[:, :, :, 0].contiguous(), packed[:, :, :, 1].mT.contiguous()

    def buffers(self) -> dict[str, Tensor]:
        """k, v, eta, log_alpha and query of a segment."""
        length = self.length(0)
        wide, narrow = (self.count, length, self.width), (self.count, length)
        shapes = {"k": wide, "v": wide, "eta": narrow, "log_alpha": narrow}
        if self.adaptive:
            shapes["query"] = wide
        return {name: self.new(*shape) for name, shape in shapes.items()}

    def launch(self, kernel: Any, grid: tuple[int, ...], segment: int, **arguments: Any) -> None:
        """Run a kernel on buffers of a segment."""
        whole = self.config.segment_chunks * self.config.projection_chunk
        kernel[(self.count, *grid)](
            tokens=self.tokens,
            length=self.length(0),
            first_token=segment * whole,
            heads=self.heads,
            D=self.width,
            H=self.hidden,
            TILE=min(TILE, self.hidden),
            **arguments,
            **COMPILE_OPTIONS,
        )

    def write(self, kernel: Any, segment: int, memories: slice, **arguments: Any) -> None:
        """Launch a kernel that writes some memories, or its derivative."""
        count = len(range(*memories.indices(self.memories)))
        self.launch(
            kernel,
            (count,),
            segment,
            base=self.base[memories],
            room=arguments["scratch"].shape[1],
            reset=self.reset,
            chunks=self.chunks,
            CHUNK=self.config.projection_chunk,
            HAS_RESET=self.has_reset,
            **self.flags,
            **arguments,
        )

    def chunks_of(self, segment: int) -> list[tuple[int, int]]:
        """The projection chunks of a segment: first token in the buffers, number of blocks."""
        length, chunk = self.length(segment), self.config.projection_chunk
        return [
            (first, min(chunk, length - first) // self.block) for first in range(0, length, chunk)
        ]

    def project(self, segment: int, buffers: dict[str, Tensor], state: Tensor) -> None:
        """The projection memories over a segment: fills the buffers and moves `state`
        [projections, G, slots, 2, D, H] on."""
        given = {name: buffers[name] for name in ("k", "v", "eta", "log_alpha")}
        scratch = self.scratch(self.projections, FORWARD_ROOM, self.block)
        for first, blocks in self.chunks_of(segment):
            place = {"first": first, "first_block": first // self.block, "slots": state.shape[2]}
            self.launch(
                project_forward,
                (self.projections, blocks),
                segment,
                x=self.x,
                source=self.q,
                query=buffers.get("query", buffers["k"]),
                **given,
                base=self.base,
                readout=self.readout,
                bias=self.bias,
                state=state,
                **place,
                eta_max=float(self.config.eta_max),
                C=self.block,
                INITIAL=self.flags["INITIAL"],
                DOT=self.flags["DOT"],
            )
            self.write(
                write_forward,
                segment,
                slice(self.projections),
                q=self.q,
                out=self.q,
                q_stride=0,
                q_first=0,
                **given,
                state=state,
                scratch=scratch,
                blocks=blocks,
                **place,
                C=self.block,
                OPEN=self.period,
                READ="",
            )

    def queries(self, segment: int, buffers: dict[str, Tensor]) -> dict[str, Any]:
        """Where M_mem's queries of a segment lie: in the call's q, or in the segment's buffer."""
        if self.adaptive:
            return {
                "q": buffers["query"], "q_stride": self.length(0) * self.width, "q_first": 0
            }  # fmt: skip
        first = segment * self.config.segment_chunks * self.config.projection_chunk
        return {"q": self.q, "q_stride": self.tokens * self.width, "q_first": first}

    def memorise(
        self, segment: int, buffers: dict[str, Tensor], state: Tensor, out: Tensor | None
    ) -> None:
        """M_mem over a segment: writes `out` if given and moves `state` [1, G, slots, ...] on."""
        self.write(
            write_forward,
            segment,
            slice(self.projections, None),
            **self.queries(segment, buffers),
            **{name: buffers[name] for name in ("k", "v", "eta", "log_alpha")},
            out=self.q if out is None else out,
            state=state,
            scratch=self.scratch(1, FORWARD_ROOM, self.mem_block),
            blocks=self.length(segment) // self.mem_block,
            first=0,
            first_block=0,
            slots=state.shape[2],
            C=self.mem_block,
            OPEN=self.open,
            READ="" if out is None else self.config.read,
        )

    def forward(self, state: tuple[Tensor, Tensor] | None, out: Tensor, saved: Tensor) -> Tensor:
        """Fill `out` and `saved`, Delta before every segment but the first (as far as it goes);
        returns Delta after the last, [memories, G, 2, D, H]."""
        now = self.start(state)
        split = (self.projections, 1)
        # As many slots as blocks share a frozen state: the last of them writes over it.
        parts = [self.states(n, m) for n, m in zip(split, (self.period, self.open), strict=True)]
        for part, begun in zip(parts, now.split(split), strict=True):
            part[:, :, 0] = begun
        buffers = self.buffers()
        for segment in range(self.segments):
            self.project(segment, buffers, parts[0])
            self.memorise(segment, buffers, parts[1], out)
            last = segment == self.segments - 1
            if last or segment < saved.shape[0]:
                target = (now if last else saved[segment]).split(split)
                for z, part, c in zip(target, parts, (self.block, self.mem_block), strict=True):
                    z.copy_(part[:, :, self.length(segment) // c % part.shape[2]])
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
        mem, whole = slice(self.projections, None), self.length(0)
        states = self.states(self.projections, whole // self.block + 1)
        mem_states = self.states(1, whole // self.mem_block + 1)
        buffers = self.buffers()
        given = {name: buffers[name] for name in ("k", "v", "eta", "log_alpha")}
        wide = (self.memories, self.count, whole, self.width)
        sent = {"dk": self.new(*wide), "dv": self.new(*wide)}
        sent |= {name: self.new(*wide[:3]) for name in ("d_log_eta", "d_log_alpha")}
        d_query = self.new(*wide[1:]) if self.adaptive else dq
        each_dx = self.new(self.projections, *wide[1:])
        d_base, d_frozen = torch.zeros_like(d_state), torch.zeros_like(d_state)
        d_readout = self.new(2, self.count, self.width).zero_()
        d_bias = self.new(2, self.count).zero_()
        mem_scratch = self.scratch(1, BACKWARD_ROOM, self.mem_block)
        scratch = self.scratch(self.projections, BACKWARD_ROOM, self.block)
        for segment in reversed(range(self.segments)):
            before = saved[segment - 1] if segment else self.start(state)
            states[:, :, 0], mem_states[:, :, 0] = before[: self.projections], before[mem]
            self.project(segment, buffers, states)
            self.memorise(segment, buffers, mem_states, None)
            self.write(
                write_backward,
                segment,
                mem,
                **self.queries(segment, buffers),
                **given,
                **{name: z[mem] for name, z in sent.items()},
                d_out=d_out,
                dq=d_query,
                d_base=d_base[mem],
                d_state=d_state[mem],
                d_frozen=d_frozen[mem],
                state=mem_states,
                scratch=mem_scratch,
                first=0,
                first_block=0,
                blocks=self.length(segment) // self.mem_block,
                slots=mem_states.shape[2],
                C=self.mem_block,
                OPEN=self.open,
                READ=self.config.read,
            )
            for first, blocks in reversed(self.chunks_of(segment)):
                where = {
                    "state": states,
                    "slots": states.shape[2],
                    "first": first,
                    "first_block": first // self.block,
                    "blocks": blocks,
                    "d_state": d_state,
                    "C": self.block,
                }
                self.write(
                    write_backward,
                    segment,
                    slice(self.projections),
                    q=self.q,
                    d_out=d_out,
                    dq=d_query,
                    q_stride=0,
                    q_first=0,
                    **given,
                    **sent,
                    d_base=d_base,
                    d_frozen=d_frozen,
                    scratch=scratch,
                    OPEN=self.period,
                    READ="",
                    **where,
                )
                self.launch(
                    project_backward,
                    (self.projections,),
                    segment,
                    x=self.x,
                    source=self.q,
                    dx=each_dx,
                    d_query=d_query if self.adaptive else sent["dk"],
                    **sent,
                    base=self.base,
                    readout=self.readout,
                    d_readout=d_readout,
                    bias=self.bias,
                    d_bias=d_bias,
                    memories=self.memories,
                    INITIAL=self.flags["INITIAL"],
                    DOT=self.flags["DOT"],
                    **where,
                )
            self.gather(segment, each_dx[:MEM].sum(0), dx)
            if self.adaptive:
                self.gather(segment, each_dx[MEM], dq)
        self.first_gradient(d_state, d_base)
        return d_base, d_readout, d_bias

    def gather(self, segment: int, z: Tensor, target: Tensor) -> None:
        """Write a segment's z [G, F, D] into target [rows, heads, T, D]."""
        first = segment * self.length(0)
        here = target[:, :, first : first + self.length(0)]
        here.copy_(z.view(self.rows, self.heads, -1, self.width)[:, :, : here.shape[2]])


def _pack(w1: Tensor, w2: Tensor) -> Tensor:
    """[..., d, h] and [..., h, d] as [..., 2, d, h]."""
    return torch.stack([w1, w2.mT], -3).contiguous()
