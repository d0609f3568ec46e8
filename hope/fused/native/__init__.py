"""What surrounds the scan, in C++ on the CPU: `convolution.h`, `gated_norm.h`, each forward and
backward in one pass over its tensors; `rows.h` is what they share, `fused.cpp` what the library
exports, `call.py` hands tensors over."""
