"""What is bound by memory around the products, each in one pass: Triton kernels on CUDA devices,
C++ on a CPU (`native/`, not the loss), torch's operators elsewhere (`choice.py` decides)."""

from hope.fused.choice import Implementation
from hope.fused.convolution import causal_convolution
from hope.fused.gated_norm import gated_rms_norm
from hope.fused.loss import cross_entropy, logits_gradient, row_statistics

__all__ = [
    "Implementation",
    "causal_convolution",
    "cross_entropy",
    "gated_rms_norm",
    "logits_gradient",
    "row_statistics",
]
