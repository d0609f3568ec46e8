"""python -m tools.kernel_costs: operations, bytes and floor in time of each of our kernels.

The floor of a kernel on an H100 is the longer of its matrix products at 990 TFLOP/s (bf16) and its
bytes at 3.35 TB/s. Nothing is run: `tools.bench_gpu` measures. Products are those of the closed
form (`hope.flops`), what backward computes again included; the masked products of the triangular
inverses are not, nor is element-wise work, all that convolution, norm, gate and loss have. Bytes
are tensors in and out of a launch once, states too; what it loads again, or keeps for itself, is
not counted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from data_pipeline.command import as_command
from hope.flops import backward_products, forward_products
from hope.scan import ScanConfig
from hope.scan.layouts import block_lengths
from tools.figures import table

PEAK_FLOPS, PEAK_BYTES = (
    990e12,
    3.35e12,
)  # of an H100 SXM: bf16 operations, bytes of memory, a second


VOCABULARY = 32_000


class Shape(NamedTuple):
    """Rows, heads, tokens, the head's width and its memories' hidden width."""

    rows: int
    heads: int
    tokens: int
    width: int
    hidden: int


class Cost(NamedTuple):
    """Operations and bytes of a kernel over a whole sequence, all its launches together."""

    flops: float
    bytes: float

    @property
    def floor(self) -> float:
        """Microseconds on an H100."""
        return 1e6 * max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


def _products(table: dict[str, int], *starts: str) -> int:
    return sum(count for name, count in table.items() if name.startswith(starts))


def kernel_costs(config: ScanConfig, shape: Shape, element: int = 2) -> dict[str, Cost]:
    """Of each kernel, for five memories: "forward: ..." in the forward pass, "backward: ..." in
    the backward pass, which runs the forward kernels again to have every block's state.

    element: bytes of an activation.
    """
    d, h = shape.width, shape.hidden
    chunk = config.projection_chunk
    chunks = shape.rows * shape.heads * shape.tokens / chunk
    tokens = chunks * chunk
    whole = replace(config, memory_chunk=chunk)
    forward, mem_forward = (
        forward_products(whole, d, h, 4, chunk),
        forward_products(config, d, h, 1, chunk),
    )
    backward, mem_backward = (
        backward_products(whole, d, h, 4, chunk),
        backward_products(config, d, h, 1, chunk),
    )
    # W2's system and queries with keys are done once for all memories, not in their launches.
    system = ("write: k k^T", "write: inverses")
    frames = _products(forward_products(whole, d, h, 1, chunk), *system) // 2
    frames += _products(mem_forward, *system, "read: q k^T") // 2
    reads = _products(forward, "read x")
    writes = _products(forward, "write") + _products(mem_forward, "write", "read:") - frames
    reads_back = _products(backward, "read x")
    writes_back = _products(backward, "write") + _products(mem_backward, "write", "read:")

    state, row = 8 * d * h, d * element  # float32 W1 and W2; one token's activations
    rounded = 2 * d * h * element  # W1 and W2 as products take them
    kv = 8 * d + 8  # float32 k, v, eta, log alpha of a token
    block, mem_block = block_lengths(config, torch.bfloat16 if element == 2 else torch.float32)
    moved = 4 * chunks + chunks / config.segment_chunks  # states that a launch moves on
    deltas = (4 / block + 1 / mem_block) * tokens  # and those before every block and
    opened = 4 * chunks + tokens / config.memory_chunk  # W at every memory chunk's start: kept
    framed = 4 * (3 * block + 3 * mem_block + 8)  # of a token, in both frames
    own = 4 * (4 * (6 * h + 2 * d + 2 * block) + 8 * h + 2 * d + 2 * mem_block)  # of a token
    kept = tokens * own + rounded * (deltas + opened)
    made = Cost(2 * frames * chunks, tokens * (row + 2 * kv + framed))
    project = Cost(2 * reads * chunks, tokens * (row + kv) + 4 * rounded * chunks)
    write = Cost(
        2 * writes * chunks,
        tokens * (2 * row + 2 * kv + framed) + 2 * (state + rounded) * moved,
    )
    return {
        "forward: project_forward": project,
        "forward: make_frames": made,
        "forward: write_forward": write,
        "backward: project_forward": project,
        "backward: make_frames": made,
        "backward: write_forward": write._replace(bytes=write.bytes + kept),
        "backward: write_backward": Cost(
            2 * writes_back * chunks,
            tokens * (3 * row + 7 * kv + framed) + kept + 4 * state * moved,
        ),
        "backward: project_backward": Cost(
            2 * (reads + reads_back) * chunks,
            tokens * (row + 5 * kv + 16 * d) + 4 * (2 * state + rounded) * chunks,
        ),
    }


def fused_costs(shape: Shape, vocabulary: int, element: int = 2) -> dict[str, Cost]:
    """The same of one of the mixer's two convolutions, of its norm and gate, and of the loss over
    logits of that many columns."""
    positions = shape.rows * shape.tokens
    mixed = positions * shape.heads * shape.width * element
    logits = positions * vocabulary * element
    return {
        "forward: convolve_forward": Cost(0, 2 * mixed),
        "backward: convolve_backward": Cost(0, 3 * mixed),
        "forward: gated_norm_forward": Cost(0, 3 * mixed),
        "backward: gated_norm_backward": Cost(0, 5 * mixed),
        "forward: cross_entropy_forward": Cost(0, logits),
        "backward: cross_entropy_backward": Cost(0, 2 * logits),
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 printed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_costs", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--expansion", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--chunks", type=int, nargs=2, default=(16, 64), metavar="TOKENS")
    options = parser.parse_args(arguments)
    shape = Shape(
        options.rows, options.heads, options.tokens, options.width,
        options.width * options.expansion,
    )  # fmt: skip
    if min(*shape, options.vocabulary) < 1:
        parser.error("sizes must be positive")
    try:
        config = ScanConfig(*options.chunks)
    except ValueError as error:
        parser.error(str(error))
    costs = kernel_costs(config, shape) | fused_costs(shape, options.vocabulary)
    rows = [
        [name, f"{cost.flops / 1e9:,.0f}", f"{cost.bytes / 1e6:,.0f}", f"{cost.floor:,.0f}"]
        for name, cost in costs.items()
    ]
    print(table(["kernel", "GFLOP", "MB", "floor, us"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
