"""Nested CMS (Eq. 72): the cadence against a plain-Python simulation, and its exact limits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig
from tests.train.test_cadence import OPTIMIZER, TOKENS, backward, config_with, constant, weights
from train.clock import TokenClock
from train.optim.build import build_cadence
from train.optim.cadence import Cadence
from train.optim.config import LevelOptimizerConfig, OptimizerConfig
from train.optim.finite import OverflowedError
from train.optim.level import Level
from train.optim.levels import periods
from train.parallel.ranks import Ranks
from train.parallel.reduction import GradientReduction


def nested_with(*every: int | str) -> HopeConfig:
    config = config_with(*every)
    return replace(config, cms=replace(config.cms, mode="nested"))


def run(
    model: HopeModel,
    cadence: Cadence,
    config: HopeConfig,
    steps: range,
    settings: OptimizerConfig = OPTIMIZER,
) -> None:
    """Steps of TOKENS tokens, each level when the clock says so."""
    clock = TokenClock(periods(config))
    for _ in range(steps.start):
        clock.advance(TOKENS)
    for seed in steps:
        backward(model, seed)
        cadence.step(clock.advance(TOKENS), TOKENS, lambda name: settings.level(name).peak_lr)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


class Adam:
    """AdamW of one number, as arXiv 1711.05101 writes it."""

    def __init__(self, lr: float, decay: float, betas: tuple[float, float], eps: float) -> None:
        self.lr, self.decay, self.betas, self.eps = lr, decay, betas, eps
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, weight: float, gradient: float) -> float:
        one, two = self.betas
        self.t += 1
        self.m = one * self.m + (1 - one) * gradient
        self.v = two * self.v + (1 - two) * gradient**2
        mean, square = self.m / (1 - one**self.t), self.v / (1 - two**self.t)
        weight *= 1 - self.lr * self.decay
        return weight - self.lr * mean / (math.sqrt(square) + self.eps)


class Sgd:
    """Plain gradient descent of one number."""

    def __init__(self, lr: float, decay: float, *_: object) -> None:
        self.lr, self.decay = lr, decay

    def __call__(self, weight: float, gradient: float) -> float:
        return weight - self.lr * (gradient + self.decay * weight)


LR, DECAY, BETAS, EPS = 0.05, 0.1, (0.9, 0.95), 1e-8


def gradients(weights: list[float], step: int) -> list[float]:
    """Gradients, summed over the step's tokens, of a coupled quadratic that moves with time."""
    product = math.prod(weights) - math.sin(1.3 * step)
    return [
        (3 + step % 4) * (product * math.prod(weights[:i] + weights[i + 1 :]) + 0.2 * w - 0.1 * i)
        for i, w in enumerate(weights)
    ]


def simulate(kind: type, every: list[int], steps: int) -> list[list[float]]:
    """The rule of Eq. 72 written down directly: lists of numbers, sums kept whole, no classes.

    every: period of each level in steps, fastest first. Returns the live weights after each step.
    """
    live = [0.9 + 0.3 * i for i in range(len(every))]
    start = list(live)
    rule = [kind(LR, DECAY, BETAS, EPS) for _ in every]
    start_rule = [kind(LR, DECAY, BETAS, EPS) for _ in every]
    seen: list[list[float]] = [[] for _ in every]  # gradient sums since the level fired
    seen_tokens = [0 for _ in every]
    context: list[list[float]] = [[] for _ in every]  # since the next slower level fired
    context_tokens = [0 for _ in every]
    history = []
    for step in range(1, steps + 1):
        tokens = 3 + step % 4
        found = gradients(live, step)
        for i, gradient in enumerate(found):
            seen[i].append(gradient)
            context[i].append(gradient)
            seen_tokens[i] += tokens
            context_tokens[i] += tokens
        moved = list(live)
        for i, period in enumerate(every):
            slower_fires = i + 1 < len(every) and step % every[i + 1] == 0
            if slower_fires:
                start[i] = start_rule[i](start[i], sum(context[i]) / context_tokens[i])
                moved[i] = start[i]
                context[i], context_tokens[i] = [], 0
            elif step % period == 0:
                moved[i] = rule[i](live[i], sum(seen[i]) / seen_tokens[i])
            if slower_fires or step % period == 0:
                seen[i], seen_tokens[i] = [], 0
        live = moved
        history.append(list(live))
    return history


