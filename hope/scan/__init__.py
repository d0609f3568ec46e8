"""The self-modifying scan (Eqs. 83-91): sequence mixing by memories that rewrite themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from hope.scan.chunked import scan_chunked
from hope.scan.contract import (
    MEMORIES,
    Implementation,
    MemoryState,
    ScanConfig,
    ScanWeights,
    check_inputs,
    check_reset,
    initial_state,
    no_autocast,
)
from hope.scan.cuda import device as cuda_device
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

    Raises ValueError, in one line, for inputs that do not fit together.
    """
    check_inputs(x, q, weights, state, reset)
    if reset is not None and validate_reset and not torch.compiler.is_compiling():
        check_reset(reset, config.projection_chunk)
    # Autocast would turn the matmuls of the fast weights into low-precision ones.
    with no_autocast(x):
        if config.implementation == "reference":
            return scan_reference(x, q, weights, config, state, reset)
        hidden = weights.w1.shape[3]
        if _asked_for(config, "triton", x.is_cuda) and _usable(
            config, "triton", why_not(x, hidden, config)
        ):
            return scan_triton(x, q, weights, config, state, reset)
        if config.implementation == "cuda" and _usable(
            config, "cuda", cuda_device.why_not(x, hidden, config.memory_chunk)
        ):
            return scan_triton(x, q, weights, config, state, reset)
        if _asked_for(config, "native", x.is_cpu) and _usable(config, "native", why_not_native(x)):
            return scan_native(x, q, weights, config, state, reset)
        return scan_chunked(x, q, weights, config, state, reset)


def _asked_for(config: ScanConfig, kind: Implementation, its_device: bool) -> bool:
    """Whether an implementation is named, or "auto" prefers it on this device."""
    return config.implementation == kind or (config.implementation == "auto" and its_device)


def _usable(config: ScanConfig, kind: Implementation, reason: str) -> bool:
    """Whether there is no reason against an implementation; ValueError where there is one against
    what is named, and with "auto" it is said once."""
    if reason and config.implementation == kind:
        raise ValueError(
            f"scan: implementation={kind} can't be used: {reason}; take auto or chunked"
        )
    if reason and not torch.compiler.is_compiling():
        warn_once(reason, kind)
    return not reason
