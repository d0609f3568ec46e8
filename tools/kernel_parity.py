"""Our kernels against float64, as a table of cases: on a GPU (`tools.bench_gpu`), or as compiled
code on the CPU (`tools.emulate_kernels`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hope.fused import causal_convolution, cross_entropy, gated_rms_norm
from hope.scan import MemoryState, ScanConfig, ScanWeights, scan
from hope.scan.cuda.call import SIZES
from tools.kernel_costs import VOCABULARY, Shape

Figures = dict[str, float]
FusedHow = Literal["torch", "triton"]
How = Literal[FusedHow, "cuda"]
"""What computes; of a scan "torch" is "chunked", and only scans have "cuda"."""
Call = Callable[..., tuple[Tensor, ...]]
"""(leaves, how) -> outputs."""


@dataclass(frozen=True)
class ScanCase:
    """A scan of memories width x hidden. state: it goes on from an earlier one; resets: the last
    row starts again at its second projection chunk."""

    width: int
    hidden: int
    config: ScanConfig
    name: str = ""
    memories: int = 5
    state: bool = False
    resets: bool = False

    @property
    def key(self) -> str:
        sizes = f"d{self.width}_h{self.hidden}_c{self.config.memory_chunk}"
        return f"{sizes}_{self.name}" if self.name else sizes


SCAN_CASES = (
    ScanCase(64, 64, ScanConfig(16, 64)),
    ScanCase(64, 64, ScanConfig(32, 64)),
    ScanCase(64, 64, ScanConfig(64, 64)),
    ScanCase(64, 128, ScanConfig(16, 64)),
    ScanCase(64, 256, ScanConfig(16, 64)),
    ScanCase(128, 128, ScanConfig(16, 64)),
    ScanCase(128, 512, ScanConfig(16, 64)),
    ScanCase(64, 64, ScanConfig(16, 64), "resets", state=True, resets=True),
    ScanCase(64, 64, ScanConfig(16, 64), "six", memories=6),
    ScanCase(64, 64, ScanConfig(16, 64, delta_rule="target"), "target"),
    ScanCase(64, 64, ScanConfig(16, 64, delta_rule="input", decay_to="zero"), "input_zero"),
    ScanCase(64, 64, ScanConfig(16, 64, delta_rule="off"), "off"),
    ScanCase(
        64, 64, ScanConfig(32, 64, decay_to="zero", read="chunk_start"), "start_zero", 6, True, True
    ),
    ScanCase(64, 64, ScanConfig(16, 48), "odd"),
)


CUDA_CASES = (
    *(case for case in SCAN_CASES if (case.width, case.hidden) in SIZES),
    ScanCase(128, 128, ScanConfig(32, 64, delta_rule="target"), "resets", 5, True, True),
    ScanCase(
        64,
        128,
        ScanConfig(32, 64, decay_to="zero", read="chunk_start"),
        "start_zero",
        6,
        True,
        True,
    ),
)
"""Those that the kernels in CUDA C++ take, in bfloat16, and some that only they are tried with."""


def scan_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cuda", memories: int = 5
) -> tuple[Tensor, Tensor, ScanWeights]:
    """x, q and weights of a scan at the model's own initial scales, leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, tokens, d, h = shape

    def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        z = scale * torch.randn(*size, generator=generator) + shift
        return z.to(device, dtype).requires_grad_()

    q = torch.nn.functional.normalize(draw(rows, heads, tokens, d).detach(), dim=-1)
    weights = ScanWeights(
        w1=draw(memories, heads, d, h, scale=0.5 * h**-0.5),
        w2=draw(memories, heads, h, d, scale=2 * d**-0.5),
        w_eta=draw(heads, d, scale=0.1 * d**-0.5),
        b_eta=draw(heads, scale=0.0, shift=-4.2),
        w_alpha=draw(heads, d, scale=0.1 * d**-0.5),
        b_alpha=draw(heads, scale=0.0, shift=9.21),
    )
    return draw(rows, heads, tokens, d), q.requires_grad_(), weights


