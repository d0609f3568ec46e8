"""Muon and M3 against the equations written down plainly, in float64."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hope import HopeModel
from tests.train.test_cadence import TOKENS, backward, config_with
from tests.train.test_levels_in_a_run import rows_of
from tests.train.test_trainer import final_tensors
from train.optim.build import build_cadence, decays, is_matrix
from train.optim.config import OptimizerConfig
from train.optim.m3 import M3
from train.optim.muon import Muon
from train.optim.newton_schulz import COEFFICIENTS, orthogonalise
from train.run import train

SHAPES = [(6, 9), (9, 6), (7, 7), (3, 5, 8), (2, 2, 8, 3)]


def plain_newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """The odd polynomial applied to the singular values, in float64."""
    a, b, c = COEFFICIENTS
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / max(s.square().sum().sqrt().item(), 1e-7)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def each_matrix(stack: Tensor, function: Any) -> Tensor:
    flat = stack.reshape(-1, *stack.shape[-2:])
    return torch.stack([function(one) for one in flat]).view(stack.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(x)
    torch.testing.assert_close(
        found.double(), each_matrix(x, plain_newton_schulz), rtol=1e-4, atol=1e-5
    )
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
    assert not orthogonalise(torch.zeros(shape)).any()


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) * 0.1 ** (i % 3) for i in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_equation(shape: tuple[int, ...], nesterov: bool) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parameter = nn.Parameter(start.clone())
    optimizer = Muon([parameter], lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.3)
    expected, buffer = start.double(), torch.zeros(shape).double()
    for grad in gradients(shape, 6):
        parameter.grad = grad.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * grad.double()
        update = 0.1 * grad.double() + 0.9 * buffer if nesterov else buffer
        factor = 0.2 * math.sqrt(max(shape[-2:]))
        expected = expected * (1 - 0.02 * 0.3)
        expected = expected - 0.02 * factor * each_matrix(update, plain_newton_schulz)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs_where_that_works(adjust: Any) -> None:
    """Whole matrices; torch's Newton-Schulz is in bfloat16."""
    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = Muon([ours], lr=0.02, weight_decay=0.1, adjust_lr=adjust)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    for grad in gradients((24, 40), 5):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        one.step()
        other.step()
    moved = (theirs - start).norm()
    assert float((ours - theirs).detach().norm() / moved.detach()) < 0.03


def plain_m3(
    start: Tensor, grads: list[Tensor], tokens: list[int], variant: str, window: tuple[str, int]
) -> Tensor:
    """Algorithm 1 line by line, in float64; every sum of a window formed from its list."""
    p = start.double()
    m1, m2, v = (torch.zeros_like(p) for _ in range(3))
    seen: list[Tensor] = []
    before = 0
    for t, (grad, n) in enumerate(zip(grads, tokens, strict=True), start=1):
        g = grad.double()
        seen.append(g)
        if variant == "paper":
            m1, v = m1 + 0.9 * g, v + 0.8 * g**2
            root = v.sqrt()
        else:
            m1, v = 0.9 * m1 + 0.1 * g, 0.8 * v + 0.2 * g**2
            root = (v / (1 - 0.8**t)).sqrt()
        direction = each_matrix(m1, plain_newton_schulz) + 0.5 * each_matrix(
            m2, plain_newton_schulz
        )
        p = p * (1 - 0.01 * 0.2) - 0.01 * direction / (root + 1e-2)
        kind, length = window
        ends = t % length == 0 if kind == "steps" else n // length > before // length
        before = n
        if ends:
            total = torch.stack(seen).sum(0)
            m2 = m2 + 0.7 * total if variant == "paper" else 0.7 * m2 + 0.3 * total / len(seen)
            seen = []
    return p


@pytest.mark.parametrize("variant", ["paper", "ema"])
@pytest.mark.parametrize("window", [("steps", 3), ("tokens", 1000)])
@pytest.mark.parametrize("shape", [(6, 9), (3, 8, 5)])
def test_m3_is_its_algorithm(variant: Any, window: tuple[str, int], shape: Any) -> None:
    rng = random.Random(3)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grads = gradients(shape, 14)
    n, tokens = 0, []
    for _ in grads:
        n += rng.choice((64, 333, 700, 2100))
        tokens.append(n)
    parameter = nn.Parameter(start.clone())
    every = {f"slow_every_{window[0]}": window[1]}
    make = lambda p: M3(  # noqa: E731
        [p], lr=0.01, betas=(0.9, 0.8, 0.7), eps=1e-2, weight_decay=0.2, variant=variant, **every
    )
    optimizer = make(parameter)
    for number, (grad, n) in enumerate(zip(grads, tokens, strict=True)):
        if number == 8:  # taken up from its state, as a checkpoint does
            state = {key: value.clone() for key, value in optimizer.state[parameter].items()}
            parameter = nn.Parameter(parameter.detach().clone())
            optimizer = make(parameter)
            optimizer.state[parameter] = state
        parameter.grad = grad.clone()
        optimizer.param_groups[0]["tokens"] = n
        optimizer.step()
    expected = plain_m3(start, grads, tokens, variant, window)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-3, atol=2e-4)
    assert float((expected - start).abs().max()) > 0.05


