"""The scan's kernels in CUDA C++ with the states on chip, for heads and hidden layers of 64 in
bfloat16: what they are compiled for and told (`call.py`), the order of launches (`launch.py`),
their compiler (`nvrtc.py`) and the driver (`device.py`). None of Triton's runs beside them."""
