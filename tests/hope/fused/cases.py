"""Where the fused kernels are tested: on a GPU in what runs train in, else in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hope.native.build import why_not

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
PRECISIONS = {
    dtype: TOLERANCES[dtype]
    for dtype in (torch.float32, torch.bfloat16 if ON_GPU else torch.float64)
}
"""Largest error in each dtype, relative to the largest value (Triton's interpreter computes
wrongly in bfloat16)."""

NO_NATIVE = "the device is a GPU" if ON_GPU else why_not()
native = pytest.mark.skipif(bool(NO_NATIVE), reason=f"no native kernels: {NO_NATIVE}")
KERNELS = ["triton", pytest.param("native", marks=native)]
"""What is ours."""
IN_DTYPES = [
    *((how, dtype) for how in ("torch", "triton") for dtype in PRECISIONS),
    *(
        pytest.param("native", dtype, marks=native)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ),
]
"""Every implementation in the dtypes that it computes rightly in here."""


def ramp_gradients(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """out, and the leaves' gradients of a sum of it that no symmetry makes small."""
    ramp = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    return [out, *torch.autograd.grad((out * ramp.view(out.shape).to(out.dtype)).sum(), leaves)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    expected = expected.detach().double().cpu()
    difference = (actual.detach().double().cpu() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-12))
