"""What a process that computes on a CPU sets once, before it begins."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_HEAP_BLOCK = 32 << 20
"""The largest allocation that glibc lets come from its heap."""


def prepare_cpu() -> None:
    """Denormal numbers count as zero, and freed memory is kept for the next tensors.

    Decayed fast weights go denormal, which slows products many times. glibc gives large blocks
    back to the system when they are freed; touching them anew, page by page, costs more than the
    arithmetic on them. On another C library only the first is done.
    """
    torch.set_flush_denormal(True)
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
