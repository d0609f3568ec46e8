"""The scan's kernels that write memories, in CUDA C++ with the states on chip: `hope.scan.kernels.
writes` and `writes_backward` for heads and hidden layers of 64 in bfloat16 (`call.py`), compiled on
the device's machine when they are first launched (`device.py`). All other launches are Triton's."""
