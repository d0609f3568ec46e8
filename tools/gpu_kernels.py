"""Parity and time of each of our kernels on the device, for `tools.bench_gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hope.fused import cross_entropy, gated_rms_norm
from hope.scan import ScanConfig, ScanWeights, scan
from tools.figures import table
from tools.kernel_costs import Shape, fused_costs, kernel_costs

VOCABULARY = 32_000
Figures = dict[str, float]


def scan_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cuda"
) -> tuple[Tensor, Tensor, ScanWeights]:
    """x, q and weights of a scan at the model's own initial scales, leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, tokens, d, h = shape

    def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        z = scale * torch.randn(*size, generator=generator) + shift
        return z.to(device, dtype).requires_grad_()

    q = torch.nn.functional.normalize(draw(rows, heads, tokens, d).detach(), dim=-1)
    weights = ScanWeights(
        w1=draw(5, heads, d, h, scale=0.5 * h**-0.5),
        w2=draw(5, heads, h, d, scale=2 * d**-0.5),
        w_eta=draw(heads, d, scale=0.1 * d**-0.5),
        b_eta=draw(heads, scale=0.0, shift=-4.2),
        w_alpha=draw(heads, d, scale=0.1 * d**-0.5),
        b_alpha=draw(heads, scale=0.0, shift=9.21),
    )
    return draw(rows, heads, tokens, d), q.requires_grad_(), weights


def parity() -> Figures:
    """Largest error of output and gradients, relative to the largest value of each."""
    figures: Figures = {}
    rows = []
    sizes = (
        (64, 64, 16),
        (64, 64, 32),
        (64, 64, 64),
        (64, 256, 16),
        (128, 128, 16),
        (128, 512, 16),
    )
    for width, hidden, chunk in sizes:
        shape, config = Shape(2, 4, 1024, width, hidden), ScanConfig(chunk, 64)
        expected = results(shape, replace(config, implementation="chunked"), torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            actual = results(shape, replace(config, implementation="triton"), dtype)
            key = f"d{width}_h{hidden}_c{chunk}_{str(dtype).removeprefix('torch.')}"
            rows.append(compare(key, actual, expected, figures))
    for name, call, leaves in fused_calls(Shape(2, 4, 1024, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            given = [z.detach().to(dtype).requires_grad_() for z in leaves]
            exact = [z.detach().double().requires_grad_() for z in given]
            actual, expected = (
                gradients(call, one, how) for one, how in ((given, "triton"), (exact, "torch"))
            )
            key = f"{name}_{str(dtype).removeprefix('torch.')}"
            rows.append(compare(key, actual, expected, figures))
    print(table(["against float64", "output", "gradients"], rows), flush=True)
    return figures


def compare(key: str, actual: list[Tensor], expected: list[Tensor], figures: Figures) -> list[str]:
    """A line of the table, and its figures: the errors of an output and its gradients."""
    errors = [
        float((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-12))
        for a, e in zip(actual, expected, strict=True)
    ]
    figures |= {f"error_out_{key}": errors[0], f"error_gradients_{key}": max(errors[1:])}
    return [key, f"{errors[0]:.1e}", f"{max(errors[1:]):.1e}"]


def fused_calls(
    shape: Shape, device: str = "cuda"
) -> list[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Norm and gate, and the loss: a name, a function of leaves and an implementation, leaves."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    rows, heads, tokens, d, _ = shape
    labels = torch.randint(0, VOCABULARY, (rows * tokens,), generator=generator, device=device)
    return [
        (
            "gated_norm",
            lambda read, weight, gate, how: gated_rms_norm(read, weight, gate, 1e-6, how),
            [draw(rows, heads, tokens, d), draw(heads, d), draw(rows, tokens, heads * d)],
        ),
        (
            "cross_entropy",
            lambda logits, how: cross_entropy(logits, labels, -100, how),
            [draw(rows * tokens, VOCABULARY)],
        ),
    ]


def gradients(call: Callable[..., Tensor], leaves: list[Tensor], how: str) -> list[Tensor]:
    """Output and the gradient of every leaf."""
    out = call(*leaves, how)
    return [out.detach(), *torch.autograd.grad(ramp_loss(out), leaves)]


def ramp_loss(out: Tensor) -> Tensor:
    """A sum of an output that no symmetry makes small."""
    ramp = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    return (out * ramp.view(out.shape).to(out.dtype)).sum()


def results(shape: Shape, config: ScanConfig, dtype: torch.dtype) -> list[Tensor]:
    """Output and all gradients of one scan."""
    x, q, weights = scan_inputs(shape, torch.float32)
    x, q, *rest = (z.detach().to(dtype).requires_grad_() for z in (x, q, *weights))
    out = scanned(x, q, ScanWeights(*rest), config)
    return [out.detach(), *torch.autograd.grad(ramp_loss(out), [x, q, *rest])]


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
            calls.append((partial(call, *own, "triton"), own))
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
