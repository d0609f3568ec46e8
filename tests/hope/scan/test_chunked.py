"""The closed form and its hand-derived backward against the float64 token loop."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hope.scan import MemoryState, ScanConfig, ScanWeights, scan
from hope.scan.closed_form import block_length, gelu, gelu_curvature, gelu_slope, unit_lower_inverse
from hope.scan.contract import ScanImplementation
from hope.scan.products import Scratch
from hope.scan.tiles import TILE, chunk_shape
from tests.hope.scan.cases import (
    IMPLEMENTATIONS,
    Problem,
    everything,
    forgotten,
    make_problem,
    worst_error,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def check_parity(
    problem: Problem,
    config: ScanConfig,
    implementation: ScanImplementation,
    floor: float = 1e-12,
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCE),
) -> None:
    expected = everything(problem, replace(config, implementation="reference"))
    for dtype in dtypes:
        tolerance = TOLERANCE[dtype]
        actual = everything(problem.to(dtype), replace(config, implementation=implementation))
        error, name = worst_error(expected, actual, floor)
        assert error < tolerance, f"{name} is off by {error:.1e} in {dtype}"


@pytest.mark.parametrize("rule", ["normalised", "target", "input", "off"])
@pytest.mark.parametrize("decay_to", ["initial", "zero"])
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
@pytest.mark.parametrize("memories", [5, 6])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_option(
    implementation: ScanImplementation, rule: str, decay_to: str, read: str, memories: int
) -> None:
    eta_max = 0.5 if rule in ("normalised", "target") else 0.1
    config = ScanConfig(4, 8, eta_max, rule, decay_to, read, checkpoint_chunks=2)
    for with_state in (True, False):
        problem = make_problem(memories=memories, with_state=with_state, resets=((0, 8), (1, 0)))
        check_parity(problem, config, implementation)


@pytest.mark.parametrize(
    ("memory_chunk", "projection_chunk", "checkpoint_chunks", "shape"),
    [
        (1, 1, 1, {"tokens": 4}),
        (1, 4, 3, {"tokens": 9}),
        (8, 8, 1, {"tokens": 24}),
        (8, 8, None, {"tokens": 3}),
        (16, 64, None, {"rows": 1, "tokens": 70, "expansion": 2}),
        (4, 8, 5, {"tokens": 48, "resets": ((0, 16), (1, 40))}),
        (4, 8, 2, {"rows": 1, "heads": 1, "tokens": 17, "width": 1}),
        (4, 8, 2, {"rows": 3, "heads": 1, "tokens": 16, "width": 7, "expansion": 3}),
        (128, 128, 1, {"rows": 1, "heads": 2, "tokens": 150, "width": 8}),
        (128, 256, 1, {"rows": 1, "heads": 2, "tokens": 150, "width": 4}),
        (70, 70, 1, {"rows": 1, "heads": 1, "tokens": 80, "width": 4}),
        (67, 67, 1, {"rows": 1, "heads": 1, "tokens": 70, "width": 4}),
        (16, 32, 4, {"rows": 2, "heads": 1, "tokens": 150, "width": 16, "resets": ((1, 96),)}),
        (24, 48, 9, {"rows": 1, "heads": 2, "tokens": 300, "width": 17, "expansion": 2}),
        (40, 200, 2, {"rows": 1, "heads": 1, "tokens": 430, "width": 6}),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shapes_and_chunks(
    implementation: ScanImplementation,
    memory_chunk: int,
    projection_chunk: int,
    checkpoint_chunks: int | None,
    shape: dict,
) -> None:
    config = ScanConfig(memory_chunk, projection_chunk, checkpoint_chunks=checkpoint_chunks)
    check_parity(make_problem(**shape), config, implementation)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_problems(implementation: ScanImplementation, seed: int) -> None:
    rng = random.Random(seed)
    memory_chunk, multiple = rng.randint(1, 6), rng.randint(1, 4)
    projection_chunk = memory_chunk * multiple
    tokens, rows = rng.randint(1, 40), rng.randint(1, 3)
    boundaries = range(0, tokens, projection_chunk)
    resets = [(rng.randrange(rows), rng.choice(boundaries)) for _ in range(rng.randint(0, 4))]
    rule = rng.choice(["normalised", "target", "input", "off"])
    config = ScanConfig(
        memory_chunk=memory_chunk,
        projection_chunk=projection_chunk,
        eta_max=rng.uniform(0.1, 0.6) if rule in ("normalised", "target") else 0.1,
        delta_rule=rule,
        decay_to=rng.choice(["initial", "zero"]),
        read=rng.choice(["causal", "chunk_start"]),
        checkpoint_chunks=rng.choice([None, 1, 2, 3]),
    )
    problem = make_problem(
        rows,
        rng.randint(1, 3),
        tokens,
        rng.randint(4, 9),  # narrower ones are ill-conditioned: l2norm leaves one or two dimensions
        rng.randint(1, 3),
        rng.choice([5, 6]),
        rng.random() < 0.5,
        tuple(resets),
        seed,
    )
    check_parity(problem, config, implementation)


@pytest.mark.parametrize("rule", ["normalised", "target"])
@pytest.mark.parametrize("decay_to", ["initial", "zero"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: ScanImplementation, rule: str, decay_to: str) -> None:
    problem = make_problem(1, 1, 7, 2, memories=6, resets=((0, 4),))
    config = ScanConfig(
        2, 4, 0.4, rule, decay_to, checkpoint_chunks=1, implementation=implementation
    )

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        weights, state = ScanWeights(*leaves[2:8]), MemoryState(*leaves[8:])
        out, final = scan(leaves[0], leaves[1], weights, config, state, problem.reset)
        return out, *final

    assert torch.autograd.gradcheck(call, tuple(problem.leaves().values()), fast_mode=True)


@pytest.mark.parametrize("which", ["out", "w1", "w2"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_from_one_result_alone(implementation: ScanImplementation, which: str) -> None:
    problem, config = make_problem(tokens=17), ScanConfig(4, 8, checkpoint_chunks=1)
    gradients = []
    for one in ("reference", implementation):
        out, state = scan(
            problem.x,
            problem.q,
            problem.weights,
            replace(config, implementation=one),
            problem.state,
        )
        result = {"out": out, "w1": state.w1, "w2": state.w2}[which]
        leaves = list(problem.leaves().values())
        gradients.append(torch.autograd.grad(result.square().sum(), leaves, allow_unused=True))
    for expected, actual in zip(*gradients, strict=True):
        expected = torch.zeros_like(actual) if expected is None else expected
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("b_eta", "b_alpha"), [(-200.0, 3.0), (0.0, -200.0), (60.0, 60.0)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saturated_gates(implementation: ScanImplementation, b_eta: float, b_alpha: float) -> None:
    """Steps of exactly zero, decays that underflow, and neither: finite, and the loop's values."""
    problem = make_problem(tokens=17)
    weights = problem.weights._replace(
        b_eta=torch.full_like(problem.weights.b_eta, b_eta).requires_grad_(),
        b_alpha=torch.full_like(problem.weights.b_alpha, b_alpha).requires_grad_(),
    )
    check_parity(problem._replace(weights=weights), ScanConfig(4, 8), implementation, floor=1.0)


