"""The order of launches of the CUDA kernels: that of `hope.scan.launch`, with what it launches for
a projection chunk in one kernel, forward and backward.

A launch that writes the projection memories also makes k, v, eta and alpha of the next chunk, whose
W it has at hand, and every program computes what memories share of a block itself. The derivative
of a chunk begins with that of the next one's k, v, eta and alpha, which needs what all memories
have sent back. So a launch of their own (`project_forward`, `project_backward`) is needed only by a
segment's first chunk.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hope.scan.cuda import device
from hope.scan.cuda.call import STASHED, compiled_for, record_size
from hope.scan.launch import Launcher
from hope.scan.segments import Segment, Writer


class CudaLauncher(Launcher):
    """The launches over the tensors of one call; shapes in hope/scan/cuda/program.h."""

    def frame_size(self, block: int) -> int:
        """W2's system."""
        return block * block

    def work_size(self, block: int, read: str, keep: bool) -> int:
        """A `Record`."""
        return record_size(block, read) if keep else 0

    def scratch(self, memories: int, chunk: int) -> Tensor:
        """What the blocks of a chunk send to the W that it starts from, as products take it."""
        shape = (memories, self.count, chunk, STASHED, self.hidden)
        return self.x.new_empty(shape, dtype=self.base.dtype)

    def run(
        self,
        kernel: str,
        writer: Writer,
        segment: int,
        at: Segment,
        place: dict[str, int],
        **given: Any,
    ) -> None:
        """Launch a kernel on a writer's memories, and the blocks of a `place` of the buffers."""
        queries = self.queries(segment, at.buffers) if writer.read else {"q": self.q}
        told = {
            "x": self.x,
            "source": self.q,
            **at.buffers,
            **queries,
            "base": self.base[writer.which],
            "fresh": self.fresh[writer.which],
            "state": writer.state,
            "frozen": writer.frozen,
            "opened": writer.frozen.shape[2],
            "deltas": writer.deltas,
            "work": writer.work,
            "works": writer.work.shape[1],
            "systems": writer.frames,
            "readout": self.readout,
            "bias": self.bias,
            "reset": self.reset,
            "chunks": self.chunks,
            "open": writer.open,
            "chunk": self.config.projection_chunk,
            "count": self.count,
            "heads": self.heads,
            "tokens": self.tokens,
            "length": self.length(0),
            "first_token": self.first_token(segment),
            "eta_max": self.config.eta_max,
            "offset": writer.which.start or 0,
            "all_memories": self.memories,
            **place,
            **given,
        }
        options = compiled_for(
            self.config, writer.block, writer.read, self.has_reset, self.adaptive
        )
        device.launch(kernel, options, (self.count, writer.state.shape[0]), told)

    def project(self, segment: int, at: Segment, keep: bool) -> None:
        """The projection memories over a segment: fills the buffers and moves their state on."""
        places = self.chunks_of(segment)
        self.run("project_forward", at.projections, segment, at, places[0])
        for place, after in zip(places, [*places[1:], {"blocks": 0}], strict=True):
            more = after["blocks"]
            self.run(
                "write_forward", at.projections, segment, at, place, keep=keep, more_blocks=more
            )

    def memorise(self, segment: int, at: Segment, out: Tensor | None) -> None:
        """M_mem over a segment: writes `out`, or without it keeps what backward needs."""
        place, keep = self.whole(segment), out is None
        given = {} if out is None else {"out": out}
        self.run("write_forward", at.mem, segment, at, place, keep=keep, **given)

    def back(
        self,
        kernel: str,
        writer: Writer,
        segment: int,
        at: Segment,
        place: dict[str, int],
        gradients: dict[str, Tensor],
        **given: Any,
    ) -> None:
        """Launch a kernel's derivative."""
        d_query = gradients["dq"] if at.d_query is None else at.d_query
        self.run(
            kernel,
            writer,
            segment,
            at,
            place,
            **{name: gradients[name][writer.which] for name in ("d_base", "d_state")},
            **{name: gradients[name] for name in ("d_out", "d_readout", "d_bias")},
            **at.sent,
            dq=d_query,
            d_query=d_query,
            stash=gradients["scratch_mem" if writer.read else "scratch"],
            **given,
        )

    def write_back(
        self,
        segment: int,
        at: Segment,
        writer: Writer,
        place: dict[str, int],
        gradients: dict[str, Tensor],
        **queries: Any,
    ) -> None:
        """The derivative of M_mem's launch."""
        self.back("write_backward", writer, segment, at, place, gradients)

    def project_back(
        self, segment: int, at: Segment, each_dx: Tensor, gradients: dict[str, Tensor]
    ) -> None:
        """The derivative of `project`; fills each_dx, what each memory sends to x or to q."""
        places = self.chunks_of(segment)
        given = (at.projections, segment, at)
        for place, after in zip(
            reversed(places), [{"blocks": 0}, *reversed(places[1:])], strict=True
        ):
            more = after["blocks"]
            self.back("write_backward", *given, place, gradients, more_blocks=more, dx=each_dx)
        self.back("project_backward", *given, places[0], gradients, dx=each_dx)
