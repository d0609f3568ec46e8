"""The scan's kernels in CUDA C++ with the states on chip, in bfloat16, for the heads and hidden
layers of `call.SIZES`: what they are compiled for and told (`call.py`), the order of launches
(`launch.py`), their compiler (`nvrtc.py`) and the driver (`device.py`). None of Triton's runs
beside them."""
