"""The exact consequences of the cadence that hope-spec section 3 lists."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hope import CMSConfig, HopeConfig, HopeModel, LevelConfig, TitansConfig
from hope.scan import ScanConfig
from train.optim.build import build_cadence, decays
from train.optim.cadence import Cadence
from train.optim.config import LevelOptimizerConfig, OptimizerConfig
from train.optim.level import Level
from train.optim.levels import group_by_level

TOKENS = 64
OPTIMIZER = OptimizerConfig(lr=0.01, clip_norm=0.5)


def config_with(*periods: int | str, hidden: int = 8) -> HopeConfig:
    levels = tuple(
        LevelConfig(name=f"l{i}", hidden_size=hidden, update_every_tokens=period)  # type: ignore[arg-type]
        for i, period in enumerate(periods)
    )
    scan = ScanConfig(memory_chunk=4, projection_chunk=8)
    return HopeConfig(
        vocab_size=50,
        dim=16,
        num_layers=2,
        num_heads=2,
        titans=TitansConfig(scan=scan),
        cms=CMSConfig(levels=levels),
    )


def backward(model: HopeModel, seed: int) -> None:
    """Add the summed-loss gradient of one batch of TOKENS tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (2, TOKENS // 2 + 1), generator=generator)
    logits, _ = model(tokens[:, :-1])
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def constant(level: str) -> float:
    return OPTIMIZER.level(level).peak_lr


def ordinary_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: int) -> None:
    """What any trainer does: mean gradient, clip, step."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(tokens)
    nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    optimizer.zero_grad()


def plain_adamw(model: nn.Module) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        fused=True,
    )


def test_every_parameter_is_in_one_level() -> None:
    config = config_with("step", 100, 1000)
    names = [name for name, _ in HopeModel(config).named_parameters()]
    groups = group_by_level(names, config)
    assert list(groups) == ["fast", "l0", "l1", "l2"]
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    assert all(".cms.levels.1." in name for name in groups["l1"])
    assert not any(".cms.levels." in name for name in groups["fast"])


@pytest.mark.parametrize("periods", [("step", "step"), ("step", 64), (1, 64), (32, 33)])
def test_periods_of_at_most_a_step_are_ordinary_training_to_the_bit(periods) -> None:
    config = config_with(*periods)
    model = HopeModel(config)
    reference = copy.deepcopy(model)
    cadence, adamw = build_cadence(model, config, OPTIMIZER), plain_adamw(reference)
    everything = {level.name for level in cadence.levels}
    for seed in range(4):
        backward(model, seed)
        cadence.step(everything, TOKENS, constant)
        backward(reference, seed)
        ordinary_step(reference, adamw, TOKENS)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("every", [2, 3, 5])
def test_firing_every_n_steps_is_one_step_on_an_n_times_larger_batch(every: int) -> None:
    """The rest frozen: all N micro-batches are seen by the same weights. Bit for bit."""
    config = config_with("step", every * TOKENS)
    model = HopeModel(config)
    reference = copy.deepcopy(model)
    cadence = build_cadence(model, config, OPTIMIZER)
    slow = {name for name in weights(model) if ".cms.levels.1." in name}
    frozen_model, frozen_reference = (
        [p for name, p in m.named_parameters() if name not in slow] for m in (model, reference)
    )
    adamw = plain_adamw(reference)
    for start in range(0, 3 * every, every):
        for seed in range(start, start + every):
            backward(model, seed)
            for parameter in frozen_model:
                parameter.grad = None
            last = seed == start + every - 1
            cadence.step({"l1"} if last else set(), TOKENS, constant)
            backward(reference, seed)  # gradients add up: one larger batch
        for parameter in frozen_reference:
            parameter.grad = None
        ordinary_step(reference, adamw, every * TOKENS)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_level_does_not_move_between_firings_and_others_do() -> None:
    config = config_with("step", 10 * TOKENS)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    before = weights(model)
    for seed in range(3):
        backward(model, seed)
        cadence.step({"fast", "l0"}, TOKENS, constant)
    after = weights(model)
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == (".cms.levels.1." not in name), name
    slow = next(level for level in cadence.levels if level.name == "l1")
    assert slow.tokens == 3 * TOKENS
    assert set(cadence.state) == set(slow.parameters.values())
    assert len(slow.optimizers[0].state) == 0


def test_the_sum_is_divided_by_the_tokens_it_saw() -> None:
    """Steps of different sizes: the mean is over tokens, not over steps."""
    config = config_with("step", 1000)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    slow = next(level for level in cadence.levels if level.name == "l1")
    seen: dict[str, Tensor] = {}

    def spy() -> None:
        seen.update({name: p.grad.clone() for name, p in slow.parameters.items()})

    slow.optimizers[0].step = spy  # type: ignore[method-assign]
    total = {name: torch.zeros_like(p) for name, p in slow.parameters.items()}
    sizes = (10, 70, 20)
    for number, size in enumerate(sizes):
        for seed in range(size // 10):
            backward(model, 100 * number + seed)
        for name, parameter in slow.parameters.items():
            total[name] += parameter.grad
        cadence.clip_norm = float("inf")
        cadence.step({"l1"} if number == 2 else set(), size, constant)
    for name, mean in seen.items():
        torch.testing.assert_close(mean, total[name] / sum(sizes), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cut", [2, 6])
def test_state_in_the_middle_of_a_period_resumes_to_the_bit(cut: int) -> None:
    """In a cadence that has done nothing, and in one that goes back and knows what came after."""
    config = config_with("step", 4 * TOKENS)
    straight = HopeModel(config)
    cadence = build_cadence(straight, config, OPTIMIZER)

    def run(model: HopeModel, cadence: Cadence, seeds: range) -> None:
        for seed in seeds:
            backward(model, seed)
            firing = {"fast", "l0"} | ({"l1"} if seed % 4 == 3 else set())
            cadence.step(firing, TOKENS, constant)

    run(straight, cadence, range(cut))  # two steps into a period
    saved = copy.deepcopy((straight.state_dict(), *cadence.state_dict()))
    run(straight, cadence, range(cut, 13))
    expected = weights(straight)
    for taken_up in (build_cadence(straight, config, OPTIMIZER), cadence):
        values, tensors, plain = copy.deepcopy(saved)
        straight.load_state_dict(values)
        taken_up.load_state_dict(tensors, plain)
        run(straight, taken_up, range(cut, 13))
        assert all(torch.equal(p, expected[name]) for name, p in straight.named_parameters())


def test_the_sum_is_kept_in_float32_whatever_the_weights_are() -> None:
    """In bfloat16 256 + 1 is 256, so a long period would see its first gradients only."""
    config = config_with("step", 1000)
    model = HopeModel(config).bfloat16()
    cadence = build_cadence(model, config, OPTIMIZER)
    slow = next(level for level in cadence.levels if level.name == "l1")
    seen: list[Tensor] = []
    slow.optimizers[0].step = lambda: seen.extend(  # type: ignore[method-assign, assignment]
        p.grad for p in slow.parameters.values()
    )
    cadence.clip_norm = float("inf")
    for step, gradient in enumerate([256.0, 1.0, 1.0, 1.0, 1.0]):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        cadence.step({"l1"} if step == 4 else set(), 1, constant)
    assert len(seen) == len(slow.parameters)
    assert all((mean == 52).all() for mean in seen)


def test_clipping_is_one_norm_over_what_fires() -> None:
    config = config_with("step", 1000)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    backward(model, 0)
    fires = [p for n, p in model.named_parameters() if ".cms.levels.1." not in n]
    expected = torch.stack([(p.grad / TOKENS).norm() for p in fires]).norm()
    report = cadence.step({"fast", "l0"}, TOKENS, constant)
    assert report.grad_norm == pytest.approx(float(expected), rel=1e-5)
    assert set(report.learning_rates) == {"fast", "l0"}
    assert set(report.level_norms) == {"fast", "l0"}
    together = math.hypot(*report.level_norms.values())
    assert together == pytest.approx(report.grad_norm, rel=1e-5)


def test_a_level_is_clipped_to_its_own_norm_and_then_all_to_one() -> None:
    config = config_with("step")
    model = HopeModel(config)
    backward(model, 0)
    means = {name: p.grad / TOKENS for name, p in model.named_parameters()}  # type: ignore[operator]
    own = {name for name in means if ".cms.levels.0." in name}
    level, rest = (
        float(torch.stack([g.norm() for n, g in means.items() if (n in own) == inside]).norm())
        for inside in (True, False)
    )
    left = math.hypot(level / 4, rest)
    settings = OptimizerConfig(
        name="sgd",
        lr=1.0,
        weight_decay=0.0,
        clip_norm=left / 2,
        levels={"l0": LevelOptimizerConfig(clip_norm=level / 4)},
    )
    before = weights(model)
    report = build_cadence(model, config, settings).step({"fast", "l0"}, TOKENS, lambda name: 1.0)
    assert report.grad_norm == pytest.approx(left, rel=1e-5)
    assert report.level_norms == pytest.approx({"fast": rest, "l0": level}, rel=1e-5)
    for name, parameter in model.named_parameters():
        moved = means[name] / (8 if name in own else 2)
        torch.testing.assert_close(before[name] - parameter, moved, rtol=1e-3, atol=1e-6)


def test_lr_scale_is_the_levels_own() -> None:
    config = config_with("step", 64)
    settings = OPTIMIZER.model_copy(update={"levels": {"l1": LevelOptimizerConfig(lr_scale=0.0)}})
    model = HopeModel(config)
    cadence = build_cadence(model, config, settings)
    before = weights(model)
    backward(model, 0)
    rates = {level.name: settings.level(level.name).peak_lr for level in cadence.levels}
    report = cadence.step({"fast", "l0", "l1"}, TOKENS, rates.__getitem__)
    assert report.learning_rates == {"fast": 0.01, "l0": 0.01, "l1": 0.0}
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (".cms.levels.1." in name), name


@pytest.mark.parametrize("where", [".cms.levels.1.", "embedding"])
def test_a_gradient_that_is_not_finite_changes_nothing(where: str) -> None:
    config = config_with("step", 1000)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    backward(model, 0)
    cadence.step({"fast", "l0"}, TOKENS, constant)
    before = weights(model)
    held = {p: s["accumulated_grad"].clone() for p, s in cadence.state.items()}
    backward(model, 1)
    broken = next(p for n, p in model.named_parameters() if where in n)
    broken.grad.view(-1)[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        cadence.step({"fast", "l0"}, TOKENS, constant)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(cadence.state[p]["accumulated_grad"], h) for p, h in held.items())
    assert next(level for level in cadence.levels if level.name == "l1").tokens == TOKENS
    cadence.drop()
    backward(model, 2)
    assert cadence.agree()[1] is None
    cadence.drop()  # and with it what was agreed on
    backward(model, 3)
    broken.grad.view(-1)[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        cadence.step({"fast", "l0"}, TOKENS, constant)


def test_a_level_steps_at_the_rates_that_it_is_given() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [one]}, {"params": [other], "lr_ratio": 0.5, "tokens": 0}]
    level = Level("a", {"one": one, "other": other}, [torch.optim.SGD(groups, lr=1.0)])
    for lr, tokens in ((0.25, 64), (0.0, 128), (2.0, 192)):
        before = one.tolist(), other.tolist()
        one.grad, other.grad = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 1.0])
        level.step(lr, tokens)
        assert one.tolist() == [before[0][0] - lr, before[0][1] + 2 * lr]
        assert other.tolist() == [before[1][0] - 2 * lr, before[1][1] - lr / 2]
        assert level.optimizers[0].param_groups[1]["tokens"] == tokens
        assert one.grad is other.grad is None
