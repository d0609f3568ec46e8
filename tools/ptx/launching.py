"""Launches on the machine: `with emulated() as launches:` and every kernel on CPU tensors, Triton's
kernel[grid](...) and those of `hope.scan.cuda`, is compiled for sm_90 and run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hope.scan.cuda.call import Options, arguments, shared_bytes
from hope.scan.cuda.nvrtc import compiled
from tools.ptx.machine import Machine
from tools.ptx.memory import GlobalMemory
from tools.ptx.parsing import parse

TARGET = GPUTarget("cuda", 90, 32)
TENSOR_TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*u8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


@dataclass
class Launches:
    """What ran: statements, counted once for programs that take them together, and seconds to
    compile and to run; machines that were made, by what makes a kernel another one."""

    statements: int = 0
    compiling: float = 0.0
    running: float = 0.0
    compiled: dict[Any, tuple[Machine, int, list[str]]] = field(default_factory=dict)


def specialised(value: Any) -> tuple[str, bool]:
    """(type, whether it is a multiple of 16) of an argument, as Triton's own launcher has them."""
    if isinstance(value, Tensor):
        return TENSOR_TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


def run_cuda(
    launches: Launches, name: str, options: Options, grid: tuple[int, int], given: dict[str, Any]
) -> None:
    """A launch of `hope.scan.cuda.device.launch`."""
    began = time.perf_counter()
    key, shared = (name, options), shared_bytes(name, options)
    if key not in launches.compiled:
        ptx = compiled(options.defines(), "compute_90").decode()
        launches.compiled[key] = Machine(parse(ptx, name)), shared, []
    machine = launches.compiled[key][0]
    launches.compiling += time.perf_counter() - began
    began = time.perf_counter()
    tensors = [(n, z) for n, z in given.items() if isinstance(z, Tensor) and z.numel()]
    memory = GlobalMemory([_storage(name, z) for name, z in tensors])
    with np.errstate(all="ignore"):
        done = machine.launch((*grid, 1), [bytes(arguments(given))], shared, memory)
    launches.statements += done
    launches.running += time.perf_counter() - began


def _storage(name: str, z: Tensor) -> tuple[int, int, str]:
    storage = z.untyped_storage()
    return storage.data_ptr(), storage.nbytes(), name


def run(launches: Launches, kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
    """One launch; given: the kernel's arguments and options by name."""
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    constants, signature, aligned, values = {}, {}, {}, []
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[parameter.name], signature[parameter.name] = value, "constexpr"
            values.append(value)
            continue
        kind, multiple = specialised(value)
        signature[parameter.name] = kind
        if multiple:
            aligned[(position,)] = [["tt.divisibility", 16]]
        values.append((kind, multiple))
    key = (kernel.fn.__name__, *values, *sorted(options.items()))
    began = time.perf_counter()
    if key not in launches.compiled:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        built = triton.compile(source, target=TARGET, options=options)
        names = [name for name, kind in signature.items() if kind != "constexpr"]
        machine = Machine(parse(built.asm["ptx"]))
        launches.compiled[key] = machine, built.metadata.shared, names
    machine, shared, names = launches.compiled[key]
    launches.compiling += time.perf_counter() - began
    began = time.perf_counter()
    storages, arguments = [], []
    for name in names:
        value = given[name]
        if isinstance(value, Tensor):
            storages.append(_storage(name, value))
            value = value.data_ptr()
        arguments.append(value)
    # Two pointers for scratch memory and profiles, which these kernels have no use for, come last.
    arguments += [0] * (len(machine.kernel.parameters) - len(arguments))
    x, y, z = (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        done = machine.launch((x, y, z), arguments, shared, GlobalMemory(storages))
    launches.statements += done
    launches.running += time.perf_counter() - began


@contextmanager
def emulated() -> Iterator[Launches]:
    """Launches run on the machine while this is open; yields what ran.

    Raises `tools.ptx.machine.ProgramError` out of a launch that does what a device must not.
    """
    launches = Launches()

    def launch(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = dict(zip(kernel.arg_names, positional, strict=False)) | named
        run(launches, kernel, grid(given) if callable(grid) else tuple(grid), given)

    with (
        patch("triton.JITFunction.run", launch),
        patch("hope.scan.cuda.device.launch", partial(run_cuda, launches)),
    ):
        yield launches