def scan_call(
    case: ScanCase, rows: int, heads: int, tokens: int, device: str
) -> tuple[Call, list[Tensor]]:
    """A scan's function of leaves, output and final states, and its leaves in float32."""
    shape = Shape(rows, heads, tokens, case.width, case.hidden)
    x, q, weights = scan_inputs(shape, torch.float32, device, case.memories)
    leaves = [x, q, *weights]
    if case.state:
        for w in weights[:2]:
            ramp = torch.linspace(0.9, 1.1, w.shape[-1], device=device)
            moved = w[:, None].expand(-1, rows, -1, -1, -1) * ramp
            leaves.append(moved.detach().requires_grad_())
    reset = None
    if case.resets:
        reset = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
        reset[-1, case.config.projection_chunk] = True

    def call(leaves: Sequence[Tensor], how: How) -> tuple[Tensor, ...]:
        config = replace(case.config, implementation="chunked" if how == "torch" else how)
        x, q, *rest = leaves
        precise = torch.promote_types(x.dtype, torch.float32)
        state = MemoryState(*(z.to(precise) for z in rest[6:])) if rest[6:] else None
        out, final = scan(x, q, ScanWeights(*rest[:6]), config, state, reset)
        return out, *final

    return call, leaves


def fused_calls(
    shape: Shape, device: str = "cuda", vocabulary: int = VOCABULARY
) -> list[tuple[str, Call, list[Tensor]]]:
    """Convolution, norm and gate, and the loss: a name, a function of leaves and an implementation,
    leaves."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    rows, heads, tokens, d, _ = shape
    labels = torch.randint(0, vocabulary, (rows * tokens,), generator=generator, device=device)
    starts = torch.rand(rows, tokens, generator=generator, device=device) < 0.1

    def convolution(leaves: Sequence[Tensor], how: FusedHow) -> tuple[Tensor, ...]:
        x, weight, tail = leaves
        return (causal_convolution(x, weight, tail, starts, how),)

    def gated_norm(leaves: Sequence[Tensor], how: FusedHow) -> tuple[Tensor, ...]:
        read, weight, gate = leaves
        return (gated_rms_norm(read, weight, gate, 1e-6, how),)

    def loss(leaves: Sequence[Tensor], how: FusedHow) -> tuple[Tensor, ...]:
        (logits,) = leaves
        return (cross_entropy(logits, labels, -100, how),)

    return [
        (
            "convolution",
            convolution,
            [draw(rows, tokens, heads * d), draw(4, heads * d), draw(rows, 3, heads * d)],
        ),
        (
            "gated_norm",
            gated_norm,
            [draw(rows, heads, tokens, d), draw(heads, d), draw(rows, tokens, heads * d)],
        ),
        (
            "cross_entropy",
            loss,
            [draw(rows * tokens, vocabulary)],
        ),
    ]


def results(
    call: Call, leaves: Sequence[Tensor], how: How, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradient of every leaf, with the leaves in a dtype."""
    own = [z.detach().to(dtype).requires_grad_() for z in leaves]
    outputs = call(own, how)
    total = torch.stack([ramp_loss(z).double() for z in outputs]).sum()
    return [z.detach() for z in outputs], list(torch.autograd.grad(total, own))


def ramp_loss(out: Tensor) -> Tensor:
    """A sum of an output that no symmetry makes small."""
    ramp = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    return (out * ramp.view(out.shape).to(out.dtype)).sum()


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of some tensors, each relative to the largest value of it; NaN where one
    has a NaN."""
    errors = [
        (a.double() - e).abs().max() / e.abs().max().clamp_min(1e-12)
        for a, e in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


HEADER = ["against float64", "outputs", "gradients", "torch's outputs", "gradients"]


def compared(
    key: str,
    call: Call,
    leaves: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    how: How = "triton",
) -> Iterator[tuple[list[str], Figures]]:
    """For each dtype a line of the table, and its figures: the errors of the kernels' outputs and
    gradients, and those that torch's operators have in the same dtype, from leaves that are rounded
    to it."""
    kind = "" if how == "triton" else f"_{how}"
    sides: tuple[How, How] = (how, "torch")
    for dtype in dtypes:
        expected = results(call, [z.to(dtype) for z in leaves], "torch", torch.float64)
        name = f"{key}_{str(dtype).removeprefix('torch.')}{kind}"
        errors = [
            worst(actual, exact)
            for one in sides
            for actual, exact in zip(results(call, leaves, one, dtype), expected, strict=True)
        ]
        figures = {f"error_out_{name}": errors[0], f"error_gradients_{name}": errors[1]}
        yield [name, *(f"{error:.1e}" for error in errors)], figures
