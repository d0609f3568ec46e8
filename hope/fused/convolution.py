"""Causal depthwise convolution within documents (section 2: conv4), in one pass each way.

torch's own depthwise convolution knows no documents, and its shifted products read and write every
value once for each tap, twice as often in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope.fused.choice import Implementation, check, chosen, precise
from hope.fused.native import call

ROWS, COLUMNS = 16, 128
"""Tokens and channels of a program's tile."""
PROGRAMS = 128
"""Programs for some channels in backward: as many partial sums of the taps' gradients are added."""


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None = None,
    document_starts: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """y_t = sum_j weight[width - 1 - j] * x_{t-j}, over the x of the same document only.

    x: [B, T, channels]; weight: [width, channels]; tail: the width - 1 inputs before x, [B,
    width - 1, channels], zeros if None; document_starts: bool [B, T] or None. Returns [B, T,
    channels] in x's dtype, summed in float32 (float64 for float64) by the kernels. Raises
    ValueError where the implementation that is named can't run, and for shapes that do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, channels], got {list(x.shape)}")
    kind = chosen(x, implementation, weight, tail)
    width = weight.shape[0]
    rows, tokens, channels = x.shape
    check(
        x,
        weight=(weight, "[width, channels]", (width, channels)),
        tail=(tail, "[B, width - 1, channels]", (rows, width - 1, channels)),
        document_starts=(document_starts, "[B, T]", (rows, tokens)),
    )
    if document_starts is not None and document_starts.dtype != torch.bool:
        raise ValueError(f"document_starts must be bool, got {document_starts.dtype}")
    reach = None if document_starts is None else _reach(document_starts, width - 1)
    if kind != "torch":
        return _convolve(x, weight, tail, reach, kind)
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
    extended = torch.cat([before, x], dim=1)
    weight = weight.to(x.dtype)
    y = x * weight[width - 1]
    for back in range(1, width):
        past = extended[:, width - 1 - back : extended.shape[1] - back]
        if reach is not None:
            past = past.where((reach >= back).unsqueeze(-1), 0)
        y = y + past * weight[width - 1 - back]
    return y


def _reach(document_starts: Tensor, most: int) -> Tensor:
    """How many tokens before each are of its document, at most `most`: int32 [B, T]. Those before
    the sequence go on in its first document."""
    position = torch.arange(document_starts.shape[1], device=document_starts.device)
    start = torch.where(document_starts, position, -most).cummax(1).values
    return (position - start).clamp(max=most).to(torch.int32)


@torch.library.custom_op("hope::causal_convolution", mutates_args=())
def _convolve(
    x: Tensor, weight: Tensor, tail: Tensor | None, reach: Tensor | None, kind: str
) -> Tensor:
    if kind == "native":
        return call.convolve(x, weight, tail, reach)
    from hope.fused.kernels import convolve_forward

    x, tail, sizes = _sizes(x, weight, tail, reach)
    out = torch.empty_like(x)
    rows, tokens, channels = x.shape
    grid = (-(-tokens // ROWS), -(-channels // COLUMNS), rows)
    with torch.cuda.device_of(x):
        convolve_forward[grid](x, precise(weight, x), _or(tail, x), _or(reach, x), out, **sizes)
    return out


@_convolve.register_fake
def _(x, weight, tail, reach, kind):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hope::causal_convolution_backward", mutates_args=())
def _convolve_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None,
    reach: Tensor | None,
    kind: str,
) -> list[Tensor]:
    """Gradients of x, weight and, where there is one, tail."""
    if kind == "native":
        return call.convolve_backward(d_out, x, weight, tail, reach)
    from hope.fused.kernels import convolve_backward

    given = tail
    x, tail, sizes = _sizes(x, weight, tail, reach)
    dx, d_out = torch.empty_like(x), d_out.contiguous()
    d_tail = None if tail is None else torch.empty_like(tail)
    rows, tokens, channels = x.shape
    before = 0 if tail is None else tail.shape[1]
    programs = min(PROGRAMS, rows * -(-(tokens + before) // ROWS))
    taps = precise(weight, x)
    partial = taps.new_empty(programs, *weight.shape)
    with torch.cuda.device_of(x):
        convolve_backward[(programs, -(-channels // COLUMNS))](
            x, taps, _or(tail, x), _or(reach, x), d_out, dx, partial, _or(d_tail, x), rows,
            TAPS=1 << (weight.shape[0] - 1).bit_length(), **sizes,
        )  # fmt: skip
    made = [dx, partial.sum(0).to(weight.dtype)]
    return made if d_tail is None or given is None else [*made, d_tail.to(given.dtype)]


@_convolve_backward.register_fake
def _(d_out, x, weight, tail, reach, kind):  # type: ignore[no-untyped-def]
    like = [z for z in (x, weight, tail) if z is not None]
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in like]


def _or(tensor: Tensor | None, x: Tensor) -> Tensor:
    """x in the place of a tensor that is not there, which no kernel looks at."""
    return x if tensor is None else tensor


def _sizes(
    x: Tensor, weight: Tensor, tail: Tensor | None, reach: Tensor | None
) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    """x and tail as the kernels take them, and their sizes."""
    sizes = {
        "tokens": x.shape[1],
        "channels": x.shape[2],
        "WIDTH": weight.shape[0],
        "TAIL": tail is not None,
        "REACH": reach is not None,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }
    tail = None if tail is None else tail.to(x.dtype).contiguous()
    return x.contiguous(), tail, sizes


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, tail, reach = ctx.saved_tensors
    dx, d_weight, *d_tail = _convolve_backward(d_out, x, weight, tail, reach, ctx.kind)
    return dx, d_weight, d_tail[0] if d_tail else None, None, None


_convolve.register_autograd(_backward, setup_context=_setup_context)
