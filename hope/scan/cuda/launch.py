"""The order of launches of the CUDA kernels: that of `hope.scan.launch`, with a segment of the
memories that project in one launch, forward and backward.

The memories of a (row, head) need each other's k, v, eta and alpha at every projection chunk: their
programs are a cluster, which a device runs at the same time, and wait for one another there, so
that states stay where they are. A memory of more hidden features than a program has room for is
split over several, its shards, which wait for one another wherever all of its features are summed
over. What memories share of a block, each computes for itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hope.scan.cuda import device
from hope.scan.cuda.call import HIDDEN, compiled_for, record_size, stash_size, sums_size
from hope.scan.launch import Launcher
from hope.scan.segments import Segment, Writer


class CudaLauncher(Launcher):
    """The launches over the tensors of one call; shapes in hope/scan/cuda/program.h."""

    def shards_of(self, hidden: int) -> int:
        """Programs of a memory of that hidden width."""
        return -(-hidden // HIDDEN)

    def frame_size(self, block: int) -> int:
        """W2's system."""
        return block * block

    def work_size(self, block: int, read: str, keep: bool) -> int:
        """A `Record`."""
        return record_size(block, read, self.width) if keep else 0

    def scratch(self, memories: int, chunk: int) -> Tensor:
        """What the blocks of a chunk send to the W that it starts from, as products take it."""
        shape = (memories, self.count, chunk, stash_size(self.width))
        return self.x.new_empty(shape, dtype=self.base.dtype)

    def run(
        self,
        kernel: str,
        writer: Writer,
        segment: int,
        at: Segment,
        **given: Any,
    ) -> None:
        """Launch a kernel on a writer's memories and the blocks of a segment."""
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
            "blocks": self.length(segment) // writer.block,
            "first_token": self.first_token(segment),
            "eta_max": self.config.eta_max,
            "offset": writer.which.start or 0,
            "all_programs": self.memories,
            **given,
        }
        programs = writer.state.shape[0]
        if self.shards > 1:
            told["sums"] = self.new(programs, self.count, sums_size(writer.block, self.width))
        options = compiled_for(
            self.config,
            programs // self.shards,
            writer.block,
            writer.read,
            self.has_reset,
            self.adaptive,
            self.shards,
            self.width,
        )
        device.launch(kernel, options, (self.count, programs), told)

    def project(self, segment: int, at: Segment, keep: bool) -> None:
        """The projection memories over a segment: fills the buffers and moves their state on."""
        self.run("write_forward", at.projections, segment, at, keep=keep)

    def memorise(self, segment: int, at: Segment, out: Tensor | None) -> None:
        """M_mem over a segment: writes `out`, or without it keeps what backward needs."""
        given = {} if out is None else {"out": out}
        self.run("write_forward", at.mem, segment, at, keep=out is None, **given)

    def back(
        self,
        writer: Writer,
        segment: int,
        at: Segment,
        gradients: dict[str, Tensor],
        **given: Any,
    ) -> None:
        """Launch the derivative of a writer's launch."""
        d_query = gradients["dq"] if at.d_query is None else at.d_query
        self.run(
            "write_backward",
            writer,
            segment,
            at,
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
        self.back(writer, segment, at, gradients)

    def project_back(
        self, segment: int, at: Segment, each_dx: Tensor, gradients: dict[str, Tensor]
    ) -> None:
        """The derivative of `project`; fills each_dx, what each memory sends to x or to q."""
        self.back(at.projections, segment, at, gradients, dx=each_dx)
