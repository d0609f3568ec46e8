"""The scan in Triton kernels: operators for autograd and compilers; the kernels are launched by
`hope.scan.launch`.

Why these kernels: the states of the memories fit neither a processor's registers nor its shared
memory, but those that are being worked on stay in the L2 cache. So a program is a memory of a row
and head for one projection chunk, or M_mem for a segment of `checkpoint_chunks` of them, and takes
the hidden width in tiles. A chunk's long chain of products and element-wise operators is three
launches forward: reading k, v, eta and alpha out of their memories, what these share (decays, keys
with keys), and writing them. One state is kept for each segment, and one for each block while
backward works on a segment.

Neither this module nor `import hope` imports triton; the first call does.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hope.scan.contract import MemoryState, ScanConfig, ScanWeights
from hope.scan.operators import (
    config_of,
    differentiate,
    empty_results,
    num_saved,
    scan_by,
    state_of,
)
from hope.triton import why_no_kernels

HEAD_WIDTHS = (64, 96, 128)
"""Heads of 96 are run as heads of 128 whose last features are zero, which changes nothing else."""
EXPANSIONS = (1, 2, 4)
"""Hidden widths of the memories that are compiled, in widths of the head."""

SHARED_BYTES = {
    (64, torch.bfloat16): 92_160,
    (64, torch.float32): 114_688,
    (128, torch.bfloat16): 161_792,
    (128, torch.float32): 221_184,
}
"""Shared memory that a program of the largest kernel has, by the width it is run for and the
activations' dtype (`python -m tools.compile_kernels`)."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def shared_memory(device: int | None) -> int:
    """Bytes of shared memory that a program may have on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 232_448))


def why_not(x: Tensor, hidden: int, config: ScanConfig) -> str:
    """Why the kernels can't take a call on activations x [B, N, T, d] and memories of that hidden
    width, as a clause; empty if they can."""
    width = x.shape[3]
    if reason := why_no_kernels(x):
        return reason
    if config.memory_chunk % 16:
        return f"memory_chunk is {config.memory_chunk}, not a multiple of 16"
    if x.is_cuda:
        if x.dtype == torch.float64:
            return "float64 is for the CPU"
        if width not in HEAD_WIDTHS:
            return f"heads are {width} wide, not 64, 96 or 128"
        if hidden not in [n * width for n in EXPANSIONS]:
            return f"memories of {width} x {hidden} are not among the sizes compiled"
        dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32
        needed, there = SHARED_BYTES[padded(width), dtype], shared_memory(x.device.index)
        if needed > there:
            return f"{needed:,} B of shared memory are needed and this device has {there:,}"
    return ""


def padded(size: int) -> int:
    """The width that the kernels run for one of `size`: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def warn_once(reason: str, instead_of: str = "triton") -> None:
    """Say once that "auto" takes the slower implementation, instead of which, and why."""
    warnings.warn(f"scan: chunked instead of {instead_of}: {reason}", stacklevel=4)


@torch.library.custom_op("hope::scan_triton", mutates_args=())
def _scan_triton(
    x: Tensor,
    q: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_eta: Tensor,
    b_eta: Tensor,
    w_alpha: Tensor,
    b_alpha: Tensor,
    state1: Tensor | None,
    state2: Tensor | None,
    reset: Tensor | None,
    memory_chunk: int,
    projection_chunk: int,
    eta_max: float,
    delta_rule: str,
    decay_to: str,
    read: str,
    checkpoint_chunks: int,
    on_chip: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final w1, final w2, Deltas between segments [S, M, G, 2, d, h]); see `Launcher`."""
    options = (memory_chunk, projection_chunk, eta_max, delta_rule, decay_to, read)
    config = config_of(*options, checkpoint_chunks)
    weights = [w1, w2, w_eta, b_eta, w_alpha, b_alpha]
    launcher = _launcher(on_chip)(config, x, q, weights, reset)
    out, _, _, saved = _empty_outputs(x, w1, config, save)
    state = state_of(state1, state2)
    with torch.cuda.device_of(x):
        delta = launcher.forward(state, out, saved)
    return out, *launcher.unpack(launcher.add_base(delta)), saved


def _launcher(on_chip: bool) -> Any:
    """What launches the kernels: Triton's, or those in CUDA C++ with the states on chip."""
    if on_chip:
        from hope.scan.cuda.launch import CudaLauncher

        return CudaLauncher
    from hope.scan.launch import Launcher

    return Launcher


