"""What is bound by memory around the products, each in one pass: Triton kernels on CUDA devices,
torch's operators elsewhere (`hope.triton` decides)."""

from hope.fused.gated_norm import gated_rms_norm
from hope.fused.loss import cross_entropy, logits_gradient, row_statistics

__all__ = ["cross_entropy", "gated_rms_norm", "logits_gradient", "row_statistics"]
