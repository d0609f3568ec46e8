"""The scan on a CPU in C++: a row and head at a time, its memories in the caches of one core.

`vectors.h` has products and element-wise functions, `memory.h` what lies where; `frame.h`,
`projections.h`, `reads.h`, `writes.h` and `writes_backward.h` are a block and its derivative, which
the Python files of those names have for whole tensors; `head.h` is a row and head, `scan.cpp` the
way through a sequence. `call.py` hands tensors over, `operators.py` registers the result with
torch, `flops.py` counts its products.
"""
