"""Compile our C++ for this machine, once, and load it.

What is compiled is kept in `$XDG_CACHE_HOME/hope` (by default `~/.cache/hope`) under a name that
tells sources, flags and processor apart, so that machines may share the folder and nothing stale
is ever loaded. A build that is killed leaves nothing behind that counts; processes that start
together wait for one of them to compile.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

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
_UNFINISHED = ".compiling-"


@cache
def load(*more_flags: str) -> ctypes.CDLL | str:
    """The library, or in a clause why there is none: no compiler, or what it said."""
    if platform.system() == "Windows":
        return "it is not made for Windows"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _NAMES), "")
    if not shutil.which(compiler):
        return f"there is no C++ compiler ({compiler or ', '.join(_NAMES)})"
    files = [path for folder in _FOLDERS for path in sorted((_HOPE / folder).glob("*.[ch]*"))]
    sources = [path for path in files if path.suffix == ".cpp"]
    processor = _PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ())
    flags = (*_FLAGS, *processor, *more_flags)
    told = repr((flags, platform.machine(), platform.system())).encode()
    contents = b"\0".join([told, *(path.read_bytes() for path in files)])
    key = hashlib.sha256(contents).hexdigest()[:16]
    try:
        return _load_or_compile(compiler, flags, sources, f"hope-{key}.so")
    except (OSError, RuntimeError) as error:
        return f"it could not be compiled: {error}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not() -> str:
    """Why the library can't be used on this machine, as a clause; empty if it can."""
    found = load()
    return found if isinstance(found, str) else ""


def _load_or_compile(
    compiler: str, flags: tuple[str, ...], sources: list[Path], name: str
) -> ctypes.CDLL:
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "hope"
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / name
        with _one_at_a_time(folder / "lock"):
            for killed in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(killed, ignore_errors=True)
            if not kept.exists():
                _compile(compiler, flags, sources, kept)
            try:
                return ctypes.CDLL(str(kept))
            except OSError:  # damaged
                _compile(compiler, flags, sources, kept)
                return ctypes.CDLL(str(kept))
    except (OSError, RuntimeError) as error:
        # No home, a read-only or a full one: for this process alone.
        with tempfile.TemporaryDirectory(prefix="hope-") as alone:
            try:
                _compile(compiler, flags, sources, Path(alone) / name)
            except RuntimeError:
                raise error from None
            return ctypes.CDLL(str(Path(alone) / name))


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process that holds it."""
    import fcntl  # not on Windows, where nobody gets here

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, flags: tuple[str, ...], sources: list[Path], target: Path) -> None:
    """Compile `sources` into a file beside `target` and rename it; RuntimeError with the first
    line of what the compiler said."""
    said = ""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNFINISHED) as folder:
        made = Path(folder) / "made.so"
        for threads in ((_THREADS,), ()):
            command = [compiler, *flags, *threads, *map(str, sources), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if result.returncode == 0:
                os.replace(made, target)
                return
            said = next(iter(result.stderr.strip().splitlines()), f"status {result.returncode}")
    raise RuntimeError(f"{compiler}: {said}")
