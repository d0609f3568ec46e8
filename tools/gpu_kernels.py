"""Parity and time of each of our kernels on the device, for `tools.bench_gpu`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

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

PARITY_TOKENS = 520
"""Of a row: three segments, the last one short."""
TIMED = ((8, 4096, 64), (2, 16_384, 64), (8, 2048, 128))
"""Rows, their tokens, the width of heads and of their memories."""


def milliseconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median time of a call on the device, after one to warm up."""
    call()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def as_graph(step: Callable[[], object]) -> Callable[[], None]:
    """The same work captured once and replayed; the step before it compiles what it needs."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream the current one.
    with torch.cuda.stream(current), torch.cuda.graph(graph):
        step()
    return graph.replay


def scans(repetitions: int) -> Figures:
    """Parity of the kernels in CUDA C++, then milliseconds of a scan alone by them and by Triton's,
    forward and backward, of `TIMED`."""
    figures, rows = cuda_parity()
    print(table(HEADER, rows), flush=True)
    rows = []
    for batch, tokens, width in TIMED:
        x, q, weights = scan_inputs(Shape(batch, 16, tokens, width, width), torch.bfloat16)
        frozen = ScanWeights(*(w.detach() for w in weights))
        for how in ("triton", "cuda"):
            config = ScanConfig(implementation=how)
            forward = partial(scanned, x.detach(), q.detach(), frozen, config)
            step = partial(scan_step, x, q, weights, config)
            for stage, call in (("forward", forward), ("step", step)):
                key = f"scan_{how}_d{width}_{batch}x{tokens}_{stage}"
                found = milliseconds(as_graph(call), repetitions)
                eager = milliseconds(call, repetitions)
                figures |= {f"ms_{key}": found, f"eager_ms_{key}": eager}
                rows.append([key, f"{found:.2f}", f"{eager:.2f}"])
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["scan of 16 heads", "graph, ms", "eager, ms"], rows), flush=True)
    return figures


def scan_step(x: Tensor, q: Tensor, weights: ScanWeights, config: ScanConfig) -> None:
    """A scan's forward and backward."""
    out = scanned(x, q, weights, config)
    torch.autograd.grad(out, [x, q, *weights], torch.ones_like(out))


def cuda_parity() -> tuple[Figures, list[list[str]]]:
    """The kernels in CUDA C++, as `parity` does all."""
    figures: Figures = {}
    rows = []
    for case in CUDA_CASES:
        call, leaves = scan_call(case, 2, 4, PARITY_TOKENS, "cuda")
        for row, found in compared(case.key, call, leaves, (torch.bfloat16,), "cuda"):
            rows.append(row)
            figures |= found
    return figures, rows


def parity() -> Figures:
    """Largest errors of outputs and gradients, relative to the largest value of each."""
    figures, rows = cuda_parity()
    calls = [(case.key, *scan_call(case, 2, 4, PARITY_TOKENS, "cuda")) for case in SCAN_CASES]
    for key, call, leaves in [*calls, *fused_calls(Shape(2, 4, 1024, 64, 64))]:
        for row, found in compared(key, call, leaves, (torch.float32, torch.bfloat16)):
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
