"""python -m tools.compile_kernels: compile the GPU kernels without having a GPU.

Every kernel for every size that the dispatcher takes, ahead of time for sm_90 (H100): registers
of a thread, bytes spilled to local memory, shared memory of a block, as ptxas and Triton report
them; those in CUDA C++ too where there is NVRTC. Writes runs/bench/kernels.json, after each kernel.
Needs triton; no GPU, no driver.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data_pipeline.command import as_command
from hope.fused.convolution import COLUMNS, ROWS
from hope.fused.gated_norm import tile
from hope.fused.loss import BLOCK, WARPS
from hope.scan import ScanConfig
from hope.scan.cuda.call import HIDDEN, KERNELS, SIZES, Options, compiled_for, shared_bytes
from hope.scan.cuda.nvrtc import compiled, library
from hope.scan.triton import EXPANSIONS, HEAD_WIDTHS, SHARED_BYTES, padded
from tools.figures import table, write_figures

SHARED_LIMIT = 232_448  # bytes that a block may have on sm_90
SCAN_LAUNCHES = (
    "project_forward", "make_frames", "make_frames_mem", "write_forward", "write_forward_mem",
    "project_backward", "write_backward", "write_backward_mem",
)  # fmt: skip
"""Kernels, and with "_mem" their launch on M_mem, which is another specialisation."""
MODULES = {
    "project_forward": "projections", "project_backward": "projections", "make_frames": "frames",
    "write_forward": "writes", "write_backward": "writes_backward",
}  # fmt: skip
NORM_WIDTHS = (64, 96, 128, 256)
ACTIVATIONS = (
    "x", "q", "dq", "source", "d_source", "out", "d_out", "read", "gate", "d_read", "d_gate",
    "logits", "d_logits", "base", "frozen", "deltas", "tail", "d_tail", "d_x",
)  # fmt: skip
"""Arguments of kernels in the activations' dtype; other tensors are float32, but for these:"""
INTEGER_TENSORS = {"reset": "*u8", "labels": "*i64", "reach": "*i32"}
SCALARS = {"q_stride": "i64", "eta_max": "fp32", "eps": "fp32"} | dict.fromkeys(
    (
        "tokens", "first_token", "first", "first_block", "blocks", "opened", "room", "heads",
        "chunks", "q_first", "frame_blocks", "works", "rows", "length", "row_stride",
        "head_stride", "token_stride", "columns", "channels",
    ),
    "i32",
)  # fmt: skip
MULTIPLES = (
    "row_stride", "head_stride", "token_stride", "columns", "length", "first", "first_token",
    "room", "q_stride", "q_first", "channels",
)  # fmt: skip
"""Integers that are multiples of 16 at the sizes that matter, which Triton makes use of."""


@dataclass(frozen=True)
class Case:
    """A kernel of a module, its compile-time arguments, its activations' dtype, how it is compiled.

    key: what its figures are called after their kind.
    """

    key: str
    module: str
    kernel: str
    constants: dict[str, Any]
    dtype: torch.dtype
    options: dict[str, int]


