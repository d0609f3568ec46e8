"""The Titans mixer's output before its last product: RMSNorm of every head, gain, SiLU gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from hope.fused.choice import Implementation, check, chosen, precise
from hope.fused.native import call

ELEMENTS = 2048
"""Of a program's tile of tokens and features."""
PROGRAMS = 64
"""Programs a head in backward: as many partial sums of the gain's gradient are added up."""


def gated_rms_norm(
    read: Tensor,
    weight: Tensor,
    gate: Tensor,
    eps: float,
    implementation: Implementation = "auto",
) -> Tensor:
    """read / sqrt(mean(read^2) + eps) * weight * silu(gate), the mean over a head's features.

    read: [B, N, T, d], any strides; weight: [N, d]; gate: [B, T, N * d]. Returns [B, T, N * d] in
    the gate's dtype, by the kernels with statistics and all between in float32 (float64 for
    float64). Raises ValueError where the implementation that is named can't run, and for shapes
    that do not fit.
    """
    kind = chosen(read, implementation, weight, gate)
    batch, heads, length, width = read.shape
    check(
        read,
        weight=(weight, "[N, d]", (heads, width)),
        gate=(gate, "[B, T, N * d]", (batch, length, heads * width)),
    )
    if kind != "torch":
        return _gated_norm(read, weight, gate, eps, kind)
    normed = rms_norm(read, (read.shape[3],), eps=eps).transpose(1, 2)
    return (normed * weight).reshape(gate.shape).to(gate.dtype) * silu(gate)


@torch.library.custom_op("hope::gated_norm", mutates_args=())
def _gated_norm(read: Tensor, weight: Tensor, gate: Tensor, eps: float, kind: str) -> Tensor:
    if kind == "native":
        return call.gated_norm(read, weight, gate, eps)
    from hope.fused.kernels import gated_norm_forward

    read, gate = _rows_together(read), gate.contiguous()
    out = torch.empty_like(gate)
    sizes = _sizes(read)
    grid = (-(-sizes["rows"] // sizes["ROWS"]), sizes["heads"])
    with torch.cuda.device_of(read):
        gated_norm_forward[grid](read, precise(weight, read), gate, out, eps=eps, **sizes)
    return out


@_gated_norm.register_fake
def _(read, weight, gate, eps, kind):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("hope::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    d_out: Tensor, read: Tensor, weight: Tensor, gate: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of read, weight and gate."""
    if kind == "native":
        return call.gated_norm_backward(d_out, read, weight, gate, eps)
    from hope.fused.kernels import gated_norm_backward

    read, gate, d_out = _rows_together(read), gate.contiguous(), d_out.contiguous()
    gain = precise(weight, read)
    d_read = torch.empty_like(read, memory_format=torch.contiguous_format)
    d_gate = torch.empty_like(gate)
    sizes = _sizes(read)
    programs = min(PROGRAMS, -(-sizes["rows"] // sizes["ROWS"]))
    partial = gain.new_empty(programs, *weight.shape)
    with torch.cuda.device_of(read):
        gated_norm_backward[(programs, sizes["heads"])](
            read, gain, gate, d_out, d_read, partial, d_gate, eps=eps, **sizes
        )
    return d_read, partial.sum(0).to(weight.dtype), d_gate


@_gated_norm_backward.register_fake
def _(d_out, read, weight, gate, eps, kind):  # type: ignore[no-untyped-def]
    inputs = (read, weight, gate)
    return tuple(torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs)


def _rows_together(read: Tensor) -> Tensor:
    return read if read.stride(3) == 1 else read.contiguous()


def _sizes(read: Tensor) -> dict[str, int]:
    batch, heads, length, width = read.shape
    return {
        "rows": batch * length,
        "length": length,
        "heads": heads,
        "row_stride": read.stride(0),
        "head_stride": read.stride(1),
        "token_stride": read.stride(2),
        **tile(width),
    }


def tile(width: int) -> dict[str, int]:
    """The kernels' compile-time sizes for heads of that width."""
    features = 1 << (width - 1).bit_length()
    return {"D": width, "FEATURES": features, "ROWS": max(1, ELEMENTS // features)}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gated_norm_backward(d_out, *ctx.saved_tensors, ctx.eps, ctx.kind), None, None)


_gated_norm.register_autograd(_backward, setup_context=_setup_context)
