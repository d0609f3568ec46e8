"""NVRTC, the compiler that CUDA's libraries bring: CUDA C++ to PTX or machine code, once
(`hope/compile_cache.py`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.resources import files
from importlib.util import find_spec

import torch

from hope.compile_cache import kept_bytes, key

MAIN = "kernels.cu"
HEADERS = (
    "block.h", "copies.h", "products.h", "sums.h", "systems.h", "program.h", "projections.h",
    "writes.h", "reads_backward.h", "frozen_backward.h", "writes_backward.h",
)  # fmt: skip
NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_FLAGS = ("--std=c++17", "-default-device", "-lineinfo")
_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")


@cache
def library() -> ctypes.CDLL | str:
    """NVRTC, or in a clause why there is none."""
    found = find_spec("nvidia")
    for name in candidates((found.submodule_search_locations or ()) if found else ()):
        try:
            nvrtc = ctypes.CDLL(name)
        except OSError:
            continue
        _load_builtins(nvrtc, name)
        return nvrtc
    return f"there is no NVRTC ({', '.join(NAMES)}); it comes with torch for CUDA"


def _load_builtins(nvrtc: ctypes.CDLL, name: str) -> None:
    """NVRTC 13 opens its other half by name and does not look beside itself; torch loads that half
    too, but where there are packages of two CUDAs, of one only."""
    folder = name.rpartition("/")[0]
    if folder:
        with suppress(OSError):
            ctypes.CDLL(f"{folder}/libnvrtc-builtins.so.{'.'.join(_version(nvrtc))}")


def candidates(packages: Iterable[str]) -> Iterator[str]:
    """By each name where torch has loaded it from, then in the packages that hold it. Of torch's
    own CUDA first: a driver that torch can use may not load what a newer compiler makes."""
    own = (torch.version.cuda or "").partition(".")[0]
    for name in sorted(NAMES, key=lambda name: not name.endswith(f".{own}")):
        yield name
        yield from (f"{base}/{folder}/{name}" for base in packages for folder in _FOLDERS)


def compiled(defines: list[str], architecture: str = "sm_90") -> bytes:
    """The kernels with those definitions: machine code for a device (`sm_90`), or PTX for a kind of
    them (`compute_90`).

    Raises RuntimeError with what the compiler said.
    """
    nvrtc = library()
    if isinstance(nvrtc, str):
        raise RuntimeError(nvrtc)
    here = files(__package__)
    sources = [here.joinpath(name).read_bytes() for name in (MAIN, *HEADERS)]
    flags = [f"--gpu-architecture={architecture}", *_FLAGS, *defines]
    name = f"cuda-{architecture}-{key([*flags, *_version(nvrtc)], sources)}"
    return kept_bytes(name, lambda: _compile(nvrtc, flags, sources))


def _version(nvrtc: ctypes.CDLL) -> tuple[str, ...]:
    numbers = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(*map(ctypes.byref, numbers))
    return tuple(str(number.value) for number in numbers)


def _compile(nvrtc: ctypes.CDLL, flags: list[str], sources: list[bytes]) -> bytes:
    program = ctypes.c_void_p()
    headers = (ctypes.c_char_p * len(HEADERS))(*sources[1:])
    names = (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS))
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), sources[0], MAIN.encode(), len(HEADERS), headers, names
    )
    if status:
        raise RuntimeError(f"NVRTC: status {status}")
    try:
        told = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if nvrtc.nvrtcCompileProgram(program, len(flags), told):
            raise RuntimeError(_part(nvrtc, program, "ProgramLog").decode().strip("\0\n"))
        if "=sm_" in flags[0]:
            return _part(nvrtc, program, "CUBIN")
        return _part(nvrtc, program, "PTX").rstrip(b"\0")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _part(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    """What a program has of that name."""
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{name}")(program, text)
    return text.raw
