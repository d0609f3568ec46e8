"""Problems for the scan's tests: inputs by seed, and all that a call returns or sends back."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hope.native.build import why_not
from hope.scan import MemoryState, ScanConfig, ScanWeights, scan

IMPLEMENTATIONS = [
    "chunked",
    pytest.param(
        "native", marks=pytest.mark.skipif(bool(why_not()), reason=f"no native scan: {why_not()}")
    ),
]
"""Those for a CPU that have a backward of their own."""
RULES = ("normalised", "target", "input", "off")
DECAYS = ("initial", "zero")
READS = ("causal", "chunk_start")


def every_option(*quick: tuple[str, str]) -> list[Any]:
    """Every rule, decay and read as parameters of a test; of each rule all but one decay and read,
    in the order of `RULES`, are slow."""
    return [
        pytest.param(rule, *one, marks=() if one == own else pytest.mark.slow)
        for rule, own in zip(RULES, quick, strict=True)
        for one in itertools.product(DECAYS, READS)
    ]


class Problem(NamedTuple):
    x: Tensor
    q: Tensor
    weights: ScanWeights
    state: MemoryState | None
    reset: Tensor | None

    def to(self, dtype: torch.dtype) -> Problem:
        """Leaves of their own in another dtype."""

        def leaf(z: Tensor) -> Tensor:
            return z.detach().to(dtype).clone().requires_grad_()

        state = None if self.state is None else MemoryState(*map(leaf, self.state))
        weights = ScanWeights(*map(leaf, self.weights))
        return Problem(leaf(self.x), leaf(self.q), weights, state, self.reset)

    def leaves(self) -> dict[str, Tensor]:
        state = {} if self.state is None else self.state._asdict()
        return {
            "x": self.x,
            "q": self.q,
            **{f"weights.{name}": z for name, z in self.weights._asdict().items()},
            **{f"state.{name}": z for name, z in state.items()},
        }


class OnGpu:
    """As much of activations on a GPU as the dispatcher looks at."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (1, 1, 64, width), dtype


def make_problem(
    rows: int = 2,
    heads: int = 2,
    tokens: int = 21,
    width: int = 5,
    expansion: int = 1,
    memories: int = 5,
    with_state: bool = True,
    resets: tuple[tuple[int, int], ...] = (),
    seed: int = 0,
) -> Problem:
    """A float64 problem whose gates, activations and decays are far from trivial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = expansion * width
    weights = ScanWeights(
        w1=draw(memories, heads, width, hidden) / hidden**0.5,
        w2=draw(memories, heads, hidden, width) / width**0.5,
        w_eta=2 * draw(heads, width) / width**0.5,
        b_eta=draw(heads),
        w_alpha=draw(heads, width) / width**0.5,
        b_alpha=3 + draw(heads),
    )
    state = None
    if with_state:
        state = MemoryState(
            weights.w1[:, None] + 0.2 * draw(memories, rows, heads, width, hidden),
            weights.w2[:, None] + 0.2 * draw(memories, rows, heads, hidden, width),
        )
    reset = None
    if resets:
        reset = torch.zeros(rows, tokens, dtype=torch.bool)
        for row, token in resets:
            reset[row, token] = True
    x, q = draw(rows, heads, tokens, width), draw(rows, heads, tokens, width)
    q = torch.nn.functional.normalize(q, dim=-1)
    return Problem(x, q, weights, state, reset).to(torch.float64)


def forgotten(problem: Problem, b_alpha: float) -> Problem:
    """The same with decays of about that gate's in every token: with `decay_to: zero` little is
    left of the memories at the end of a chunk."""
    gate = torch.full_like(problem.weights.b_alpha, b_alpha).requires_grad_()
    return problem._replace(weights=problem.weights._replace(b_alpha=gate))


def run(problem: Problem, config: ScanConfig) -> tuple[Tensor, MemoryState]:
    return scan(problem.x, problem.q, problem.weights, config, problem.state, problem.reset)


def everything(problem: Problem, config: ScanConfig) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input, from a random linear loss on both."""
    out, state = run(problem, config)
    results = {"out": out, "final.w1": state.w1, "final.w2": state.w2}
    generator = torch.Generator().manual_seed(1234)
    loss = sum(
        (z * torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)).sum()
        for z in results.values()
    )
    assert isinstance(loss, Tensor)
    leaves = problem.leaves()
    gradients = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    results.update({f"d {name}": z for name, z in zip(leaves, gradients, strict=True)})
    return {name: z.detach() for name, z in results.items()}


def worst_error(
    expected: dict[str, Tensor], actual: dict[str, Tensor], floor: float = 1e-12
) -> tuple[float, str]:
    """The largest difference of any result, relative to its largest value (at least floor);
    infinite where there is a NaN, which max would pass over."""
    assert expected.keys() == actual.keys()
    errors = []
    for name, z in expected.items():
        difference = (z - actual[name].to(z.dtype)).abs().max()
        error = float(difference / z.abs().max().clamp_min(floor))
        errors.append((math.inf if math.isnan(error) else error, name))
    return max(errors)