@dataclass(frozen=True)
class Report:
    """Registers a thread, bytes of spill stores and loads a thread, bytes of shared memory a
    block, seconds to compile."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    seconds: float


def shared_limit(case: Case | CudaCase) -> int:
    """Bytes of shared memory that a kernel may have: what the dispatcher asks a device for."""
    if isinstance(case, CudaCase) or "TILE" not in case.constants:
        return SHARED_LIMIT
    return SHARED_BYTES[case.constants["D"], case.dtype]


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def scan_cases(memory_chunk: int) -> Iterator[Case]:
    """Everything that the scan's dispatcher takes on a GPU, with that memory_chunk and the default
    options of the scan."""
    from hope.scan import launch, layouts

    config = ScanConfig(memory_chunk, 64)
    widths = sorted({padded(width) for width in HEAD_WIDTHS})
    dtypes = (torch.bfloat16, torch.float32)
    for width, expansion, dtype in itertools.product(widths, EXPANSIONS, dtypes):
        for name in SCAN_LAUNCHES:
            kernel = name.removesuffix("_mem")
            of_mem = kernel != name
            block = layouts.block_lengths(config, dtype)[of_mem]
            warps, tile = launch.options(name, width)
            constants = {
                **layouts.kernel_flags(config, dtype),
                "D": width,
                "H": width * expansion,
                "TILE": tile,
                "C": block,
                "OPEN": (memory_chunk if of_mem else config.projection_chunk) // block,
                "CHUNK": config.projection_chunk,
                "HAS_RESET": True,
                "READ": config.read if of_mem else "",
                "SAVE": True,
                "WIDE": 8 if of_mem else 6,
                "MEMORIES": 5,
            }
            if not of_mem and block == config.projection_chunk:
                constants["blocks"] = 1  # Triton compiles for an argument of 1
            module = MODULES[kernel]
            key = f"{name}_d{width}_h{width * expansion}_c{block}_{_name(dtype)}"
            path = f"hope.scan.kernels.{module}"
            options = {"num_warps": warps, "num_stages": launch.STAGES}
            yield Case(key, path, kernel, constants, dtype, options)


def fused_cases() -> Iterator[Case]:
    """The mixer's convolution, norm and gate, and the loss."""
    module = "hope.fused.kernels"
    for dtype, kind in itertools.product((torch.bfloat16, torch.float32), ("forward", "backward")):
        for width in NORM_WIDTHS:
            key = f"gated_norm_{kind}_d{width}_{_name(dtype)}"
            yield Case(key, module, f"gated_norm_{kind}", tile(width), dtype, {"num_warps": 4})
        key = f"convolve_{kind}_{_name(dtype)}"
        taps = {"WIDTH": 4, "TAPS": 4, "TAIL": True, "REACH": True}
        sizes = taps | {"ROWS": ROWS, "COLUMNS": COLUMNS}
        yield Case(key, module, f"convolve_{kind}", sizes, dtype, {"num_warps": 4})
        key = f"cross_entropy_{kind}_{_name(dtype)}"
        yield Case(
            key, module, f"cross_entropy_{kind}", {"BLOCK": BLOCK}, dtype, {"num_warps": WARPS}
        )


def compile_case(case: Case) -> Report:
    """Compile for sm_90 and read what ptxas says; fails with Triton's own errors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    signature = {name: _type(name, case) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={
            name: case.constants[name] for name, t in signature.items() if t == "constexpr"
        },
        attrs=_aligned(signature),
    )
    start = time.perf_counter()
    made = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options=case.options,
    )
    [(registers, stores, loads)] = assemble(made.asm["ptx"]).values()
    seconds = time.perf_counter() - start
    return Report(registers, stores, loads, made.metadata.shared, seconds)


@dataclass(frozen=True)
class CudaCase:
    """A kernel of `hope.scan.cuda`, for a writer's options."""

    key: str
    kernel: str
    cuda: Options


def cuda_cases(memory_chunk: int) -> Iterator[CudaCase]:
    """The kernels in CUDA C++ with the scan's default options."""
    from hope.scan import layouts

    config = ScanConfig(memory_chunk, 64)
    blocks = layouts.block_lengths(config, torch.bfloat16)
    for width, hidden in SIZES:
        for memories, block, read, suffix in zip(
            (4, 1), blocks, ("", config.read), ("", "_mem"), strict=True
        ):
            options = compiled_for(
                config, memories, block, read, True, False, hidden // HIDDEN, width
            )
            for kernel in KERNELS:
                key = f"cuda_{kernel}{suffix}_d{width}_h{hidden}_c{block}_bf16"
                yield CudaCase(key, kernel, options)


