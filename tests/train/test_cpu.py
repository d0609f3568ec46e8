"""Process-wide settings for computing on a CPU, in a process of their own."""

import subprocess
import sys

SCRIPT = """
import torch
from train.cpu import prepare_cpu

def kept():
    "Does a block that was freed come back at the same place, still holding what it held?"
    block = torch.full((1 << 22,), 7.0)
    where = block.data_ptr()
    del block
    again = torch.empty(1 << 22)
    return again.data_ptr() == where and bool((again[1024:] == 7.0).all())

tiny = torch.full((16,), 1e-40)
before = bool((tiny * 1.0 != 0).all()), kept()
prepare_cpu()
kept()
print(*before, bool((tiny * 1.0 != 0).any()), kept())
"""


def test_denormals_are_zero_and_freed_memory_is_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    denormal, _, denormal_after, kept_after = done.stdout.split()
    assert (denormal, denormal_after) == ("True", "False")
    if sys.platform.startswith("linux"):
        assert kept_after == "True"
