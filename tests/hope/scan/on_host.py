"""The CUDA kernels as the plain loops that their source is where there is no device: in float64, to
round-off, or with operands rounded to bfloat16 as products on a device take them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hope.scan.cuda.call import Options, arguments
from hope.scan.cuda.nvrtc import MAIN

COMPILER = shutil.which(os.environ.get("CXX") or "c++") or ""
ROUNDED = ("-DREAL=float", "-DROUND")


@cache
def library(options: Options, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The kernels of some options as functions."""
    source = str(files("hope.scan.cuda").joinpath(MAIN))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.so"
        subprocess.run(
            [COMPILER, "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread",
             *options.defines(), *flags, source, "-o", str(made)],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(made))


def launch(
    flags: tuple[str, ...],
    name: str,
    options: Options,
    grid: tuple[int, int],
    given: dict[str, Any],
) -> None:
    """In place of `hope.scan.cuda.device.launch`."""
    told = arguments(given)
    assert told.count == grid[0]
    getattr(library(options, flags), name)(ctypes.byref(told), ctypes.c_int(grid[1]))


@contextmanager
def on_host(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """`implementation: cuda` takes tensors on the CPU, of that dtype, while this is open."""
    flags = ROUNDED if dtype == torch.bfloat16 else ()
    with (
        patch("hope.scan.cuda.device.why_not", lambda *call: ""),
        patch("hope.scan.cuda.device.launch", partial(launch, flags)),
    ):
        yield
