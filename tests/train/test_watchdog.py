"""What a hang's report says where ranks wait for GPUs, which have no frames to read it off."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch._C._distributed_c10d as c10d

from train import watchdog
from train.parallel.ranks import Ranks
from train.waiting import Beat
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
