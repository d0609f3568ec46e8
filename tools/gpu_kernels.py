"""Parity and time of each of our kernels on the device, for `tools.bench_gpu`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hope.scan import ScanConfig, ScanWeights, scan
from tools.figures import table
from tools.kernel_costs import VOCABULARY, Shape, fused_costs, kernel_costs
from tools.kernel_parity import (
    CUDA_CASES,
    HEADER,
    SCAN_CASES,
    Call,
    Figures,
    compared,
    fused_calls,
    scan_call,
    scan_inputs,
)


def parity() -> Figures:
    """Largest errors of outputs and gradients, relative to the largest value of each."""
    figures: Figures = {}
    rows = []
    calls = [(case.key, *scan_call(case, 2, 4, 1000, "cuda")) for case in SCAN_CASES]
    for key, call, leaves in [*calls, *fused_calls(Shape(2, 4, 1024, 64, 64))]:
        for row, found in compared(key, call, leaves, (torch.float32, torch.bfloat16)):
            rows.append(row)
            figures |= found
    for case in CUDA_CASES:
        call, leaves = scan_call(case, 2, 4, 1000, "cuda")
        for row, found in compared(case.key, call, leaves, (torch.bfloat16,), "cuda"):
            rows.append(row)
            figures |= found
    print(table(HEADER, rows), flush=True)
    return figures


def scanned(x: Tensor, q: Tensor, weights: ScanWeights, config: ScanConfig) -> Tensor:
    """The output of a scan alone."""
    return scan(x, q, weights, config)[0]


def kernels(repetitions: int) -> Figures:
    """Microseconds of every kernel over a sequence, from the profiler, beside its floor."""
    figures: Figures = {}
    rows = []
    shapes = (
        Shape(8, 16, 4096, 64, 64),
        Shape(8, 12, 4096, 128, 128),
        Shape(8, 12, 4096, 128, 512),
    )
    for shape in shapes:
        config = ScanConfig(implementation="triton")
        x, q, weights = scan_inputs(shape, torch.bfloat16)
        calls = [(partial(scanned, x, q, weights, config), [x, q, *weights])]
        for _, call, leaves in fused_calls(shape):
            own = [z.bfloat16().requires_grad_() for z in leaves]
            calls.append((partial(_first, call, own), own))
        found: Figures = {}
        for forward, leaves in calls:
            found |= device_times(forward, leaves, repetitions)
        costs = kernel_costs(config, shape) | fused_costs(shape, VOCABULARY)
        for name, cost in costs.items():
            key = f"{name.replace(': ', '_')}_d{shape.width}_h{shape.hidden}"
            figures |= {f"us_{key}": found[name], f"floor_us_{key}": cost.floor}
            rows.append(
                [
                    key,
                    f"{found[name]:,.0f}",
                    f"{cost.floor:,.0f}",
                    f"{found[name] / cost.floor:.1f}",
                ]
            )
    print(table(["kernel", "us", "floor", "over it"], rows), flush=True)
    return figures


def _first(call: Call, leaves: list[Tensor]) -> Tensor:
    return call(leaves, "triton")[0]


def device_times(forward: Callable[[], Tensor], leaves: list[Tensor], repetitions: int) -> Figures:
    """Microseconds of each kernel of one call, by "forward: NAME" and "backward: NAME"."""
    found: Figures = {}
    out = forward()
    gradient = torch.ones_like(out)

    def backward() -> None:
        torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    for stage, call in (("forward", forward), ("backward", backward)):
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recording:
            for _ in range(repetitions):
                call()
            torch.cuda.synchronize()
        for event in recording.key_averages():
            found[f"{stage}: {event.key}"] = event.device_time_total / repetitions
    return found
