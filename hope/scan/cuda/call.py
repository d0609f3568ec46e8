"""Launches of the CUDA kernels on torch's tensors: what they are compiled for and told."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, get_args

from hope.scan.contract import DeltaRule, ScanConfig

SIZES = ((64, 64), (64, 128), (128, 128))
"""Memories, width x hidden width, that are compiled."""
TRIED = ((64, 64),)
"""Those that a device has run, which "auto" takes."""
HIDDEN = 64
"""Features of a memory's hidden layer that a program has: its shard."""
KERNELS = ("write_forward", "write_backward")
"""Of the memories that project, and of M_mem."""
READS = {"": 0, "causal": 1, "chunk_start": 2}
_POINTERS = (
    "x", "source", "q", "out", "k", "v", "eta", "log_alpha", "query", "base", "fresh", "state",
    "frozen", "deltas", "work", "systems", "readout", "bias", "reset", "d_out", "dq", "dk", "dv",
    "d_log_eta", "d_log_alpha", "dx", "d_query", "d_base", "d_state", "d_readout", "d_bias",
    "stash", "sums",
)  # fmt: skip
_NUMBERS = (
    "count", "heads", "q_first", "tokens", "length", "first_token", "blocks",
    "opened", "works", "open", "chunk", "chunks", "keep", "offset",
    "all_programs",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """`Call` of program.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("q_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in _NUMBERS),
        ("eta_max", ctypes.c_double),
    ]


class Options(NamedTuple):
    """What a kernel is compiled for: memories that wait for one another, tokens of a block, `Rule`,
    `Read` and so on of program.h; shards of a memory, the width of a head."""

    memories: int
    tokens: int
    rule: int
    read: int
    initial: bool
    has_reset: bool
    adaptive: bool
    shards: int = 1
    width: int = 64

    @property
    def threads(self) -> int:
        """Of a program."""
        return 4 * self.width

    @property
    def cluster(self) -> int:
        """Programs that wait for one another."""
        return self.memories * self.shards

    def defines(self) -> list[str]:
        """As the compiler is told."""
        return [f"-D{name.upper()}={int(value)}" for name, value in self._asdict().items()]


def compiled_for(
    config: ScanConfig,
    memories: int,
    block: int,
    read: str,
    has_reset: bool,
    adaptive: bool,
    shards: int,
    width: int,
) -> Options:
    """Of a launch on so many memories and blocks of that many tokens, which reads in that way;
    adaptive: its queries are made by a memory; shards of each memory, the width of a head."""
    return Options(
        memories,
        block,
        get_args(DeltaRule).index(config.delta_rule),
        READS[read],
        config.decay_to == "initial",
        has_reset,
        adaptive and read != "",
        shards,
        width,
    )


def record_size(block: int, read: str, width: int) -> int:
    """Numbers of a block's `Record`."""
    of_read = HIDDEN + block if read == "causal" else 0
    return block * (width + HIDDEN + block + 3 + of_read)


def stash_size(width: int) -> int:
    """Numbers that backward puts aside of every token of a chunk."""
    return 2 * width + 4 * HIDDEN


def sums_size(block: int, width: int) -> int:
    """Numbers that a program's `Team` has, of two rounds."""
    return 2 * block * (3 * width + block + 1)


def shared_bytes(kernel: str, options: Options) -> int:
    """Shared memory of a program: what `Buffers` and `Gradients` take."""
    block, reads, causal = options.tokens, options.read > 0, options.read == READS["causal"]
    width, warps = options.width, options.threads // 32
    square, row, room = _whole(2 * block * (block + 8)), _whole(4 * block), 4 * 16 * warps
    if kernel.endswith("forward"):
        states, tokens, hidden = 4, 5 + reads, 4 + reads
        squares, rows = 4 + 2 * causal, 12 + (options.shards > 1)
        rest = 2 * room + 2 * _whole(4 * block * (block + 4)) + 2 * _whole(4 * block * 20)
    else:
        states, tokens, hidden, squares, rows = 6, 5 + 2 * reads, 5 + 2 * reads, 2 + 4 * causal, 13
        rest = 2 * room + _whole(4 * warps)
    operands = (states + 2 * options.initial) * width * HIDDEN + block * (
        tokens * width + hidden * HIDDEN
    )
    return 2 * operands + squares * square + rows * row + rest


def _whole(size: int) -> int:
    """In the units that `Shared` hands out."""
    return -(-size // 128) * 128


def arguments(given: dict[str, Any]) -> Arguments:
    """Tensors and numbers by name; what a kernel has no use for may be left out."""
    told = Arguments()
    for name in _POINTERS:
        if name in given:
            setattr(told, name, given[name].data_ptr())
    for name in ("q_stride", *_NUMBERS):
        setattr(told, name, int(given.get(name, 0)))
    told.eta_max = given["eta_max"]
    return told
