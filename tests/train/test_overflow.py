"""Gradients, sums and norms that float32 does not hold: no step is taken, nothing is lost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hope import HopeModel
from tests.train.test_cadence import OPTIMIZER, TOKENS, backward, config_with, constant, weights
from train.optim.build import build_cadence
from train.optim.config import LevelOptimizerConfig, OptimizerConfig
from train.optim.finite import LARGEST, OverflowedError, Trial, check_sums, largest
from train.optim.level import Level
from train.parallel.ranks import Ranks


@pytest.mark.parametrize("size", [1e20, 1e30, 1e37])
def test_gradients_whose_squares_overflow_are_clipped_like_any_other(size: float) -> None:
    """They are finite, so nothing is skipped: the step is the one of gradients size times less."""
    after = []
    for scale in (1.0, size):
        model = HopeModel(config_with("step", 3 * TOKENS))
        cadence = build_cadence(model, model.config, OptimizerConfig(name="sgd", clip_norm=0.5))
        backward(model, 0)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(scale)
        report = cadence.step({"fast", "l0"}, TOKENS, constant)
        assert report.grad_norm > 0.5 * scale
        after.append(weights(model))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-5, atol=1e-7)


def enlarge(model: nn.Module, where: str, size: float) -> None:
    for name, parameter in model.named_parameters():
        if where in name and parameter.grad is not None:
            parameter.grad.fill_(size)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("firing", [{"fast", "l0"}, {"fast", "l0", "l1"}])
def test_a_step_whose_sum_overflows_is_as_if_it_had_not_been(
    firing: set[str], resumed: bool
) -> None:
    """Of a level that goes on to accumulate, and of one that fires on the sum."""
    config = config_with("step", 1000)
    after = []
    for overflows in (True, False):
        model = HopeModel(config)
        cadence = build_cadence(model, config, OPTIMIZER)
        backward(model, 0)
        enlarge(model, ".cms.levels.1.", 2e38)
        cadence.step({"fast", "l0"}, TOKENS, constant)
        if resumed:
            tensors, plain = copy.deepcopy(cadence.state_dict())
            cadence = build_cadence(model, config, OPTIMIZER)
            cadence.load_state_dict(tensors, plain)
        if overflows:
            backward(model, 1)
            enlarge(model, ".cms.levels.1.", 2e38)
            with pytest.raises(OverflowedError, match="finite gradients overflowed, of level l1:"):
                cadence.step(firing, TOKENS, constant)
            cadence.drop()
        backward(model, 2)
        cadence.step({"fast", "l0"}, TOKENS, constant)
        assert cadence.pending_tokens == {"fast": 0, "l0": 0, "l1": 2 * TOKENS}
        after.append(weights(model) | cadence.state_dict()[0])
    for name, value in after[0].items():
        assert torch.equal(value, after[1][name]), name


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_norm_that_float32_does_not_hold_moves_nothing(clip_norm: float | None) -> None:
    config = config_with("step")
    level = {"l0": LevelOptimizerConfig(clip_norm=clip_norm)}
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER.model_copy(update={"levels": level}))
    before = weights(model)
    backward(model, 0)
    enlarge(model, ".cms.levels.0.", 3e38)
    with pytest.raises(OverflowedError, match="of level l0:"):
        cadence.step({"fast", "l0"}, 1, constant)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("resumed", [False, True])
def test_what_waits_is_there_still_after_a_step_whose_norm_overflows(resumed: bool) -> None:
    """However small the numbers of the last steps were."""
    config = config_with("step", 1000)
    model = HopeModel(config)
    cadence = build_cadence(model, config, OPTIMIZER)
    for seed, size in enumerate((3e38, 1e-3)):
        backward(model, seed)
        enlarge(model, ".cms.levels.1.", size)
        cadence.step({"fast", "l0"}, 1, constant)
    if resumed:
        tensors, plain = copy.deepcopy(cadence.state_dict())
        cadence = build_cadence(model, config, OPTIMIZER)
        cadence.load_state_dict(tensors, plain)
    held = {p: s["accumulated_grad"].clone() for p, s in cadence.state.items()}
    backward(model, 2)
    with pytest.raises(OverflowedError, match="of level l1:"):
        cadence.step({"fast", "l0", "l1"}, 1, constant)
    assert cadence.pending_tokens == {"fast": 0, "l0": 0, "l1": 2}
    assert all(torch.equal(cadence.state[p]["accumulated_grad"], h) for p, h in held.items())


@pytest.mark.parametrize("norm", [math.nan, math.inf, 4e38])
def test_a_norm_that_is_no_number_of_float32_is_refused(norm: float) -> None:
    """NaN: what two ranks have of a sum may overflow to either side."""
    levels = [Level("slow", {}, [])]
    for of_all, of_levels in ((norm, {"slow": 1.0}), (1.0, {"slow": norm})):
        with pytest.raises(OverflowedError, match="of level slow"):
            check_sums(levels, of_all, of_levels, None, Ranks.alone())


class TwoAlike(Ranks):
    """Two ranks that have the same numbers."""

    def sum(self, numbers: list[float]) -> list[float]:
        return [2 * number for number in numbers]


@pytest.mark.parametrize(
    ("reduce", "held", "refused"),
    [
        ("every_step", 0.6 * LARGEST, False),  # of other elements: shares of one sum
        ("every_step", math.inf, True),
        ("at_update", 0.4 * LARGEST, False),
        ("at_update", 0.6 * LARGEST, True),  # of the same elements: to be added up
    ],
)
def test_what_waits_on_several_ranks_overflows(reduce, held: float, refused: bool) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    level = Level("slow", {"w": parameter}, [], reduce=reduce)
    state = {parameter: {"accumulated_grad": torch.tensor([1.0, -held])}}
    world = TwoAlike()
    if not refused:
        return check_sums([level], 1.0, {}, state, world)
    with pytest.raises(OverflowedError, match="of level slow"):
        check_sums([level], 1.0, {}, state, world)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_larger_than_any_number(number: float) -> None:
    assert largest([torch.ones(2), None, torch.tensor([1.0, number])]) == math.inf


def test_a_trial_gives_back_what_was_counted_and_what_waited() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    level = Level("l0", {"a": parameter}, [], tokens=3, bound=2.0)
    held = {parameter: {"accumulated_grad": torch.ones(2)}}
    trial = Trial(held, [level])
    level.take(4, 1e30)
    held[parameter]["accumulated_grad"].fill_(math.inf)
    parameter.grad = torch.ones(2)
    state = trial.undo()
    assert (level.tokens, level.bound, parameter.grad) == (3, 2.0, None)
    assert state[parameter]["accumulated_grad"].tolist() == [1, 1]
