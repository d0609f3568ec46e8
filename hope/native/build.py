"""Compile our C++ for this machine, once (`hope/compile_cache.py`), and load it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from hope.compile_cache import kept, key

_HOPE = Path(__file__).parents[1]
_FOLDERS = ("native", "scan/native", "fused/native")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_PROCESSOR = {
    "AVX2": ("-mavx2", "-mfma", "-mbmi2"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mbmi2"),
}
"""Flags by what torch finds in the processor; its baseline is all that others are asked for."""
_THREADS = "-fopenmp"
"""Compilers that lack it make a library that runs on one thread."""
_NAMES = ("c++", "g++", "clang++")


@cache
def load(*more_flags: str) -> ctypes.CDLL | str:
    """The library, or in a clause why there is none: no compiler, or what it said."""
    if platform.system() == "Windows":
        return "it is not made for Windows"
    named = os.environ.get("CXX") or next(filter(shutil.which, _NAMES), "")
    compiler = [named] if shutil.which(named) else named.split()  # as in `ccache g++`
    if not compiler or not shutil.which(compiler[0]):
        return f"there is no C++ compiler ({named or ', '.join(_NAMES)})"
    files = [path for folder in _FOLDERS for path in sorted((_HOPE / folder).glob("*.[ch]*"))]
    sources = [path for path in files if path.suffix == ".cpp"]
    processor = _PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ())
    flags = (*_FLAGS, *processor, *more_flags)
    target = (platform.machine(), platform.system())
    name = f"hope-{key(flags + target, (path.read_bytes() for path in files))}.so"
    try:
        return kept(
            name,
            lambda made: _compile(compiler, flags, sources, made),
            lambda made: ctypes.CDLL(str(made)),
        )
    except (OSError, RuntimeError) as error:
        return f"it could not be compiled: {error}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not() -> str:
    """Why the library can't be used on this machine, as a clause; empty if it can."""
    found = load()
    return found if isinstance(found, str) else ""


def _compile(compiler: list[str], flags: tuple[str, ...], sources: list[Path], made: Path) -> None:
    """Compile `sources` into the file `made`; RuntimeError with the first line of what the
    compiler said."""
    said = ""
    for threads in ((_THREADS,), ()):
        command = [*compiler, *flags, *threads, *map(str, sources), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode == 0:
            return
        said = next(iter(result.stderr.strip().splitlines()), f"status {result.returncode}")
    raise RuntimeError(f"{' '.join(compiler)}: {said}")