def _empty_outputs(
    x: Tensor, w1: Tensor, config: ScanConfig, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, final1, final2 = empty_results(x, w1)
    memories, rows, heads, width, hidden = final1.shape
    saved = (num_saved(x, config, save), memories, rows * heads, 2, width, hidden)
    return out, final1, final2, final1.new_empty(saved)


@_scan_triton.register_fake
def _(x, q, w1, w2, w_eta, b_eta, w_alpha, b_alpha, state1, state2, reset, *options):  # type: ignore[no-untyped-def]
    return _empty_outputs(x, w1, config_of(*options[:-2]), options[-1])


@torch.library.custom_op("hope::scan_triton_backward", mutates_args=())
def _scan_triton_backward(
    d_out: Tensor | None,
    d_final1: Tensor | None,
    d_final2: Tensor | None,
    saved: Tensor,
    x: Tensor,
    q: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_eta: Tensor,
    b_eta: Tensor,
    w_alpha: Tensor,
    b_alpha: Tensor,
    state1: Tensor | None,
    state2: Tensor | None,
    reset: Tensor | None,
    memory_chunk: int,
    projection_chunk: int,
    eta_max: float,
    delta_rule: str,
    decay_to: str,
    read: str,
    checkpoint_chunks: int,
    on_chip: bool,
) -> list[Tensor]:
    """Gradients of x, q, the six weights and, if there was one, the incoming state."""
    options = (memory_chunk, projection_chunk, eta_max, delta_rule, decay_to, read)
    config = config_of(*options, checkpoint_chunks)
    weights = [w1, w2, w_eta, b_eta, w_alpha, b_alpha]
    launcher = _launcher(on_chip)(config, x, q, weights, reset)
    dx, dq = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, q))
    state = state_of(state1, state2)
    d_state = launcher.pack_gradient(d_final1, d_final2)
    d_out = torch.zeros_like(dx) if d_out is None else d_out.contiguous()
    with torch.cuda.device_of(x):
        d_base, d_readout, d_bias = launcher.backward(state, d_out, d_state, saved, dx, dq)
    states: list[Tensor] = []
    if state is None:
        d_base += d_state
    else:
        states = list(launcher.unpack(d_state))
    d_w1, d_w2 = (z.sum(1) for z in launcher.unpack(d_base))
    (d_w_eta, d_w_alpha), (d_b_eta, d_b_alpha) = (
        [part.view(launcher.rows, launcher.heads, *part.shape[1:]).sum(0) for part in z]
        for z in (d_readout, d_bias)
    )
    grads = (d_w1, d_w2, d_w_eta, d_b_eta, d_w_alpha, d_b_alpha)
    return [dx, dq, *(z.to(w.dtype) for z, w in zip(grads, weights, strict=True)), *states]


differentiate(_scan_triton, _scan_triton_backward, kept=1, name="Triton")


def scan_triton(
    x: Tensor,
    q: Tensor,
    weights: ScanWeights,
    config: ScanConfig,
    state: MemoryState | None = None,
    reset: Tensor | None = None,
    on_chip: bool = False,
) -> tuple[Tensor, MemoryState]:
    """The scan by kernels: on a CUDA device, or Triton's anywhere under TRITON_INTERPRET=1.

    on_chip: by those of `hope.scan.cuda`.

    Shapes as in `hope.scan.scan`; inputs are expected to have passed
    `hope.scan.contract.check_inputs` and `why_not` (of `hope.scan.cuda.device`). Differentiable
    once, in every tensor but reset.
    """
    width, hidden = weights.w1.shape[2:]
    more_d, more_h = padded(width) - width, padded(hidden) - hidden

    def wider(z: Tensor, last: int, before: int = 0) -> Tensor:
        return pad(z, (0, last, 0, before)) if last or before else z

    def wider_memories(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        return wider(w1, more_h, more_d), wider(w2, more_d, more_h)

    wide = ScanWeights(
        *wider_memories(weights.w1, weights.w2),
        wider(weights.w_eta, more_d),
        weights.b_eta,
        wider(weights.w_alpha, more_d),
        weights.b_alpha,
    )
    start = None if state is None else MemoryState(*wider_memories(*state))
    x, q = wider(x, more_d), wider(q, more_d)
    out, final = scan_by(_scan_triton, x, q, wide, config, start, reset, on_chip)
    if more_d or more_h:
        out = out[..., :width]
        final = MemoryState(final.w1[..., :width, :hidden], final.w2[..., :hidden, :width])
    return out, final
