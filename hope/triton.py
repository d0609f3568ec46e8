"""Where Triton's kernels can run, asked before any of them is imported: `import hope` needs no
triton."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

TorchOrTriton = Literal["auto", "torch", "triton"]
"""Of what has a fused kernel: torch's operators, the kernel, or the kernel on CUDA devices."""
_AVAILABLE = find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    import triton

    return not isinstance(triton.language.sigmoid, triton.JITFunction)


def why_no_kernels(x: Tensor) -> str:
    """Why Triton's kernels can't run on x, as a clause; empty if they can."""
    if not _AVAILABLE:
        return "triton is not installed"
    if x.is_cuda:
        return ""
    if not is_interpreted():
        return "x is on the CPU, where kernels run under TRITON_INTERPRET=1 only"
    if x.dtype == torch.bfloat16:
        return "Triton's interpreter computes wrongly in bfloat16"
    return ""


def takes_kernels(x: Tensor, implementation: TorchOrTriton) -> bool:
    """Whether a fused kernel runs on x: with "auto" on CUDA devices, with "triton" always.

    Raises ValueError with "triton" where it can't.
    """
    if implementation == "torch" or (implementation == "auto" and not x.is_cuda):
        return False
    reason = why_no_kernels(x)
    if reason and implementation == "triton":
        raise ValueError(f"implementation=triton can't be used: {reason}; take auto")
    return not reason