@lru_cache(maxsize=2)
def _assembled(options: Options) -> tuple[dict[str, tuple[int, int, int]], float]:
    start = time.perf_counter()
    found = assemble(compiled(options.defines(), "compute_90").decode())
    return found, time.perf_counter() - start


def compile_cuda(case: CudaCase) -> Report:
    """The same of a kernel in CUDA C++; the seconds are its module's."""
    found, seconds = _assembled(case.cuda)
    return Report(*found[case.kernel], shared_bytes(case.kernel, case.cuda), seconds)


def why_not_compiled() -> str:
    """Why nothing can be compiled here, or nothing."""
    if find_spec("triton") is None:
        return "triton is not installed; requirements-dev.txt has it"
    from hope.triton import is_interpreted

    if is_interpreted():
        return "kernels are interpreted: unset TRITON_INTERPRET to compile them"
    return ""


def _type(name: str, case: Case) -> str:
    if name in case.constants:
        return "constexpr"
    if name in SCALARS:
        return SCALARS[name]
    if name in INTEGER_TENSORS:
        return INTEGER_TENSORS[name]
    return "*bf16" if case.dtype == torch.bfloat16 and name in ACTIVATIONS else "*fp32"


def _aligned(signature: dict[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """Tensors start at multiples of 16 bytes, as torch allocates them."""
    return {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in MULTIPLES
    }


def assemble(ptx: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of spill stores and bytes of spill loads of each kernel, by Triton's
    ptxas; by its newer one what NVRTC 13 makes."""
    from triton import knobs

    newer = ptx.partition(".version ")[2].startswith("9")
    ptxas = knobs.nvidia.ptxas_blackwell if newer else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas.path, "-v", "--gpu-name=sm_90a", str(path)]
        result = subprocess.run(
            [*command, "-o", str(path.with_suffix(".cubin"))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    report = re.compile(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.S,
    )
    found = report.findall(result.stderr)
    assert found, result.stderr
    return {name: (int(used), int(stores), int(loads)) for name, stores, loads, used in found}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all compiled and fit, 1 some did not, 2 bad input or no compiler."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_kernels", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--only", default="", help="compile cases whose key contains this")
    parser.add_argument("--memory-chunk", type=int, choices=(16, 32, 64), default=16)
    options = parser.parse_args(arguments)
    if reason := why_not_compiled():
        print(f"compile_kernels: {reason}", file=sys.stderr)
        return 2
    cases: list[Case | CudaCase] = [*scan_cases(options.memory_chunk), *fused_cases()]
    if not isinstance(library(), str):
        cases += cuda_cases(options.memory_chunk)
    chosen = [case for case in cases if options.only in case.key]
    if not chosen:
        parser.error(f"no case contains {options.only!r}")
    figures: dict[str, float] = {}
    rows, failed, path = [], False, None
    for case in chosen:
        try:
            report = compile_cuda(case) if isinstance(case, CudaCase) else compile_case(case)
        except Exception as error:
            failed = True
            print(f"{case.key}: {' '.join(str(error).split())[-300:]}", file=sys.stderr)
            continue
        if report.shared > (limit := shared_limit(case)):
            failed = True
            print(f"{case.key}: {report.shared:,} B of {limit:,} B shared", file=sys.stderr)
        spilled = max(report.spill_stores, report.spill_loads)
        figures |= {
            f"registers_{case.key}": report.registers,
            f"spill_bytes_{case.key}": spilled,
            f"shared_bytes_{case.key}": report.shared,
        }
        cells = [
            case.cuda.threads // 32 if isinstance(case, CudaCase) else case.options["num_warps"],
            report.registers,
            spilled,
            report.shared,
            round(report.seconds, 1),
        ]
        rows.append([case.key, *map(str, cells)])
        path = write_figures("kernels", figures)
    print(table(["kernel", "warps", "registers", "spill B", "shared B", "s"], rows))
    print(f"figures: {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(as_command(main))
