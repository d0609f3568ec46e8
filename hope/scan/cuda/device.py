"""Launching the CUDA kernels through the driver."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hope.scan.cuda.call import HIDDEN, SIZES, Options, arguments, shared_bytes
from hope.scan.cuda.nvrtc import compiled, library
from hope.scan.triton import HEAD_WIDTHS, padded
from hope.triton import why_no_kernels

_MOST_SHARED, _CARVEOUT, _LARGE_CLUSTERS = 8, 9, 14  # of CUfunction_attribute
_PORTABLE_CLUSTER = 8
Sizes = tuple[tuple[int, int], ...]


def why_not(x: Tensor, hidden: int, memory_chunk: int, sizes: Sizes = SIZES) -> str:
    """Why the kernels can't take a call on activations x [B, N, T, d] and memories of that hidden
    width, as a clause; empty if they can. sizes: memories that they may take."""
    if not x.is_cuda:
        return "x is on the CPU"
    if reason := why_no_kernels(x):
        return reason
    if x.dtype != torch.bfloat16:
        return f"activations are {str(x.dtype).removeprefix('torch.')}, not bfloat16"
    width = x.shape[3]
    if width not in HEAD_WIDTHS or (padded(width), padded(hidden)) not in sizes:
        taken = ", ".join(f"{one} x {other}" for one, other in sizes)
        return f"memories are {width} x {hidden}, not of {taken}"
    if memory_chunk % 16:
        return f"memory_chunk is {memory_chunk}, not a multiple of 16"
    return _why_not_on(x.device.index, padded(width), padded(hidden) // HIDDEN)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not_on(device: int | None, width: int, shards: int) -> str:
    """The same of a device, for heads of that width and memories of so many shards."""
    properties = torch.cuda.get_device_properties(device)
    needed = max(
        shared_bytes(kernel, Options(1, 32, 0, read, True, False, False, shards, width))
        for kernel in ("write_forward", "write_backward")
        for read in (0, 1)
    )
    there = int(getattr(properties, "shared_memory_per_block_optin", 0))
    if properties.major < 9:
        return f"the device ({properties.name}) is older than an H100: it has no clusters"
    if needed > there:
        return f"the device ({properties.name}) has {there:,} B of shared memory, not {needed:,}"
    nvrtc = library()
    return nvrtc if isinstance(nvrtc, str) else ""


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}")


@cache
def _module(device: int, options: Options) -> ctypes.c_void_p:
    """The kernels of some options, loaded into a device's context, which is current."""
    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(options.defines(), f"sm_{major}{minor}")
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code))
    return module


@cache
def _kernel(device: int, options: Options, name: str) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    module = _module(device, options)
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    attributes = [(_MOST_SHARED, shared_bytes(name, options)), (_CARVEOUT, 100)]
    if options.cluster > _PORTABLE_CLUSTER:
        attributes.append((_LARGE_CLUSTERS, 1))
    for attribute, value in attributes:
        _check(_driver().cuFuncSetAttribute(function, attribute, value))
    return function


def launch(name: str, options: Options, grid: tuple[int, int], given: dict[str, Any]) -> None:
    """Run a kernel on the current stream of the device that x is on, a program for each of `grid`;
    given: tensors and numbers by the names of `Call` in program.h."""
    device = given["x"].device.index
    told = arguments(given)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(told))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    function = _kernel(device, options, name)
    shared = shared_bytes(name, options)
    _check(
        _driver().cuLaunchKernel(
            function, *grid, 1, options.threads, 1, 1, shared, stream, parameters, None
        )
    )