@pytest.mark.parametrize(
    ("b_alpha", "dtypes"), [(12.0, (torch.float64, torch.float32)), (17.0, (torch.float32,))]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slow_decay_keeps_its_precision(
    implementation: ScanImplementation, b_alpha: float, dtypes: tuple[torch.dtype, ...]
) -> None:
    """At alpha = 1 - 6e-6 with a carried state, M_0 matters through a sum of tiny terms only; at
    1 - 4e-8, which is 1 in float32, too (there the float64 loop itself has eight digits)."""
    problem = make_problem(rows=1, tokens=48, width=8)
    weights = problem.weights._replace(
        w_alpha=(0.1 * problem.weights.w_alpha).detach().requires_grad_(),
        b_alpha=torch.full_like(problem.weights.b_alpha, b_alpha).requires_grad_(),
    )
    problem = problem._replace(weights=weights)
    check_parity(problem, ScanConfig(8, 16), implementation, dtypes=dtypes)


@pytest.mark.parametrize(("seed", "b_alpha"), [(0, -2.0), (1, -2.0), (2, -1.0)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memories_that_are_forgotten(
    implementation: ScanImplementation, seed: int, b_alpha: float
) -> None:
    """|act(W2 k)| is below the floor of its norm, but the length in W1's step has no floor."""
    problem = make_problem(rows=1, tokens=16, width=6, with_state=False, seed=seed)
    config = ScanConfig(4, 8, decay_to="zero")
    check_parity(forgotten(problem, b_alpha), config, implementation, dtypes=[torch.float64])


def test_head_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(heads=3, resets=((1, 8),))
    config = ScanConfig(4, 8, implementation="chunked")
    whole = everything(problem, config)
    monkeypatch.setattr("hope.scan.run._CPU_SLICE", 1)
    error, name = worst_error(whole, everything(problem, config))
    assert error < 1e-13, name


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 24, 32, 64, 96])
def test_unit_lower_inverse(n: int) -> None:
    strict = torch.randn(3, n, n, dtype=torch.float64).tril(-1) * 0.3
    eye = torch.eye(n, dtype=torch.float64)
    product = unit_lower_inverse(strict) @ (eye + strict)
    torch.testing.assert_close(product, eye.expand(3, n, n), rtol=0, atol=1e-9)


def test_activation_and_its_derivatives() -> None:
    z = torch.linspace(-12, 12, 101, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.gelu(z, approximate="tanh")
    (first,) = torch.autograd.grad(expected.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    shape = (1, 1, 101, 1)
    z = z.detach().view(shape)
    scratch = Scratch(z)
    torch.testing.assert_close(gelu(z, scratch).flatten(), expected.detach())
    act, slope = gelu_slope(z, scratch)
    torch.testing.assert_close(act.flatten(), expected.detach())
    torch.testing.assert_close(slope.flatten(), first.detach())
    act, slope, curvature = gelu_curvature(z, 60, scratch)
    torch.testing.assert_close(act.flatten(), expected.detach())
    torch.testing.assert_close(slope.flatten(), first.detach())
    torch.testing.assert_close(curvature.flatten(), second[:60])


@pytest.mark.parametrize("tokens", [1, 7, 16, 48, 64, 96, 128, 192, 201, 256])
@pytest.mark.parametrize("memory_chunk", [1, 3, 16, 64, 67, 100, 128])
def test_tiles_are_whole_parts_of_whole_blocks(tokens: int, memory_chunk: int) -> None:
    padded = tokens if tokens < memory_chunk else tokens + -tokens % memory_chunk
    config = ScanConfig(memory_chunk=memory_chunk, projection_chunk=memory_chunk * 512)
    shape = chunk_shape(config, padded, width=32)
    assert padded % shape.tile == 0
    assert shape.tile % shape.part == 0
    assert shape.part % shape.block == 0
    assert shape.mem % shape.part == 0
    assert shape.tile == shape.part or shape.part == shape.mem
    assert shape.tile <= max(TILE, shape.mem)


@pytest.mark.parametrize("width", [4, 32, 64, 128])
def test_blocks_divide_the_chunk(width: int) -> None:
    for tokens in itertools.chain(range(1, 200), (256, 512)):
        assert tokens % block_length(tokens, width) == 0
        assert block_length(tokens, width) >= min(tokens, 16)
    assert block_length(256, width) == min(64, max(16, width))
