"""What must hold for any implementation, and how the operator behaves inside PyTorch."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hope.scan import MemoryState, ScanConfig, scan
from hope.scan.contract import ScanImplementation
from tests.hope.scan.cases import (
    IMPLEMENTATIONS,
    Problem,
    everything,
    make_problem,
    run,
    worst_error,
)

ALL = ["reference", *IMPLEMENTATIONS]
CONFIG = ScanConfig(memory_chunk=4, projection_chunk=8, checkpoint_chunks=2)


def piece(problem: Problem, start: int, end: int, state: MemoryState | None) -> Problem:
    reset = None if problem.reset is None else problem.reset[:, start:end]
    x, q = problem.x[:, :, start:end], problem.q[:, :, start:end]
    return problem._replace(x=x, q=q, state=state, reset=reset)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
def test_pieces_with_carried_state_equal_the_whole(
    implementation: ScanImplementation, read: str
) -> None:
    config = replace(CONFIG, implementation=implementation, read=read)
    problem = make_problem(tokens=27, memories=6, resets=((1, 16),))
    out, final = run(problem, config)
    state, outs = problem.state, []
    for start, end in ((0, 8), (8, 24), (24, 27)):
        piece_out, state = run(piece(problem, start, end, state), config)
        outs.append(piece_out)
    assert state is not None
    torch.testing.assert_close(torch.cat(outs, 2), out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-12)

    leaves = list(problem.leaves().values())
    whole = torch.autograd.grad(out.sum() + final.w1.square().sum(), leaves)
    pieces = torch.autograd.grad(sum(z.sum() for z in outs) + state.w1.square().sum(), leaves)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("decay_to", ["initial", "zero"])
def test_a_reset_starts_a_separate_sequence(
    implementation: ScanImplementation, decay_to: str
) -> None:
    config = replace(CONFIG, implementation=implementation, decay_to=decay_to)
    problem = make_problem(tokens=29, resets=((0, 16), (1, 16)))
    out, final = run(problem, config)
    first, _ = run(piece(problem, 0, 16, problem.state)._replace(reset=None), config)
    second, last = run(piece(problem, 16, 29, None)._replace(reset=None), config)
    torch.testing.assert_close(out, torch.cat([first, second], 2), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(final, last, rtol=1e-11, atol=1e-12)
    leaves = list(problem.leaves().values())
    loss, separate = out.square().sum(), first.square().sum() + second.square().sum()
    together = torch.autograd.grad(loss + final.w2.sum(), leaves)
    apart = torch.autograd.grad(separate + last.w2.sum(), leaves)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", ALL)
def test_rows_are_independent(implementation: ScanImplementation) -> None:
    config = replace(CONFIG, implementation=implementation)
    problem = make_problem(rows=3).to(torch.float32)
    other = make_problem(rows=3, seed=9).to(torch.float32)
    row = torch.tensor([False, True, False]).view(-1, 1, 1, 1)
    assert problem.state is not None
    assert other.state is not None
    changed = problem._replace(
        x=torch.where(row, other.x, problem.x),
        q=torch.where(row, other.q, problem.q),
        state=MemoryState(
            *(torch.where(row, b, a) for a, b in zip(problem.state, other.state, strict=True))
        ),
    )
    out, state = run(problem, config)
    changed_out, changed_state = run(changed, config)
    assert torch.equal(out[[0, 2]], changed_out[[0, 2]])
    assert not torch.equal(out[1], changed_out[1])
    for a, b in zip(state, changed_state, strict=True):
        assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])
    gradient = torch.autograd.grad(out[0].sum(), problem.x)[0]
    assert gradient[0].abs().max() > 0
    assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("read", ["causal", "chunk_start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_output_depends_on_a_later_token(
    implementation: ScanImplementation, read: str, dtype: torch.dtype
) -> None:
    config = replace(CONFIG, implementation=implementation, read=read)
    problem = make_problem(tokens=22, memories=6, with_state=False).to(torch.float32)
    x, q = problem.x.detach().to(dtype), problem.q.detach().to(dtype)
    out, _ = scan(x, q, problem.weights, config)
    assert torch.equal(out, scan(x, q, problem.weights, config)[0])
    for token in (0, 3, 4, 9, 15, 16, 21):
        later_x, later_q = x.clone(), q.clone()
        later_x[:, :, token] += 1
        later_q[:, :, token] -= 1
        later, _ = scan(later_x, later_q, problem.weights, config)
        assert torch.equal(later[:, :, :token], out[:, :, :token])
        assert not torch.equal(later[:, :, token], out[:, :, token])


@pytest.mark.parametrize("implementation", ALL)
def test_what_a_token_sees_of_its_own_chunk(implementation: ScanImplementation) -> None:
    problem = make_problem(tokens=16, with_state=False).to(torch.float32)
    x = problem.x.detach().clone()
    x[:, :, 9] += 1
    for read, sees in (("causal", True), ("chunk_start", False)):
        config = replace(CONFIG, implementation=implementation, read=read)
        out, _ = run(problem, config)
        changed, _ = run(problem._replace(x=x), config)
        assert torch.equal(out[:, :, :10], changed[:, :, :10])
        for token in (10, 11):
            assert torch.equal(out[:, :, token], changed[:, :, token]) != sees
        assert not torch.equal(out[:, :, 12], changed[:, :, 12])


@pytest.mark.parametrize("memories", [5, 6])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_weight_of_every_memory_gets_a_gradient(
    implementation: ScanImplementation, memories: int
) -> None:
    problem = make_problem(tokens=24, memories=memories, with_state=False)
    out, _ = run(problem, replace(CONFIG, implementation=implementation))
    gradients = torch.autograd.grad(out.square().sum(), list(problem.weights))
    for gradient in gradients:
        assert gradient.abs().flatten(1 if gradient.dim() == 4 else 0).amax(-1).min() > 1e-8
        assert (gradient != 0).double().mean() > 0.99


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_activations(implementation: ScanImplementation) -> None:
    """bfloat16 in and out, float32 inside: the error is that of rounding the inputs and outputs."""
    config = replace(CONFIG, implementation=implementation)
    rounded = make_problem(tokens=40).to(torch.bfloat16)
    state = None if rounded.state is None else MemoryState(*(z.float() for z in rounded.state))
    out, final = run(rounded._replace(state=state), config)
    assert out.dtype == torch.bfloat16
    assert final.w1.dtype == torch.float32
    exact_out, exact_final = run(rounded.to(torch.float32), config)
    torch.testing.assert_close(out, exact_out.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(final, exact_final, rtol=0, atol=0)
    gradients = torch.autograd.grad(out.float().sum(), [rounded.x, rounded.weights.w1])
    assert all(z.dtype == torch.bfloat16 and z.isfinite().all() for z in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_reach_the_fast_weights(implementation: ScanImplementation) -> None:
    problem = make_problem(tokens=20).to(torch.float32)
    config = replace(CONFIG, implementation=implementation)
    plain = everything(problem, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(problem, config)
    assert worst_error(plain, inside)[0] == 0


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_gradients(implementation: ScanImplementation, guard: type) -> None:
    problem, config = make_problem(), replace(CONFIG, implementation=implementation)
    out, state = run(problem, config)
    with guard():
        plain_out, plain_state = run(problem, config)
    assert torch.equal(out, plain_out)
    assert torch.equal(state.w1, plain_state.w1)
    assert not plain_out.requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_activation_checkpointing(implementation: ScanImplementation) -> None:
    problem = make_problem().to(torch.float32)
    config = replace(CONFIG, implementation=implementation)
    leaves = list(problem.leaves().values())

    def call(x: Tensor) -> Tensor:
        out, final = run(problem._replace(x=x), config)
        return out.square().sum() + final.w1.sum()

    plain = torch.autograd.grad(call(problem.x), leaves)
    recomputed = checkpoint(call, problem.x, use_reentrant=False)
    again = torch.autograd.grad(recomputed, leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_torch_compile_makes_one_graph(implementation: ScanImplementation) -> None:
    problem = make_problem(resets=((1, 8),)).to(torch.float32)
    config = replace(CONFIG, implementation=implementation)
    leaves = list(problem.leaves().values())

    def call(x: Tensor, reset: Tensor | None) -> Tensor:
        out, final = run(problem._replace(x=2 * x, reset=reset), config)
        return out.square().sum() + final.w2.sum()

    plain = call(problem.x, problem.reset)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(problem.x, problem.reset)
    torch.testing.assert_close(compiled, plain)
    expected = torch.autograd.grad(plain, leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_double_backward_is_refused(implementation: ScanImplementation) -> None:
    problem = make_problem(tokens=8)
    out, _ = run(problem, replace(CONFIG, implementation=implementation))
    (gradient,) = torch.autograd.grad(out.square().sum(), problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="scan: no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("every", [1, 2, 4, 7])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_states_kept_for_backward_follow_checkpoint_chunks(
    implementation: ScanImplementation, every: int
) -> None:
    chunks = 8
    problem = make_problem(tokens=8 * chunks, with_state=False)
    config = replace(CONFIG, checkpoint_chunks=every, implementation=implementation)
    saved: list[Tensor] = []

    def keep(z: Tensor) -> Tensor:
        saved.append(z)
        return z

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        run(problem, config)
    kept = sum(z.numel() for z in saved)
    inputs = sum(z.numel() for z in problem.leaves().values())
    one_state = 2 * problem.weights.w1.numel() * problem.x.shape[0]
    # The state before the first token is not kept: it is the weights.
    assert kept == inputs + (-(-chunks // every) - 1) * one_state
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z), torch.no_grad():
        saved.clear()
        run(problem, config)
    assert not saved


@pytest.mark.parametrize(("memory_chunk", "projection_chunk"), [(16, 64), (64, 64), (64, 256)])
@pytest.mark.parametrize("cosine", [0.0, 0.95])
def test_the_memories_stay_bounded_over_a_long_sequence(
    memory_chunk: int, projection_chunk: int, cosine: float
) -> None:
    """On random and similar tokens, from a W1 of spectral norm about 1 (at 2 it is not so)."""
    problem = make_problem(1, 2, 4096, 16, with_state=False).to(torch.float32)
    x = problem.x.detach()
    x = cosine**0.5 * x[:, :, :1] + (1 - cosine) ** 0.5 * x
    weights = problem.weights._replace(
        w1=problem.weights.w1 / 2, b_alpha=torch.full_like(problem.weights.b_alpha, 9.0)
    )
    with torch.no_grad():
        out, state = scan(x, problem.q, weights, ScanConfig(memory_chunk, projection_chunk))
    assert out.abs().max() < 3
    for final, start in zip(state, weights[:2], strict=True):
        assert (final.norm(dim=(3, 4)) < 3 * start[:, None].norm(dim=(3, 4))).all()


@pytest.mark.parametrize("stream", ["one token", "two tokens", "cosine 0.95", "random"])
@pytest.mark.parametrize("gain", [1.0, 5.0])
def test_the_target_rule_stays_bounded_at_full_strength(stream: str, gain: float) -> None:
    """Every write at eta = 1, 64 tokens with one frozen gradient: the normalised rule is at NaN."""
    problem = make_problem(1, 2, 4096, 16, with_state=False).to(torch.float32)
    x = problem.x.detach()
    if stream.endswith(("token", "tokens")):
        x = x[:, :, : 1 if stream == "one token" else 2].repeat(1, 1, 4096, 1)[:, :, :4096]
    elif stream == "cosine 0.95":
        x = 0.95**0.5 * x[:, :, :1] + 0.05**0.5 * x
    weights = problem.weights._replace(
        w1=gain * problem.weights.w1,
        w2=2 * problem.weights.w2,
        b_eta=torch.full_like(problem.weights.b_eta, 60.0),
        w_alpha=torch.zeros_like(problem.weights.w_alpha),
        b_alpha=torch.full_like(problem.weights.b_alpha, 9.0),
    )
    with torch.no_grad():
        _, state = scan(x, problem.q, weights, ScanConfig(64, 64, 1.0, "target"))
    start = weights.w1.norm(dim=(2, 3))[:, None]
    # A write leaves |W1 u| at most 2 rho / (rho^2 + 0.01) <= 10, in each of 16 directions.
    assert (state.w1.norm(dim=(3, 4)) < start + 40).all()
    torch.testing.assert_close(state.w2, weights.w2[:, None].expand_as(state.w2))


@pytest.mark.parametrize("implementation", ALL)
def test_writes_switched_off_leave_the_initial_memory(implementation: ScanImplementation) -> None:
    problem = make_problem(tokens=20, with_state=False)
    config = replace(CONFIG, implementation=implementation, eta_max=0)
    out, state = run(problem, config)
    for final, start in zip(state, problem.weights[:2], strict=True):
        torch.testing.assert_close(final, start[:, None].expand_as(final))
    gradients = torch.autograd.grad(out.sum(), list(problem.weights))
    assert all(z.isfinite().all() for z in gradients)
    assert gradients[0][4].abs().max() > 0
