"""What a terminal shows of a run."""

from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from train.callbacks.progress import Progress
from train.clock import TokenClock

PERIODS = {"step": 0, "mid": 1_048_576, "slow": 4_194_304, "slowest": 16_777_216}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_loss_speed_eta_and_every_slow_level_in_80_columns(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    clock = TokenClock(PERIODS)
    trainer: Any = SimpleNamespace(
        clock=clock, target_tokens=10**10, domains=None, level_changes=[], finished=False
    )
    progress = Progress()
    progress.on_start(trainer)
    time.sleep(0.12)  # a bar moves ten times a second at most
    clock.advance(524_288)
    record = SimpleNamespace(loss=10.125, tokens=clock.tokens, tokens_per_second=1e6)
    progress.on_step(trainer, cast(Any, record))
    shown = screen.getvalue()
    progress.on_end(trainer)
    parts = re.split(r"[\r\n]|\x1b\[A", shown)
    assert not terminal or max(map(len, parts)) <= 80
    for wanted in (r"loss 10\.125", "tok/s", "mid in 524.3K slow in 3.7M slowest in 16.3M"):
        assert re.search(wanted, shown)
    assert re.search(r"<.*[0-9:]+," if terminal else r"ETA \d+ s", shown)
