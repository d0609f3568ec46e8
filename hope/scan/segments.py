"""What launches of the scan's Triton kernels have of a segment: its memory, and its stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hope.scan.kernels.writes import work_matrices
from hope.scan.layouts import Layouts


class Beside:
    """A second stream of the tensors' device; on a CPU the work simply runs in order."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def run(self) -> Iterator[None]:
        """Launches inside begin once what the current stream has so far is done."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """All that was launched beside so far."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """What the current stream launches from now on begins after the mark."""
        if self.stream is not None and mark is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(mark)


@dataclass
class Writer:
    """What launches on some memories have of a segment: memories `which`, blocks of `block`
    tokens, `open` of which share a frozen state; `state` [memories, G, 2, D, H], `frozen`,
    `deltas`, `frames` and `work` as in `hope.scan.kernels`."""

    which: slice
    block: int
    open: int
    read: str
    wide: int
    state: Tensor
    frozen: Tensor
    deltas: Tensor
    frames: Tensor
    work: Tensor


class Segment:
    """Memory for a segment: k, v, eta, log_alpha and query, and what the launches hand on.

    after: the segment before, whose states this one moves on; without it, for backward.
    """

    def __init__(self, layouts: Layouts, keep: bool, after: Segment | None = None) -> None:
        count, length = layouts.count, layouts.length(0)
        wide, narrow = (count, length, layouts.width), (count, length)
        shapes = {"k": wide, "v": wide, "eta": narrow, "log_alpha": narrow}
        if layouts.adaptive:
            shapes["query"] = wide
        self.buffers = {name: layouts.new(*shape) for name, shape in shapes.items()}
        if after is None:
            split, read = layouts.projections, layouts.config.read
            of_mem = (slice(split, None), layouts.mem_block, layouts.open, read, keep)
            self.projections = _writer(
                layouts, slice(split), layouts.block, layouts.period, "", keep
            )
            self.mem = _writer(layouts, *of_mem)
        else:
            self.projections, self.mem = after.projections, after.mem
        self.sent: dict[str, Tensor] = {}
        self.d_query: Tensor | None = None
        if keep:
            names = {"dk": wide, "dv": wide, "d_log_eta": narrow, "d_log_alpha": narrow}
            self.sent = {name: layouts.new(layouts.memories, *z) for name, z in names.items()}
            self.d_query = layouts.new(*wide) if layouts.adaptive else None
        self.done: torch.cuda.Event | None = None

    def begin(self, layouts: Layouts, delta: Tensor) -> None:
        """Start from Delta [memories, G, 2, D, H]."""
        whole = layouts.add_base(delta)
        for writer in (self.projections, self.mem):
            writer.state.copy_(delta[writer.which])
            writer.frozen[:, :, 0] = whole[writer.which]


def _writer(
    layouts: Layouts, which: slice, block: int, open_: int, read: str, keep: bool
) -> Writer:
    """Memory for the launches on some memories; keep: for backward."""
    memories = len(range(*which.indices(layouts.memories)))
    blocks = layouts.length(0) // block
    wide = work_matrices(read == "causal", keep)
    # Forward: a chunk's W takes the place of the one before.
    opened = -(-blocks // open_) + 1 if keep else 1
    return Writer(
        which,
        block,
        open_,
        read,
        wide,
        layouts.states(memories),
        layouts.states(memories, opened, dtype=layouts.base.dtype),
        layouts.states(memories, blocks if keep else 0, dtype=layouts.base.dtype),
        layouts.new(layouts.count, blocks, layouts.frame_size(block)),
        layouts.new(
            memories * layouts.count, blocks if keep else 1, layouts.work_size(block, read, keep)
        ),
    )
