"""From heartbeats to the rank that keeps the others waiting."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from train.collective_waits import Beat, missing, wait_of_training


def beat(ticks: int = 2, wait: tuple[str, list[int]] | None = None) -> Beat:
    return {
        "ticks": ticks,
        "entered": 7,
        "phase": "forward",
        "step": 3,
        "wait": wait,
    }


GATHER, REDUCE, P2P = "all_gather of ranks [0, 1]", ("reduce", [1, 2]), ("p2p", [2, 3])
CASES: list[Any] = [
    ({1: beat()}, ["rank 1 did not arrive at all_gather of ranks [0, 1]: alive, in phase forward"]),
    ({1: beat(1)}, ["rank 1 did not arrive at all_gather of ranks [0, 1]: silent for 30"]),
    ({}, ["rank 1 did not arrive at all_gather of ranks [0, 1]: it left no sign of life"]),
    (
        {1: beat(wait=REDUCE), 2: beat(wait=P2P), 3: beat(1)},
        ["rank 3 did not arrive at p2p of ranks [2, 3], where rank 2 waits: silent for 30"],
    ),
    (
        {1: beat(wait=REDUCE), 2: beat(wait=("gather", [0, 2]))},
        [
            "ranks wait for each other:",
            "  rank 0 in all_gather of ranks [0, 1]",
            "  rank 1 in reduce of ranks [1, 2]",
            "  rank 2 in gather of ranks [0, 2]",
        ],
    ),
    (
        {1: beat(wait=("all_gather", [0, 1]))},
        ["every rank is alive in all_gather of ranks [0, 1]: the network hangs"],
    ),
]


@pytest.mark.parametrize(("after", "expected"), CASES)
def test_the_first_cause_is_named(after: dict[int, Beat], expected: list[str]) -> None:
    before = {rank: beat(1) for rank in after}
    now = {rank: {**one, "time": time.time() - 30} for rank, one in after.items()}
    lines = missing(0, GATHER, [1], before, now)
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        assert line.startswith(wanted)


def test_a_thread_that_computes_waits_in_nothing() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(wait_of_training()))
    thread.start()
    thread.join()
    assert found == [None]
