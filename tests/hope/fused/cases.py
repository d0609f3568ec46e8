"""Where the fused kernels are tested: on a GPU in what runs train in, else in the interpreter."""

from __future__ import annotations

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
PRECISIONS = (
    {torch.float32: 1e-5, torch.bfloat16: 1e-2}
    if ON_GPU
    else {torch.float64: 1e-12, torch.float32: 1e-5}
)
"""Largest error in each dtype, relative to the largest value (Triton's interpreter computes
wrongly in bfloat16)."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    expected = expected.detach().double().cpu()
    difference = (actual.detach().double().cpu() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-12))
