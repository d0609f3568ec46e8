"""What a hang's report says where ranks wait for GPUs, which have no frames to read it off."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
import torch._C._distributed_c10d as c10d

from train import watchdog
from train.collective_waits import Beat
from train.parallel.ranks import Ranks
from train.watchdog import Watchdog, WatchdogConfig


def beat(ticks: int, step: int) -> Beat:
    said = {"ticks": ticks, "entered": 7, "phase": "forward", "step": step, "wait": None}
    return {**said, "time": time.time() - 30}


def test_a_rank_that_waits_for_its_gpu_says_where_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks.alone()
    ranks.size = 3
    ranks.pulse.enter("backward", 5)
    dog = Watchdog(WatchdogConfig(), tmp_path, ranks)
    before, after = {1: beat(1, 4), 2: beat(1, 5)}, {1: beat(1, 4), 2: beat(2, 5)}
    (line,) = dog._missing(before, after)
    assert line == "rank 0 itself stands still, in phase backward of step 5, not in a collective"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    first, silent, alive = dog._missing(before, after)
    assert first.startswith("rank 0 stands still, in phase backward of step 5: it computes, or wai")
    assert silent.startswith("  rank 1: silent for 30")
    assert alive == "  rank 2: alive, in phase forward of step 5, 7 collectives entered"


def test_both_of_torchs_recorders_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's collectives are in one of their own."""
    found = {name: [{"profiling_name": f"{name}:all_reduce"}] for name in ("nccl", "fr")}
    recorded = {"nccl": [], "fr": []}
    for name in found:
        dump = f"_dump_{name}_trace_json"
        says = lambda name=name: json.dumps({"entries": recorded[name]}).encode()  # noqa: E731
        monkeypatch.setattr(c10d, dump, says, raising=False)
    assert watchdog._flight_recorder() == []
    recorded["nccl"] = found["nccl"]
    title, entries = watchdog._flight_recorder()
    assert title == "torch's flight recorder:"
    assert json.loads(entries) == found["nccl"]
    recorded = found
    assert [json.loads(line) for line in watchdog._flight_recorder()[1::2]] == [*found.values()]


class Ticks:
    """In place of the event that ends a watchdog: a clock that goes on by these seconds."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self._seconds = 1000.0, iter(seconds)

    def wait(self, interval: float) -> bool:
        step = next(self._seconds, None)
        self.now += step or 0.0
        return step is None


@pytest.mark.parametrize(
    ("seconds", "moves", "looks"),
    [
        ([1.0] * 20, False, 0),
        ([1.0] * 22, False, 2),
        ([1.0] * 12 + [3600.0] + [1.0] * 6, False, 0),  # suspended: counts as two ticks at most
        ([1.0] * 12 + [3600.0] + [1.0] * 7, False, 1),
        ([1.0] * 40, True, 0),
    ],
)
def test_what_counts_as_standing_still(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: list[float],
    moves: bool,
    looks: int,
) -> None:
    dog, ticks = Watchdog(WatchdogConfig(timeout_s=20), tmp_path, Ranks.alone()), Ticks(seconds)
    looked: list[float] = []
    beats = itertools.count() if moves else itertools.repeat(7)
    pulse = type("Still", (), {"idle_seconds": 1e9, "beats": property(lambda self: next(beats))})
    dog._ended, dog.pulse = ticks, pulse()  # type: ignore[assignment]
    monkeypatch.setattr(dog, "_suspect", lambda: looked.append(ticks.now))
    monkeypatch.setattr(watchdog, "faulthandler", MagicMock())
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: ticks.now)
    dog._watch()
    assert len(looked) == looks


def test_a_rank_is_heard_of_from_the_start(tmp_path: Path) -> None:
    """One that stops before its thread's first heartbeat is not one that never came."""
    ranks = Ranks.alone()
    ranks.size = 2
    with Watchdog(WatchdogConfig(timeout_s=1000), tmp_path, ranks) as dog:
        ranks.pulse.enter("forward", 1)
        dog.share()
        assert dog._read()[0]["phase"] == "forward"


def test_what_it_leaves_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dump of stacks that would end the process later, and no heartbeat for the next run."""
    handler = MagicMock()
    monkeypatch.setattr(watchdog, "faulthandler", handler)
    ranks = Ranks.alone()
    ranks.size = 2
    with Watchdog(WatchdogConfig(timeout_s=0.2), tmp_path, ranks) as dog:
        dog.share()
        while not (handler.dump_traceback_later.called and dog._read()[0]["ticks"] > 1):
            ranks.pulse.enter("forward", 1)
            time.sleep(0.01)
    (later,), said = handler.dump_traceback_later.call_args
    assert (later, said) == (2 * 0.2 + 10, {"exit": True, "file": sys.__stderr__})
    assert handler.method_calls[-1] == call.cancel_dump_traceback_later()
    assert not list((tmp_path / watchdog.HEARTBEATS).iterdir())
