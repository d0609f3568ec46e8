"""Calls of the C++ kernels on torch's tensors: float32, float64 and bfloat16, computed in float32
or float64. Shapes as in `hope.fused.gated_norm` and `hope.fused.convolution`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hope.native.build import load

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
BLOCK = 256
"""Tokens of a task, as in rows.h; each has its own sum for the gradient of a weight."""
_ALONE = 1 << 15
"""Numbers for which one thread is faster than several that wait for each other."""


class _Convolution(ctypes.Structure):
    """`Convolution` of convolution.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "channels", "width", "threads")),
        *((name, ctypes.c_void_p) for name in (
            "x", "weight", "tail", "reach", "d_out", "out", "dx", "d_weight", "d_tail",
        )),
    ]  # fmt: skip


class _GatedNorm(ctypes.Structure):
    """`GatedNorm` of gated_norm.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "rows", "heads", "tokens", "features", "threads",
            "row_stride", "head_stride", "token_stride",
        )),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (
            "read", "weight", "gate", "d_out", "out", "d_read", "d_weight", "d_gate",
        )),
    ]  # fmt: skip


def _run(kernel: str, call: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
    """Call the library with tensors that have the structure's layout."""
    library = load()
    assert isinstance(library, ctypes.CDLL)
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    library[f"hope_{kernel}"](ctypes.byref(call))


def _threads(elements: int) -> int:
    return 1 if elements <= _ALONE else torch.get_num_threads()


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def convolve(x: Tensor, weight: Tensor, tail: Tensor | None, reach: Tensor | None) -> Tensor:
    """The convolution of x, in its dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call, tensors = _convolution(x, weight, tail, reach)
    _run(f"convolve_{DTYPES[x.dtype]}", call, tensors | {"out": out})
    return out


def convolve_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, tail: Tensor | None, reach: Tensor | None
) -> list[Tensor]:
    """Gradients of x, weight and, where there is one, tail."""
    call, tensors = _convolution(x, weight, tail, reach)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs = x.shape[1] if tail is None else x.shape[1] + tail.shape[1]
    parts = x.new_empty((x.shape[0] * _blocks(inputs), *weight.shape), dtype=_computed(x.dtype))
    d_tail = None if tail is None else torch.empty_like(tail, dtype=x.dtype).contiguous()
    tensors |= {"d_out": d_out.to(x.dtype).contiguous()}
    tensors |= {"dx": dx, "d_weight": parts, "d_tail": d_tail}
    _run(f"convolve_backward_{DTYPES[x.dtype]}", call, tensors)
    made = [dx, parts.sum(0).to(weight.dtype)]
    return made if d_tail is None or tail is None else [*made, d_tail.to(tail.dtype)]


def _convolution(
    x: Tensor, weight: Tensor, tail: Tensor | None, reach: Tensor | None
) -> tuple[_Convolution, dict[str, Tensor | None]]:
    rows, tokens, channels = x.shape
    call = _Convolution(rows, tokens, channels, weight.shape[0], _threads(x.numel()))
    return call, {
        "x": x.contiguous(),
        "weight": weight.to(_computed(x.dtype)).contiguous(),
        "tail": None if tail is None else tail.to(x.dtype).contiguous(),
        "reach": None if reach is None else reach.contiguous(),
    }


def gated_norm(read: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """RMSNorm, gain and gate, in the gate's dtype."""
    call, tensors, dtype = _gated_norm(read, weight, gate, eps)
    out = torch.empty_like(gate, dtype=dtype, memory_format=torch.contiguous_format)
    _run(f"gated_norm_{DTYPES[dtype]}", call, tensors | {"out": out})
    return out.to(gate.dtype)


def gated_norm_backward(
    d_out: Tensor, read: Tensor, weight: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of read, weight and gate."""
    call, tensors, dtype = _gated_norm(read, weight, gate, eps)
    d_read = torch.empty_like(read, dtype=dtype, memory_format=torch.contiguous_format)
    d_gate = torch.empty_like(gate, dtype=dtype, memory_format=torch.contiguous_format)
    blocks = read.shape[0] * _blocks(read.shape[2])
    parts = read.new_empty((blocks, *weight.shape), dtype=_computed(dtype))
    tensors |= {"d_out": d_out.to(dtype).contiguous()}
    tensors |= {"d_read": d_read, "d_weight": parts, "d_gate": d_gate}
    _run(f"gated_norm_backward_{DTYPES[dtype]}", call, tensors)
    return d_read.to(read.dtype), parts.sum(0).to(weight.dtype), d_gate.to(gate.dtype)


def _gated_norm(
    read: Tensor, weight: Tensor, gate: Tensor, eps: float
) -> tuple[_GatedNorm, dict[str, Tensor | None], torch.dtype]:
    """The call, its tensors, and the dtype of all but the weight."""
    dtype = torch.promote_types(read.dtype, gate.dtype)
    rows, heads, tokens, features = read.shape
    read = read.to(dtype)
    read = read if read.stride(3) == 1 else read.contiguous()
    call = _GatedNorm(
        rows, heads, tokens, features, _threads(read.numel()), *read.stride()[:3], eps
    )
    tensors: dict[str, Tensor | None] = {
        "read": read,
        "weight": weight.to(_computed(dtype)).contiguous(),
        "gate": gate.to(dtype).contiguous(),
    }
    return call, tensors, dtype
