"""Without a GPU, Triton's kernels run in its interpreter: said here, before anything imports it,
because it looks once."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
