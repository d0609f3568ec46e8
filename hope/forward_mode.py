"""Operators of ours have derivatives in reverse mode only; of forward mode's torch takes their
derivative for zero, without a word."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def carries_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is differentiated in forward mode (`torch.func.jvp`,
    `torch.autograd.forward_ad`). Compilers don't trace that."""
    if torch.compiler.is_compiling():
        return False
    return any(z is not None and unpack_dual(z).tangent is not None for z in tensors)


def needs_torch(implementation: str, *tensors: Tensor | None) -> bool:
    """Whether torch's own operators have to compute, for one of the tensors carries a tangent.

    Raises ValueError, in one line, where another implementation is named than those or "auto".
    """
    if implementation == "torch" or not carries_tangent(*tensors):
        return False
    if implementation != "auto":
        raise ValueError(f"implementation={implementation} has no forward mode; take auto")
    return True