def torch_rule(kind: type, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind is Sgd:
        return torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY)
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


@pytest.mark.parametrize("kind", [Sgd, Adam])
@pytest.mark.parametrize("every", [[1, 3], [2, 6], [1, 2, 6], [2, 4, 12], [1, 1, 5], [1, 3, 6, 12]])
def test_nested_levels_do_what_a_plain_simulation_does(kind: type, every: list[int]) -> None:
    names = [f"l{i}" for i in range(len(every))]
    live = [
        nn.Parameter(torch.tensor([0.9 + 0.3 * i], dtype=torch.float64)) for i in range(len(every))
    ]
    levels = []
    for name, p, slower in zip(names, live, [*names[1:], None], strict=True):
        level = Level(name, {name: p}, [torch_rule(kind, [p])])
        if slower is not None:
            theta0 = nn.Parameter(p.detach().clone())
            level.start = Level(name, {f"{name}@start": theta0}, [torch_rule(kind, [theta0])])
            level.reset_by = slower
        levels.append(level)
    cadence = Cadence(levels, live, math.inf, GradientReduction(Ranks.alone()))
    for step, expected in enumerate(simulate(kind, every, 30), start=1):
        for p, gradient in zip(live, gradients([p.item() for p in live], step), strict=True):
            p.grad = torch.tensor([gradient], dtype=torch.float64)
        firing = {name for name, period in zip(names, every, strict=True) if step % period == 0}
        cadence.step(firing, 3 + step % 4, lambda level: LR)
        # Accumulators are float32 whatever the parameters are.
        assert [p.item() for p in live] == pytest.approx(expected, rel=1e-6, abs=1e-6), step


def test_slower_levels_that_never_fire_leave_the_sequential_cms() -> None:
    nested, plain = nested_with("step", 100_032, 200_064), config_with("step", 100_032, 200_064)
    one, other = HopeModel(nested), HopeModel(plain)
    for model, config in ((one, nested), (other, plain)):
        run(model, build_cadence(model, config, OPTIMIZER), config, range(6))
    assert_equal(one, other)


@pytest.mark.parametrize("every", [("step", "step"), ("step", 64, 64), (32, 64)])
def test_periods_of_at_most_a_step_are_ordinary_training(every: tuple[int | str, ...]) -> None:
    nested, plain = nested_with(*every), config_with(*every)
    one, other = HopeModel(nested), HopeModel(plain)
    for model, config in ((one, nested), (other, plain)):
        run(model, build_cadence(model, config, OPTIMIZER), config, range(5))
    assert_equal(one, other)


