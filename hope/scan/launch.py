"""Launching the scan's Triton kernels: chunks, segments, and what is kept for backward.

The projection memories need each other at every projection chunk: one launch reads k, v, eta and
alpha out of them, one takes what all memories share (`frames`), one writes them, a program per
(row, head, memory) with the states in global memory. M_mem needs what they give but gives them
nothing: it runs over a whole segment of `segment_chunks` projection chunks in one launch, beside
the next segment's projections on another stream, since one program per (row, head) leaves most of
a device idle. Forward keeps the states between segments. Backward goes from the last segment to
the first: it runs both again, keeping what the derivative needs, then M_mem's derivative, beside
the segment before, then that of the projection memories, chunk by chunk.
Nothing is waited for on the host and no shape depends on values, so a CUDA graph can capture all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope.scan.contract import MEM
from hope.scan.kernels.frames import make_frames
from hope.scan.kernels.projections import project_backward, project_forward
from hope.scan.kernels.writes import write_forward
from hope.scan.kernels.writes_backward import write_backward
from hope.scan.layouts import Layouts
from hope.scan.segments import Beside, Segment, Writer

OPTIONS = {
    "project_forward": {64: (2, 32), 128: (4, 32)},
    "make_frames": {64: (2, 0), 128: (4, 0)},
    "make_frames_mem": {64: (1, 0), 128: (4, 0)},
    "write_forward": {64: (2, 32), 128: (4, 32)},
    "write_forward_mem": {64: (4, 32), 128: (8, 32)},
    "project_backward": {64: (4, 64), 128: (4, 32)},
    "write_backward": {64: (4, 32), 128: (8, 32)},
    "write_backward_mem": {64: (4, 32), 128: (8, 32)},
}
"""Warps of a program, and hidden features that it holds at a time (TILE, 0 where there are none),
for every kind of launch ("_mem": for M_mem) and heads up to so wide. Measured: docs/gpu.md."""
STAGES = 1
"""Loads must not move over the stores of an earlier round of a loop, so none is pipelined but those
over tiles (`hope.scan.kernels.primitives.AHEAD`)."""


def options(kind: str, width: int) -> tuple[int, int]:
    """Warps and TILE of a kind of launch, for heads of that width."""
    return OPTIONS[kind][64 if width <= 64 else 128]


class Launcher(Layouts):
    """The launches over the tensors of one call."""

    def launch(
        self, kernel: Any, grid: tuple[int, ...], segment: int, mem: bool, **arguments: Any
    ) -> None:
        """Run a kernel on a segment's buffers; mem: for M_mem."""
        warps, tile = options(kernel.__name__ + ("_mem" if mem else ""), self.width)
        if tile:
            arguments |= {"heads": self.heads, "H": self.hidden, "TILE": min(tile, self.hidden)}
        kernel[(self.count, *grid)](
            tokens=self.tokens,
            length=self.length(0),
            first_token=self.first_token(segment),
            D=self.width,
            DOT=self.flags["DOT"],
            **arguments,
            num_warps=warps,
            num_stages=STAGES,
        )

    def write(
        self,
        kernel: Any,
        writer: Writer,
        segment: int,
        buffers: dict[str, Tensor],
        **arguments: Any,
    ) -> None:
        """Launch a kernel that writes a writer's memories, or its derivative."""
        memories = writer.state.shape[0]
        flags = {name: self.flags[name] for name in ("INITIAL", "DELTA1", "DELTA2", "TARGET")}
        self.launch(
            kernel,
            (memories,),
            segment,
            mem=bool(writer.read),
            **{name: buffers[name] for name in ("k", "v", "eta")},
            frames=writer.frames,
            frame_blocks=writer.frames.shape[1],
            base=self.base[writer.which],
            frozen=writer.frozen,
            opened=writer.frozen.shape[2],
            deltas=writer.deltas,
            work=writer.work,
            works=writer.work.shape[1],
            room=writer.work.shape[2],
            reset=self.reset,
            chunks=self.chunks,
            C=writer.block,
            OPEN=writer.open,
            CHUNK=self.config.projection_chunk,
            READ=writer.read,
            WIDE=writer.wide,
            HAS_RESET=self.has_reset,
            **flags,
            **arguments,
        )

    def chunks_of(self, segment: int) -> list[dict[str, int]]:
        """The projection chunks of a segment: first token in the buffers, first block, blocks."""
        length, chunk, block = self.length(segment), self.config.projection_chunk, self.block
        return [
            {
                "first": first,
                "first_block": first // block,
                "blocks": min(chunk, length - first) // block,
            }
            for first in range(0, length, chunk)
        ]

    def frame(self, writer: Writer, segment: int, at: Segment, place: dict[str, int]) -> None:
        """Fill a writer's frames of some blocks."""
        self.launch(
            make_frames,
            (place["blocks"],),
            segment,
            mem=bool(writer.read),
            **self.queries(segment, at.buffers),
            **{name: at.buffers[name] for name in ("k", "eta", "log_alpha")},
            frames=writer.frames,
            frame_blocks=writer.frames.shape[1],
            first=place["first"],
            first_block=place["first_block"],
            C=writer.block,
            READ=writer.read,
            DELTA2=self.flags["DELTA2"],
            TARGET=self.flags["TARGET"],
        )

    def project(self, segment: int, at: Segment, keep: bool) -> None:
        """The projection memories over a segment: fills the buffers and moves their state on."""
        writer = at.projections
        given = {name: at.buffers[name] for name in ("k", "v", "eta", "log_alpha")}
        for place in self.chunks_of(segment):
            here = {name: place[name] for name in ("first", "first_block")}
            self.launch(
                project_forward,
                (self.projections, place["blocks"]),
                segment,
                mem=False,
                x=self.x,
                source=self.q,
                query=at.buffers.get("query", at.buffers["k"]),
                **given,
                readout=self.readout,
                bias=self.bias,
                frozen=writer.frozen,
                opened=writer.frozen.shape[2],
                **here,
                eta_max=float(self.config.eta_max),
                C=self.block,
                OPEN=writer.open,
            )
            self.frame(writer, segment, at, place)
            self.write(
                write_forward,
                writer,
                segment,
                at.buffers,
                q=self.q,
                out=self.q,
                q_stride=0,
                q_first=0,
                fresh=self.fresh,
                state=writer.state,
                SAVE=keep,
                **place,
            )

    def queries(self, segment: int, buffers: dict[str, Tensor]) -> dict[str, Any]:
        """Where M_mem's queries of a segment lie: in the call's q, or in the segment's buffer."""
        if self.adaptive:
            return {
                "q": buffers["query"], "q_stride": self.length(0) * self.width, "q_first": 0
            }  # fmt: skip
        first = self.first_token(segment)
        return {"q": self.q, "q_stride": self.tokens * self.width, "q_first": first}

    def whole(self, segment: int) -> dict[str, int]:
        """A segment's blocks of M_mem."""
        return {"first": 0, "first_block": 0, "blocks": self.length(segment) // self.mem_block}

    def memorise(self, segment: int, at: Segment, out: Tensor | None) -> None:
        """M_mem over a segment: writes `out`, or without it keeps what backward needs."""
        self.frame(at.mem, segment, at, self.whole(segment))
        self.write(
            write_forward,
            at.mem,
            segment,
            at.buffers,
            **self.queries(segment, at.buffers),
            fresh=self.fresh[at.mem.which],
            state=at.mem.state,
            out=self.q if out is None else out,
            SAVE=out is None,
            **self.whole(segment),
        )

    def forward(self, state: tuple[Tensor, Tensor] | None, out: Tensor, saved: Tensor) -> Tensor:
        """Fill `out` and `saved`, Delta before every segment but the first (as far as it goes);
        returns Delta after the last, [memories, G, 2, D, H]."""
        now, beside = self.start(state), Beside(self.x.device)
        saved = self.between(saved)
        first = Segment(self, keep=False)
        pair = (first, Segment(self, keep=False, after=first))
        first.begin(self, now)
        for segment in range(self.segments):
            at = pair[segment % 2]
            beside.wait(at.done)
            self.project(segment, at, keep=False)
            last = segment == self.segments - 1
            target = now if last else saved[segment] if segment < saved.shape[0] else None
            if target is not None:
                target[: self.projections] = at.projections.state
            with beside.run():
                self.memorise(segment, at, out)
                if target is not None:
                    target[self.projections :] = at.mem.state
            at.done = beside.mark()
        beside.wait(beside.mark())
        return now

    def again(
        self,
        segment: int,
        before: Tensor,
        at: Segment,
        beside: Beside,
        gradients: dict[str, Tensor],
    ) -> None:
        """A segment's forward pass again, from Delta `before` it, and M_mem's derivative."""
        at.begin(self, before)
        self.project(segment, at, keep=True)
        with beside.run():
            self.memorise(segment, at, None)
            self.write_back(
                segment,
                at,
                at.mem,
                self.whole(segment),
                gradients,
                **self.queries(segment, at.buffers),
            )
        at.done = beside.mark()

    def write_back(
        self,
        segment: int,
        at: Segment,
        writer: Writer,
        place: dict[str, int],
        gradients: dict[str, Tensor],
        **queries: Any,
    ) -> None:
        """The derivative of a writer's launch."""
        given = {name: gradients[name][writer.which] for name in ("d_base", "d_state")}
        d_query = gradients["dq"] if at.d_query is None else at.d_query
        self.write(
            write_backward,
            writer,
            segment,
            at.buffers,
            **queries,
            **given,
            **{name: z[writer.which] for name, z in at.sent.items()},
            d_out=gradients["d_out"],
            dq=d_query,
            scratch=gradients["scratch_mem" if writer.read else "scratch"],
            **place,
        )

    def scratch(self, memories: int, chunk: int) -> Tensor:
        """What the passes of a backward launch over a chunk of tokens hand on."""
        return self.new(memories, self.count, chunk, self.hidden)

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
        beside = Beside(self.x.device)
        saved = self.between(saved)
        pair = [Segment(self, keep=True) for _ in range(min(2, self.segments))]
        each_dx = self.new(self.projections, self.count, self.length(0), self.width)
        gradients = {
            "d_state": d_state,
            "d_base": torch.zeros_like(d_state),
            "d_readout": self.new(2, self.count, self.width).zero_(),
            "d_bias": self.new(2, self.count).zero_(),
            "dq": dq,
            "d_out": d_out,
            "scratch": self.scratch(self.projections, self.config.projection_chunk),
            "scratch_mem": self.scratch(self.shards, self.config.memory_chunk),
        }
        for segment in reversed(range(-1, self.segments)):
            # The next segment's forward pass comes first, so that M_mem's derivative runs beside.
            if segment >= 0:
                before = saved[segment - 1] if segment else self.start(state)
                self.again(segment, before, pair[segment % 2], beside, gradients)
            if segment + 1 < self.segments:
                at = pair[(segment + 1) % 2]
                beside.wait(at.done)
                self.project_back(segment + 1, at, each_dx, gradients)
                of_x = MEM * self.shards
                self.gather(segment + 1, each_dx[:of_x].sum(0), dx)
                if self.adaptive:
                    self.gather(segment + 1, each_dx[of_x:].sum(0), dq)
        self.first_gradient(d_state, gradients["d_base"])
        return gradients["d_base"], gradients["d_readout"], gradients["d_bias"]

    def project_back(
        self, segment: int, at: Segment, each_dx: Tensor, gradients: dict[str, Tensor]
    ) -> None:
        """The derivative of `project`; fills each_dx, what each memory sends to x or to q."""
        writer = at.projections
        for place in reversed(self.chunks_of(segment)):
            self.write_back(segment, at, writer, place, gradients, q=self.q, q_stride=0, q_first=0)
            self.launch(
                project_backward,
                (self.projections,),
                segment,
                mem=False,
                x=self.x,
                source=self.q,
                dx=each_dx,
                d_query=at.sent["dk"] if at.d_query is None else at.d_query,
                **at.sent,
                readout=self.readout,
                bias=self.bias,
                **{name: gradients[name] for name in ("d_state", "d_readout", "d_bias")},
                frozen=writer.frozen,
                opened=writer.frozen.shape[2],
                MEMORIES=self.memories,
                **place,
                C=self.block,
                OPEN=writer.open,
            )

    def between(self, saved: Tensor) -> Tensor:
        """The operator's Deltas between segments [S, M, G, 2, d, h], as the kernels have states."""
        return saved.view(saved.shape[0], self.memories, self.count, 2, self.width, self.hidden)

    def gather(self, segment: int, z: Tensor, target: Tensor) -> None:
        """Write a segment's z [G, F, D] into target [rows, heads, T, D]."""
        first = self.first_token(segment)
        here = target[:, :, first : first + self.length(0)]
        here.copy_(z.view(self.rows, self.heads, -1, self.width)[:, :, : here.shape[2]])
