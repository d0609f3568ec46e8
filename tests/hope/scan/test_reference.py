"""The token loop against finite differences and against what the equations say by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hope.scan import MemoryState, ScanConfig, ScanWeights, scan
from tests.hope.scan.cases import make_problem, run


@pytest.mark.parametrize("rule", ["normalised", "target", "input", "off"])
@pytest.mark.parametrize("decay_to", ["initial", "zero"])
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
def test_gradients_match_finite_differences(rule: str, decay_to: str, read: str) -> None:
    memories = 6 if read == "causal" else 5
    problem = make_problem(1, 1, 5, 2, memories=memories, resets=((0, 4),))
    config = ScanConfig(2, 4, 0.4, rule, decay_to, read, implementation="reference")

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        weights, state = ScanWeights(*leaves[2:8]), MemoryState(*leaves[8:])
        out, final = scan(leaves[0], leaves[1], weights, config, state, problem.reset)
        return out, *final

    assert torch.autograd.gradcheck(call, tuple(problem.leaves().values()), fast_mode=True)


def test_without_steps_and_decay_the_memories_stay_and_the_read_is_the_initial_memory() -> None:
    problem = make_problem(with_state=False)
    weights = problem.weights._replace(b_alpha=torch.full_like(problem.weights.b_alpha, 60.0))
    config = ScanConfig(4, 8, eta_max=0, implementation="reference")
    out, state = scan(problem.x, problem.q, weights, config)
    for final, start in zip(state, weights[:2], strict=True):
        torch.testing.assert_close(final, start[:, None].expand_as(final), rtol=0, atol=1e-14)
    hidden = torch.einsum("nhd,bntd->bnth", weights.w2[4], problem.q)
    act = torch.nn.functional.gelu(hidden, approximate="tanh")
    expected = problem.q + torch.einsum("ndh,bnth->bntd", weights.w1[4], act)
    torch.testing.assert_close(out, expected)


def test_decay_alone_goes_to_its_target() -> None:
    problem = make_problem(tokens=64)
    weights = problem.weights._replace(b_alpha=torch.full_like(problem.weights.b_alpha, -5.0))
    for decay_to, target in (("initial", weights.w1[:, None]), ("zero", torch.zeros(()))):
        config = ScanConfig(4, 8, 0, decay_to=decay_to, implementation="reference")
        _, state = scan(problem.x, problem.q, weights, config, problem.state)
        expected = target.expand_as(state.w1).to(state.w1)
        torch.testing.assert_close(state.w1, expected, rtol=0, atol=1e-8)


def test_one_write_moves_the_answer_towards_the_target_by_about_eta() -> None:
    """The reason for the normalised delta rule, seen on M_mem after one token."""
    problem = make_problem(4, 2, 1, 8, 4, with_state=False)
    eta = 0.25
    weights = problem.weights._replace(
        w2=4 * problem.weights.w2,
        w_eta=torch.zeros_like(problem.weights.w_eta),
        b_eta=torch.full_like(problem.weights.b_eta, 60.0),
        w_alpha=torch.zeros_like(problem.weights.w_alpha),
        b_alpha=torch.full_like(problem.weights.b_alpha, 60.0),
    )

    def layer(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
        act = torch.nn.functional.gelu((w2 @ z[..., None]), approximate="tanh")
        return z + (w1 @ act)[..., 0]

    x = problem.x[:, :, 0]
    k = torch.nn.functional.normalize(layer(weights.w1[0], weights.w2[0], x), dim=-1)
    v = torch.nn.functional.normalize(layer(weights.w1[1], weights.w2[1], x), dim=-1)
    target = layer(weights.w1[4], weights.w2[4], v)
    config = ScanConfig(1, 1, eta, implementation="reference")
    _, state = scan(problem.x, problem.q, weights, config)
    w2 = weights.w2[4].expand_as(state.w2[4])
    before = layer(weights.w1[4], w2, k) - target
    a = torch.nn.functional.gelu(w2 @ k[..., None], approximate="tanh")[..., 0]
    # W1's write alone: its delta shrinks W1 a by eta, its gradient adds eta * (v - k) side.
    after = layer(state.w1[4], w2, k) - target
    rho2 = (a * a).sum(-1, keepdim=True)
    shrunk = (weights.w1[4] @ a[..., None])[..., 0]
    expected = before - eta * (shrunk + rho2 / (rho2 + 0.01) * before)
    torch.testing.assert_close(after, expected)


def test_one_full_target_write_makes_the_answer_the_target() -> None:
    """At eta = 1 M(k) is the unit target, up to the floor under |a|; W2 stays as it was."""
    problem = make_problem(4, 2, 1, 8, 4, with_state=False)
    weights = problem.weights._replace(
        w2=4 * problem.weights.w2,
        w_eta=torch.zeros_like(problem.weights.w_eta),
        b_eta=torch.full_like(problem.weights.b_eta, 60.0),
        w_alpha=torch.zeros_like(problem.weights.w_alpha),
        b_alpha=torch.full_like(problem.weights.b_alpha, 60.0),
    )
    config = ScanConfig(1, 1, 1.0, "target", implementation="reference")
    _, state = scan(problem.x, problem.q, weights, config)
    for box in range(5):
        before = MemoryState(weights.w1[box], weights.w2[box].expand_as(state.w2[box]))
        x = problem.x[:, :, 0]
        k, v = (unit(answer(weights.w1[i], weights.w2[i], x)[0]) for i in (0, 1))
        target = unit(answer(*before, v)[0])
        after, a = answer(state.w1[box], state.w2[box], k)
        floor = 0.01 / ((a * a).sum(-1, keepdim=True) + 0.01)
        torch.testing.assert_close(after, target + floor * (k - target))
        torch.testing.assert_close(state.w2[box], before.w2)


def unit(z: Tensor) -> Tensor:
    return torch.nn.functional.normalize(z, dim=-1)


def answer(w1: Tensor, w2: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """M(z) and the activation behind it."""
    a = torch.nn.functional.gelu((w2 @ z[..., None])[..., 0], approximate="tanh")
    return z + (w1 @ a[..., None])[..., 0], a


def test_out_dtype_and_state_dtype() -> None:
    problem = make_problem(with_state=False).to(torch.float32)
    problem = problem._replace(x=problem.x.bfloat16(), q=problem.q.bfloat16())
    out, state = run(problem, ScanConfig(4, 8, implementation="reference"))
    assert out.dtype == torch.bfloat16
    assert state.w1.dtype == state.w2.dtype == torch.float32
