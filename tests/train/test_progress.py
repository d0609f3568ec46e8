"""What a terminal shows of a run."""

from __future__ import annotations

import io
import os
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


def test_a_terminal_without_a_size_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, terminal = os.openpty()  # 0 by 0, as in a container
    os.set_blocking(shown, False)
    trainer: Any = SimpleNamespace(
        clock=TokenClock(PERIODS), target_tokens=9, domains=None, level_changes=[], finished=False
    )
    with open(terminal, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        progress = Progress()
        progress.on_start(trainer)
        record = SimpleNamespace(loss=10.125, tokens=3, tokens_per_second=1e6, mfu=None)
        progress.on_step(trainer, cast(Any, record))
        assert b"loss 10.125" in os.read(shown, 999)
        progress.on_end(trainer)
    os.close(shown)


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
    record = SimpleNamespace(loss=10.125, tokens=clock.tokens, tokens_per_second=1e6, mfu=0.1234)
    progress.on_step(trainer, cast(Any, record))
    shown = screen.getvalue()
    progress.on_end(trainer)
    parts = re.split(r"[\r\n]|\x1b\[A", shown)
    assert not terminal or max(map(len, parts)) <= 80
    for wanted in (r"loss 10\.125", "tok/s", "mid in 524.3K slow in 3.7M slowest in 16.3M"):
        assert re.search(wanted, shown)
    assert re.search(r"<.*[0-9:]+," if terminal else r"MFU 12\.3% \| ETA 2:46:39 ", shown)


def test_eta_counts_what_lies_between_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = TokenClock(PERIODS)
    trainer: Any = SimpleNamespace(
        clock=clock, target_tokens=1_000_000, domains=None, level_changes=[], finished=False
    )
    progress = Progress()
    progress.on_start(trainer)
    told = []
    # Steps say 1,000 tokens a second; with an evaluation after each it is 100. Then back to 500.
    # Whole steps end behind a total that is no multiple of them.
    for tokens, passed in ((1000, 0), (4000, 30), (500, 15), (2500, 20), (1_001_000, 20)):
        now += passed
        record = SimpleNamespace(loss=1.0, tokens=tokens, tokens_per_second=1e3, mfu=None)
        progress.on_step(trainer, cast(Any, record))
        told.append(re.findall(r"ETA (\S+) ", capsys.readouterr().err))
    assert told == [["16:39"], ["2:46:00"], ["16:39"], ["2:46:15"], ["00:00"]]


def test_a_resume_that_has_nothing_to_do_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    clock = TokenClock(PERIODS)
    clock.advance(4096)
    trainer: Any = SimpleNamespace(
        clock=clock, target_tokens=2048, domains=None, level_changes=[], finished=False
    )
    Progress().on_start(trainer)
    told = (
        "nothing to train: 4,096 tokens are trained already, and training.stop_at_tokens is 2,048"
    )
    assert capsys.readouterr().err == f"{told}\n"