def test_what_they_refuse() -> None:
    vector, matrix = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"Muon orthogonalises matrices; .* shape \[3\]"):
        Muon([vector])
    with pytest.raises(ValueError, match="M3 orthogonalises matrices"):
        M3([vector], slow_every_steps=2)
    for windows in ({}, {"slow_every_steps": 2, "slow_every_tokens": 5}):
        with pytest.raises(ValueError, match="one of the two"):
            M3([matrix], **windows)


def test_matrices_are_what_maps_vectors_to_vectors() -> None:
    model = HopeModel(replace(config_with("step", 100), tie_embeddings=False))
    chosen = {
        name.rpartition("layers.0.")[2]
        for name, p in model.named_parameters()
        if is_matrix(name, p)
    }
    chosen = {name for name in chosen if not name.startswith("layers.")}
    mixer = {"memory_w1", "memory_w2", "x_in.weight", "q_in.weight", "gate.weight", "out.weight"}
    levels = {f"cms.levels.{i}.{part}.weight" for i in (0, 1) for part in ("gate", "up", "down")}
    assert chosen == {f"mixer.{name}" for name in mixer} | levels
    plain = {name for name, p in model.named_parameters() if not decays(name, p)}
    gains = ("norm.weight", "head_norm", "b_eta", "b_alpha", "embedding.weight")
    assert plain == {name for name, _ in model.named_parameters() if name.endswith(gains)}


def test_every_number_of_the_section_reaches_its_optimizer() -> None:
    said: dict[str, dict[str, Any]] = {
        "muon": {"momentum": 0.7, "nesterov": False, "ns_steps": 3, "adjust_lr": "original"},
        "m3": {
            "variant": "paper",
            "betas": (0.1, 0.2, 0.3),
            "alpha": 0.4,
            "eps": 0.1,
            "ns_steps": 4,
        },
        "sgd": {"momentum": 0.6, "nesterov": True},
    }
    said["m3"]["lr_ratio"] = 0.2
    kinds = {f"l{i}": {"name": name} for i, name in enumerate(said)}
    own = {"betas": (0.8, 0.7), "eps": 1e-5, "weight_decay": 0.3}
    settings = OptimizerConfig(**own, **said, levels=kinds)  # type: ignore[arg-type]
    config = config_with("step", "step", "step")
    levels = {one.name: one for one in build_cadence(HopeModel(config), config, settings).levels}
    wanted = {"fast": own, "l0": said["muon"], "l1": {**said["m3"], "slow_every_steps": 16}}
    for name, numbers in {**wanted, "l2": said["sgd"]}.items():
        (group, *_) = levels[name].optimizers[-1].param_groups
        assert {**group, **numbers, "weight_decay": 0.3} == group, name


@pytest.mark.parametrize(
    "name",
    ["m3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "sgd", "adamw"))],
)
def test_a_run_learns_and_resumes_to_the_bit_with_each(
    make_config, tmp_path: Any, name: Any
) -> None:
    rates = {"muon": 0.02, "m3": 0.02, "sgd": 0.5, "adamw": 0.01}
    changes = {
        "optimizer.name": name,
        "optimizer.lr": rates[name],
        "optimizer.m3": {"slow_every_tokens": 700},
        "training.total_tokens": 40 * 256,
        "checkpoint.every_tokens": 10**6,
        "evaluation.every_tokens": 10**6,
    }
    straight = make_config(**changes)
    train(straight, resume=False)
    steps = [row["loss"] for row in rows_of(straight, "step")]
    assert sum(steps[-5:]) / 5 < steps[0] - (0.1 if name == "sgd" else 0.5)
    for number, stop in enumerate((7 * 256, None)):
        part = make_config(**{"run_dir": str(tmp_path / "parts"), "training.stop_at_tokens": stop})
        train(part, resume=number > 0)
    first, second = final_tensors(straight), final_tensors(part)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    expected = {"muon": "momentum_buffer", "m3": "slow_momentum", "adamw": "exp_avg"}
    if name in expected:
        matrix = "optimizer/layers.0.cms.levels.1.gate.weight/"
        assert matrix + expected[name] in first
    if name in ("muon", "m3"):
        assert "optimizer/embedding.weight/exp_avg" in first


def test_m3s_slow_momentum_is_on_the_levels_clock() -> None:
    """The cadence tells the optimizer the token count of each firing."""
    config = config_with("step", 2 * TOKENS)
    model = copy.deepcopy(HopeModel(config))
    settings = OptimizerConfig(name="m3", m3={"slow_every_tokens": 5 * TOKENS})  # type: ignore[arg-type]
    cadence = build_cadence(model, config, settings)
    slow = next(level for level in cadence.levels if level.name == "l1")
    matrix = next(p for name, p in slow.parameters.items() if name.endswith("gate.weight"))
    counts = []
    for step in range(1, 13):
        backward(model, step)
        firing = {"fast", "l0"} | ({"l1"} if step % 2 == 0 else set())
        cadence.step(firing, TOKENS, lambda _: 1e-3, step * TOKENS)
        if "l1" in firing:
            counts.append(int(slow.optimizer_state(matrix)["slow_count"]))
    assert counts == [1, 2, 0, 1, 0, 1]  # firings at 2, 4, 6 | 8, 10 | 12: past 5 and 10
