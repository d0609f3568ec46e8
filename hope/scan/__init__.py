"""The self-modifying scan (Eqs. 83-91): sequence mixing by memories that rewrite themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from hope.forward_mode import carries_tangent
from hope.scan.chunked import scan_chunked
from hope.scan.contract import (
    MEMORIES,
    MemoryState,
    ScanConfig,
    ScanImplementation,
    ScanWeights,
    check_inputs,
    check_reset,
    initial_state,
    no_autocast,
)
from hope.scan.cuda import device as cuda_device
from hope.scan.cuda.call import SIZES, TRIED
from hope.scan.native.operators import scan_native, why_not_native
from hope.scan.reference import scan_reference
from hope.scan.triton import scan_triton, warn_once, why_not

__all__ = ["MEMORIES", "MemoryState", "ScanConfig", "ScanWeights", "initial_state", "scan"]


def scan(
    x: Tensor,
    q: Tensor,
    weights: ScanWeights,
    config: ScanConfig,
    state: MemoryState | None = None,
    reset: Tensor | None = None,
    validate_reset: bool = True,
) -> tuple[Tensor, MemoryState]:
    """Run the memories over a sequence: read each token's answer, write its key and value.

    x, q: [B, N, T, d], the inputs of the projections and the normalised queries (with six
        memories q is the input of M_q instead), float32, float64 or bfloat16.
    weights: the initial memories and read-out vectors; state: the memories to go on from
        (default: the weights), as returned by an earlier call that ended on a projection chunk.
    reset: bool [B, T], true where row b starts again from the weights; only at multiples of
        config.projection_chunk (on a CUDA device asserted there, where nothing waits for it).
        validate_reset=False skips that check (it is also skipped under torch.compile).
    Returns out [B, N, T, d] in x's dtype, and the state after T tokens (float32, or float64 for
    float64 x). Gradients flow to x, q, weights and state from both. The first token is at a chunk
    boundary; T need not be a multiple of a chunk.

    Raises ValueError, in one line, for inputs that do not fit together, and for forward-mode
    derivatives of anything but the reference.
    """
    check_inputs(x, q, weights, state, reset)
    if reset is not None and validate_reset and not torch.compiler.is_compiling():
        check_reset(reset, config.projection_chunk)
    # Autocast would turn the matmuls of the fast weights into low-precision ones.
    with no_autocast(x):
        kind = chosen(x, weights.w1.shape[3], config)
        if kind == "reference":
            return scan_reference(x, q, weights, config, state, reset)
        if carries_tangent(x, q, *weights, *(state or ())):
            raise ValueError("scan: forward mode is implementation=reference's alone; take that")
        if kind in ("cuda", "triton"):
            return scan_triton(x, q, weights, config, state, reset, on_chip=kind == "cuda")
        if kind == "native":
            return scan_native(x, q, weights, config, state, reset)
        return scan_chunked(x, q, weights, config, state, reset)


def chosen(x: Tensor, hidden: int, config: ScanConfig) -> ScanImplementation:
    """What runs a call on activations x [B, N, T, d] and memories of that hidden width: what
    config.implementation names, or with "auto" the fastest that takes it on x's device. Where that
    is only "chunked", the reason is said once.

    Raises ValueError, in one line, for what is named and does not take it.
    """
    asked = config.implementation
    if asked in ("reference", "chunked"):
        return asked
    reason, instead_of = "", ""
    if asked == "cuda" or (asked == "auto" and x.is_cuda):
        sizes = SIZES if asked == "cuda" else TRIED
        reason, instead_of = cuda_device.why_not(x, hidden, config.memory_chunk, sizes), "cuda"
        if not reason:
            return "cuda"
    if asked == "triton" or (asked == "auto" and x.is_cuda):
        reason, instead_of = why_not(x, hidden, config), "triton"
        if not reason:
            return "triton"
    if asked == "native" or (asked == "auto" and x.is_cpu):
        reason, instead_of = why_not_native(x), "native"
        if not reason:
            return "native"
    if asked != "auto":
        raise ValueError(
            f"scan: implementation={asked} can't be used: {reason}; take auto or chunked"
        )
    if reason and not torch.compiler.is_compiling():
        warn_once(reason, instead_of)
    return "chunked"
