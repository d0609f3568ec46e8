"""The token clock against its definition, and schedules at their corners."""

from __future__ import annotations

import random

import pytest

from train.clock import TokenClock, learning_rate
from train.optim.config import ScheduleConfig


@pytest.mark.parametrize("seed", range(5))
def test_a_level_fires_when_the_number_of_whole_periods_grows(seed: int) -> None:
    rng = random.Random(seed)
    periods = {"fast": 0, "a": rng.randint(1, 500), "b": rng.randint(500, 5000), "c": 40_000}
    clock, tokens = TokenClock(periods), 0
    for _ in range(500):
        step = rng.choice((64, 100, 333, 1024))
        expected = {n for n, p in periods.items() if p == 0 or (tokens + step) // p > tokens // p}
        tokens += step
        assert clock.advance(step) == expected
        assert clock.tokens == tokens
        for name, period in periods.items():
            left = clock.tokens_to_next(name)
            assert left == 0 if period == 0 else (tokens + left) % period == 0 and left > 0


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_ten_to_the_twelve_tokens(seed: int) -> None:
    """Batches grow and change at random; no firing is lost, doubled or late, to the last token."""
    rng = random.Random(seed)
    periods = {"fast": 0, "m": 1_000_000, "four": 4_000_000, "sixteen": 16_000_000}
    clock = TokenClock(periods)
    due = {name: period for name, period in periods.items() if period}
    late = dict.fromkeys(due, 0)
    batch = 0
    while clock.tokens < 10**12:
        if clock.steps % 1000 == 0:
            batch = rng.choice((500_001, 524_288, 999_999, 786_432, rng.randint(1, 10**6)))
        step = min(batch, 10**12 - clock.tokens)
        firing = clock.advance(step)
        for name, at in due.items():
            if (name in firing) != (clock.tokens >= at):
                late[name] += 1
            if clock.tokens >= at:
                due[name] += periods[name]
    assert late == dict.fromkeys(due, 0)
    assert clock.tokens == 10**12
    assert clock.firings == {
        "fast": clock.steps,
        "m": 1_000_000,
        "four": 250_000,
        "sixteen": 62_500,
    }


def test_firings_at_a_trillion_tokens() -> None:
    clock = TokenClock({"slow": 16_000_000})
    clock.tokens = 10**12 - 1_000_000
    assert clock.advance(999_999) == set()
    assert clock.advance(1) == {"slow"}  # 10^12 is 62,500 periods


def test_a_clock_refuses_the_state_of_other_levels() -> None:
    clock = TokenClock({"fast": 0, "a": 10})
    state = clock.state_dict()
    clock.advance(12)
    assert clock.firings == {"fast": 1, "a": 1}
    clock.skip(7)
    assert (clock.tokens, clock.skipped_tokens, clock.tokens_read) == (12, 7, 19)
    clock.load_state_dict(state)
    assert (clock.tokens, clock.steps, clock.firings) == (0, 0, {"fast": 0, "a": 0})
    assert (clock.skipped_tokens, clock.skipped_steps, clock.skipped_in_a_row) == (0, 0, 0)
    with pytest.raises(ValueError, match="levels"):
        TokenClock({"fast": 0}).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("cosine", 0, 0.0),
        ("cosine", 50, 1.0),
        ("cosine", 100, 2.0),
        ("cosine", 550, 2.0 * (0.1 + 0.9 * 0.5)),
        ("cosine", 1000, 0.2),
        ("cosine", 2000, 0.2),
        ("constant", 50, 1.0),
        ("constant", 999, 2.0),
        ("linear", 50, 1.0),
        ("linear", 550, 2.0 * (0.1 + 0.9 * 0.5)),
        ("linear", 1000, 0.2),
        ("linear", 1001, 0.2),
        ("wsd", 50, 1.0),
        ("wsd", 100, 2.0),
        ("wsd", 800, 2.0),
        ("wsd", 850, 2.0 * (0.1 + 0.9 * 0.75)),
        ("wsd", 1000, 0.2),
        ("wsd", 5000, 0.2),
    ],
)
def test_learning_rate_at_its_corners(name: str, tokens: int, expected: float) -> None:
    decay = 200 if name == "wsd" else None
    schedule = ScheduleConfig(name=name, warmup_tokens=100, decay_tokens=decay, min_ratio=0.1)
    assert learning_rate(schedule, 2.0, tokens, 1000) == pytest.approx(expected)
