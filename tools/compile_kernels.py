"""python -m tools.compile_kernels: compile the scan's kernels for a GPU without having one.

Every kernel for every size that the dispatcher takes, ahead of time for sm_90 (H100): registers
of a thread, bytes spilled to local memory, shared memory of a block, as ptxas and Triton report
them. Writes runs/bench/kernels.json. Needs triton; no GPU, no driver.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hope.scan import ScanConfig
from hope.scan.triton import HEAD_WIDTHS, MAX_STATE, padded
from tools.figures import table, write_figures

SHARED_LIMIT = 232_448  # bytes that a block may have on sm_90
KERNELS = ("memory_forward", "memory_backward", "projections_forward", "projections_backward")
_INTEGERS = (
    "tokens",
    "first_token",
    "blocks",
    "slots",
    "heads",
    "chunks",
    "first_chunk",
    "q_first",
)


@dataclass(frozen=True)
class Case:
    """One kernel at one size, in blocks of that many tokens."""

    kernel: str
    width: int
    hidden: int
    block: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """What its figures are called after their kind."""
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"{self.kernel}_d{self.width}_h{self.hidden}_b{self.block}_{dtype}"


@dataclass(frozen=True)
class Report:
    """Registers a thread, bytes of spill stores and loads a thread, bytes of shared memory a
    block, warps a block, seconds to compile."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    seconds: float


def cases(blocks: tuple[int, ...]) -> Iterator[Case]:
    """Everything that the dispatcher takes on a GPU, at the default options of the scan."""
    widths = sorted({padded(width) for width in HEAD_WIDTHS})
    for width, expansion in itertools.product(widths, (1, 2, 4)):
        size = width * width * expansion
        for dtype, most in ((torch.bfloat16, MAX_STATE), (torch.float32, 64 * 64)):
            if size <= most:
                for block, kernel in itertools.product(blocks, KERNELS):
                    yield Case(kernel, width, width * expansion, block, dtype)


def compile_case(case: Case, config: ScanConfig | None = None) -> Report:
    """Compile for sm_90 and read what ptxas says; fails with Triton's own errors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hope.scan import launch
    from hope.scan.kernels import memory, projections

    config = config or ScanConfig()
    kernel = getattr(memory if case.kernel.startswith("memory") else projections, case.kernel)
    constants: dict[str, Any] = {
        **launch.kernel_flags(config, case.dtype),
        "D": case.width,
        "H": case.hidden,
        "C": case.block,
        "OPEN": max(1, config.memory_chunk // case.block),
        "PERIOD": config.projection_chunk // case.block,
        "HAS_RESET": True,
        "ADAPTIVE": False,
        "READ": True,
        "SAVE": False,
        "CAUSAL": config.read == "causal",
    }
    signature, constexprs = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
            constexprs[name] = constants[name]
        else:
            signature[name] = _type(name, case)
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constexprs, attrs=_aligned(kernel, signature)
    )
    options = launch.COMPILE_OPTIONS
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, stores, loads = assemble(compiled.asm["ptx"])
    return Report(
        registers, stores, loads, compiled.metadata.shared, options["num_warps"],
        time.perf_counter() - start,
    )  # fmt: skip


def _why_not() -> str:
    """Why nothing can be compiled here, or nothing."""
    if find_spec("triton") is None:
        return "triton is not installed; requirements-dev.txt has it"
    from hope.scan import launch

    if launch.is_interpreted():
        return "kernels are interpreted: unset TRITON_INTERPRET to compile them"
    return ""


def _type(name: str, case: Case) -> str:
    if name in _INTEGERS:
        return "i32"
    if name in ("q_stride",):
        return "i64"
    if name == "eta_max":
        return "fp32"
    if name == "reset":
        return "*u8"
    activations = ("x", "q", "dx", "dq", "source", "d_source", "out", "d_out")
    low = case.dtype == torch.bfloat16 and name in activations
    return "*bf16" if low else "*fp32"


def _aligned(kernel: Any, signature: dict[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """Tensors start at multiples of 16 bytes, as torch allocates them."""
    return {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }


def assemble(ptx: str) -> tuple[int, int, int]:
    """Registers, bytes of spill stores and bytes of spill loads, by Triton's ptxas."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path)]
        result = subprocess.run(
            [*command, "-o", str(path.with_suffix(".cubin"))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    used = re.search(r"Used (\d+) registers", result.stderr)
    assert found is not None, result.stderr
    assert used is not None, result.stderr
    return int(used[1]), int(found[1]), int(found[2])


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all compiled, 1 some did not, 2 bad input or no compiler."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_kernels", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--only", default="", help="compile cases whose key contains this")
    parser.add_argument("--blocks", type=int, nargs="+", choices=(16, 32, 64), default=[16])
    options = parser.parse_args(arguments)
    chosen = [case for case in cases(tuple(options.blocks)) if options.only in case.key]
    if not chosen:
        parser.error(f"no case contains {options.only!r}")
    if reason := _why_not():
        print(f"compile_kernels: {reason}", file=sys.stderr)
        return 2
    figures: dict[str, float] = {}
    rows, failed = [], False
    for case in chosen:
        try:
            report = compile_case(case)
        except Exception as error:
            failed = True
            print(f"{case.key}: {' '.join(str(error).split())[-300:]}", file=sys.stderr)
            continue
        spilled = max(report.spill_stores, report.spill_loads)
        figures |= {
            f"registers_{case.key}": report.registers,
            f"spill_bytes_{case.key}": spilled,
            f"shared_bytes_{case.key}": report.shared,
        }
        cells = [report.warps, report.registers, spilled, report.shared, round(report.seconds, 1)]
        rows.append([case.key, *map(str, cells)])
    print(table(["kernel", "warps", "registers", "spill B", "shared B", "s"], rows))
    print(f"figures: {write_figures('kernels', figures)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