def test_a_level_is_set_back_when_the_next_slower_one_fires() -> None:
    config = nested_with("step", 2 * TOKENS, 4 * TOKENS)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    fast, middle, slow = cadence.levels[1:]
    assert (fast.reset_by, middle.reset_by, slow.start) == ("l1", "l2", None)
    first = weights(model)

    def is_start(level: Level) -> bool:
        return all(torch.equal(live, start) for live, start in level.pairs())

    def start_moved(level: Level) -> bool:
        return not all(
            torch.equal(first[n], s)
            for n, (_, s) in zip(level.parameters, level.pairs(), strict=True)
        )

    run(model, cadence, config, range(1))
    assert (is_start(fast), start_moved(fast)) == (False, False)
    run(model, cadence, config, range(1, 2))
    assert (is_start(fast), start_moved(fast)) == (True, True)
    assert (is_start(middle), start_moved(middle)) == (False, False)
    run(model, cadence, config, range(2, 4))
    assert (is_start(fast), is_start(middle), start_moved(middle)) == (True, True, True)
    assert (fast.tokens, fast.start.tokens, middle.start.tokens, slow.tokens) == (0, 0, 0, 0)
    assert not cadence.state


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_state_in_the_middle_of_a_period_resumes_to_the_bit(cut: int) -> None:
    config = nested_with("step", 2 * TOKENS, 4 * TOKENS)
    straight = HopeModel(config)
    cadence = build_cadence(straight, config, OPTIMIZER)
    run(straight, cadence, config, range(cut))
    tensors, plain = cadence.state_dict()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = copy.deepcopy(straight)
    taken_up = build_cadence(resumed, config, OPTIMIZER)
    taken_up.load_state_dict(tensors, plain)
    run(straight, cadence, config, range(cut, 13))
    run(resumed, taken_up, config, range(cut, 13))
    assert_equal(straight, resumed)


def test_a_checkpoint_without_starts_is_refused() -> None:
    config = config_with("step", 2 * TOKENS)
    tensors, plain = build_cadence(HopeModel(config), config, OPTIMIZER).state_dict()
    nested = nested_with("step", 2 * TOKENS)
    plain["tokens"]["l0@start"] = 0
    with pytest.raises(ValueError, match="not of a nested CMS"):
        build_cadence(HopeModel(nested), nested, OPTIMIZER).load_state_dict(tensors, plain)


def test_a_rate_of_zero_holds_a_level_and_its_start() -> None:
    config = nested_with("step", 2 * TOKENS, 4 * TOKENS)
    still = {"l0": LevelOptimizerConfig(lr_scale=0.0)}
    model = HopeModel(config)
    before = weights(model)
    settings = OPTIMIZER.model_copy(update={"levels": still})
    run(model, build_cadence(model, config, settings), config, range(5), settings)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (".cms.levels.0." in name), name


def test_a_gradient_that_is_not_finite_leaves_the_starts_alone() -> None:
    config = nested_with("step", 2 * TOKENS)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    run(model, cadence, config, range(1))
    held: dict[nn.Parameter, Tensor] = {
        p: s["accumulated_grad"].clone() for p, s in cadence.state.items()
    }
    backward(model, 1)
    next(p for n, p in model.named_parameters() if "cms.levels.0." in n).grad.view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError):
        cadence.step({"fast", "l0", "l1"}, TOKENS, constant)
    assert all(torch.equal(cadence.state[p]["accumulated_grad"], h) for p, h in held.items())
    assert cadence.levels[1].start.tokens == TOKENS


def test_a_sum_that_overflows_leaves_the_starts_alone() -> None:
    """l0's own sum fits, for it fires on each step; that of its start does not."""
    config = nested_with("step", 10 * TOKENS)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    backward(model, 0)
    for step in range(2):
        for name, parameter in model.named_parameters():
            if ".cms.levels.0." in name:
                parameter.grad = torch.full_like(parameter, 2e38)
        if step == 0:
            cadence.step({"fast", "l0"}, TOKENS, constant)
            held = {p: s["accumulated_grad"].clone() for p, s in cadence.state.items()}
            before = weights(model)
    with pytest.raises(OverflowedError, match="of level l0:"):
        cadence.step({"fast", "l0"}, TOKENS, constant)
    assert held
    assert all(torch.equal(cadence.state[p]["accumulated_grad"], h) for p, h in held.items())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert cadence.levels[1].start is not None
    assert cadence.levels[1].start.tokens == TOKENS


def test_what_nested_refuses() -> None:
    levels = [
        LevelConfig(name=f"l{i}", hidden_size=8, update_every_tokens=period)
        for i, period in enumerate((100, 250))
    ]
    with pytest.raises(ValueError, match=r"multiples of the next faster one, got \[100, 250\]"):
        CMSConfig(mode="nested", levels=tuple(levels))
