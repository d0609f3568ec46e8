"""What computes the operators of this folder: C++ on a CPU, Triton's kernels on a CUDA device, or
torch's operators."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hope.forward_mode import needs_torch
from hope.fused.native.call import DTYPES
from hope.native.build import why_not
from hope.triton import takes_kernels

Implementation = Literal["auto", "torch", "triton", "native"]
Kind = Literal["torch", "triton", "native"]


def chosen(x: Tensor, implementation: Implementation, *others: Tensor | None) -> Kind:
    """What runs on x: what is named; with "auto" Triton's kernels on CUDA devices, C++ on a CPU
    where it could be compiled, and on the meta device, torch's operators elsewhere, and where x or
    one of `others` is differentiated in forward mode.

    Raises ValueError, in one line, for what is named and can't run on x.
    """
    if needs_torch(implementation, x, *others):
        return "torch"
    if implementation == "native" or (implementation == "auto" and not x.is_cuda):
        reason = _why_not_native(x)
        if not reason:
            return "native"
        if implementation == "native":
            raise ValueError(f"implementation=native can't be used: {reason}; take auto")
        return "torch"
    return "triton" if takes_kernels(x, implementation) else "torch"


def _why_not_native(x: Tensor) -> str:
    """Why the C++ kernels can't run on x, as a clause; empty if they can."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if x.is_meta:
        return ""
    return why_not() if x.is_cpu else f"x is on {x.device}, not on a CPU"


def precise(weight: Tensor, x: Tensor) -> Tensor:
    """A weight in the dtype that kernels on x compute in: float32, float64 for float64."""
    return weight.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def check(x: Tensor, **others: tuple[Tensor | None, str, tuple[int, ...]]) -> None:
    """Raise ValueError, in one line, for a tensor that does not fit x, which kernels would read
    beyond its end. others: by name the tensor, its axes in words, the shape that it must have.
    """
    for name, (tensor, axes, shape) in others.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {axes} = {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but what it goes with on {x.device}")
