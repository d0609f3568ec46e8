"""Launches of the CUDA kernels on torch's tensors: what they are compiled for and told."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, get_args

from hope.scan.contract import DeltaRule, ScanConfig

WIDTH = 64
"""Of heads and of their memories' hidden layer."""
THREADS = 256
KERNELS = ("write_forward", "write_backward")
"""Of the memories that project, and of M_mem."""
READS = {"": 0, "causal": 1, "chunk_start": 2}
STASHED = 6
"""Matrices [block, WIDTH] of every block of a chunk that backward puts aside."""
_POINTERS = (
    "x", "source", "q", "out", "k", "v", "eta", "log_alpha", "query", "base", "fresh", "state",
    "frozen", "deltas", "work", "systems", "readout", "bias", "reset", "d_out", "dq", "dk", "dv",
    "d_log_eta", "d_log_alpha", "dx", "d_query", "d_base", "d_state", "d_readout", "d_bias",
    "stash",
)  # fmt: skip
_NUMBERS = (
    "count", "heads", "q_first", "tokens", "length", "first_token", "blocks",
    "opened", "works", "open", "chunk", "chunks", "keep", "offset",
    "all_memories",
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
    `Read` and so on of program.h."""

    memories: int
    tokens: int
    rule: int
    read: int
    initial: bool
    has_reset: bool
    adaptive: bool

    def defines(self) -> list[str]:
        """As the compiler is told."""
        return [f"-D{name.upper()}={int(value)}" for name, value in self._asdict().items()]


def compiled_for(
    config: ScanConfig, memories: int, block: int, read: str, has_reset: bool, adaptive: bool
) -> Options:
    """Of a launch on so many memories and blocks of that many tokens, which reads in that way;
    adaptive: its queries are made by a memory."""
    return Options(
        memories,
        block,
        get_args(DeltaRule).index(config.delta_rule),
        READS[read],
        config.decay_to == "initial",
        has_reset,
        adaptive and read != "",
    )


def record_size(block: int, read: str) -> int:
    """Numbers of a block's `Record`."""
    of_read = WIDTH + block if read == "causal" else 0
    return block * (2 * WIDTH + block + 3 + of_read)


def shared_bytes(kernel: str, options: Options) -> int:
    """Shared memory of a program: what `Buffers` and `Gradients` take."""
    block, reads, causal = options.tokens, options.read > 0, options.read == READS["causal"]
    state, tokens = 2 * WIDTH * WIDTH, 2 * block * WIDTH
    square, row = _whole(2 * block * (block + 8)), _whole(4 * block)
    if kernel.endswith("forward"):
        states, each, squares, rows = 4, 9 + 2 * reads, 4 + 2 * causal, 12
        rest = 4 * 256 + 2 * _whole(4 * block * (block + 4)) + 2 * _whole(4 * block * 20)
    else:
        states, each, squares, rows = 6, 10 + 4 * reads, 2 + 4 * causal, 13
        rest = 4 * (128 + 128) + _whole(4 * 8)
    states += 2 * options.initial
    return states * state + each * tokens + squares * square + rows * row + rest


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
