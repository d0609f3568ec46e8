"""python -m tools.emulate_kernels: what compilers make of the GPU kernels, run on the CPU.

Every kernel, Triton's and those in CUDA C++, is compiled for sm_90 and its PTX is run by a machine
of ours (`tools.ptx`): matrix products in bfloat16 and TF32 as tensor cores take them, asynchronous
copies that arrive when they are waited for, and an error with its source line for whatever reads
or writes outside of its memory, or what two warps touch without a barrier between. Output and
gradients beside float64, and beside torch's operators in the same dtype. First the machine itself:
products of many shapes. What ptxas does after PTX, time, and launches that overlap are not part of
it. Needs triton and NVRTC; no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from data_pipeline.command import as_command
from hope.scan.cuda.nvrtc import library
from tools.compile_kernels import why_not_compiled
from tools.kernel_costs import Shape
from tools.kernel_parity import (
    CUDA_CASES,
    HEADER,
    SCAN_CASES,
    Call,
    How,
    compared,
    fused_calls,
    scan_call,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KERNELS: tuple[How, ...] = ("triton", "cuda")
FUSED = ("convolution", "gated_norm", "cross_entropy")
LIMITS = {torch.bfloat16: (0.01, 0.1), torch.float32: (2e-6, 1e-5)}
"""Errors of outputs and gradients that pass. In bfloat16 the gradients of the gates' biases, sums
in which much cancels, are the furthest off."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all agree, 1 a fault or too large an error, 2 no Triton or bad input."""
    names = ["machine", *FUSED, *dict.fromkeys(case.key for case in (*SCAN_CASES, *CUDA_CASES))]
    parser = argparse.ArgumentParser(
        prog="python -m tools.emulate_kernels", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=200, help="of a row (%(default)s)")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        parser.error("--tokens must be positive")
    reason = why_not_compiled()
    if "cuda" in options.kernels and not reason:
        nvrtc = library()
        reason = nvrtc if isinstance(nvrtc, str) else ""
    if reason:
        print(f"emulate_kernels: {reason}", file=sys.stderr)
        return 2
    from tools.ptx.group import ProgramError
    from tools.ptx.launching import emulated

    failed = []
    dtypes = [DTYPES[name] for name in options.dtypes]
    print(" | ".join([*HEADER, "statements", "compiled, s", "run, s"]), flush=True)
    with emulated() as launches, dispatched():
        if "machine" in options.cases:
            for dtype in dtypes:
                failed += machine(dtype)
        for how, name, call, leaves in calls(options.cases, options.tokens, options.kernels):
            for dtype in dtypes if how == "triton" else [torch.bfloat16]:
                before = launches.statements, launches.compiling, launches.running
                try:
                    [(row, _)] = compared(name, call, leaves, [dtype], how)
                except ProgramError as fault:
                    print(f"{name} {dtype}: {fault}", flush=True)
                    failed.append(name)
                    continue
                now = launches.statements, launches.compiling, launches.running
                spent = [f"{b - a:,.0f}" for a, b in zip(before, now, strict=True)]
                print(" | ".join([*row, *spent]), flush=True)
                if not all(
                    float(e) <= most for e, most in zip(row[1:3], LIMITS[dtype], strict=True)
                ):
                    failed.append(row[0])
    print(f"wrong: {', '.join(failed)}" if failed else "all agree")
    return 1 if failed else 0


@contextmanager
def dispatched() -> Iterator[None]:
    """The kernels' dispatchers take tensors on the CPU."""
    with (
        patch("hope.triton.why_no_kernels", lambda x: ""),
        patch("hope.scan.triton.why_no_kernels", lambda x: ""),
        patch("hope.scan.cuda.device.why_not", lambda *call: ""),
    ):
        yield


def calls(
    names: Sequence[str], tokens: int, kernels: Sequence[How]
) -> Iterator[tuple[How, str, Call, list[Tensor]]]:
    """What was asked for, and of which kernels: convolution, norm and loss, and scans of two rows
    in two segments."""
    if "triton" in kernels:
        for name, call, leaves in fused_calls(Shape(1, 2, 24, 64, 64), "cpu", vocabulary=1000):
            if name in names:
                yield "triton", name, call, leaves
    for how in kernels:
        for case in SCAN_CASES if how == "triton" else CUDA_CASES:
            if case.key in names:
                short = replace(case, config=replace(case.config, checkpoint_chunks=2))
                # One head's gradient of a gate's bias can be next to nothing by chance.
                heads = 1 if how == "triton" else 2
                yield how, case.key, *scan_call(short, 2, heads, tokens, "cpu")


def machine(dtype: torch.dtype) -> list[str]:
    """The machine on kernels whose results are known; returns those that are wrong."""
    from tools.ptx.selfcheck import functions, products

    wrong, count = [], 0
    for name, error in (*products(dtype), *functions(dtype)):
        exact = dtype == torch.bfloat16 or "tf32x3" in name or "rows" in name
        count += 1
        if not error < (1e-5 if exact else 3e-3):
            wrong.append(f"{name} {dtype}: {error:.1e}")
    print(f"machine, {dtype}: {count - len(wrong)} of {count} kernels agree", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(as_command(main))
