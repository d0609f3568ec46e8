"""Ranks that share a store with attempts that died."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from tools.nodes import free_port
from train.parallel.attempts import of_this_attempt


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server: TCPStore, seconds: float) -> TCPStore:
    return TCPStore(
        "127.0.0.1", server.port, wait_for_workers=False, timeout=timedelta(seconds=seconds)
    )


def attempt(
    server: TCPStore, size: int, alive: Sequence[int], seconds: float = 30
) -> list[bytes | Exception]:
    """What each rank that lives reads of what the first one wrote, or why it reads nothing."""

    def rank(number: int) -> bytes | Exception:
        try:
            store = of_this_attempt(client(server, seconds), number, size)
            if number == 0:
                assert not store.check(["address"])
                store.set("address", uuid.uuid4().hex)
            return store.get("address")
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, alive))


@pytest.mark.parametrize("size", [2, 5])
def test_every_attempt_has_a_part_of_its_own(size: int, server: TCPStore) -> None:
    seen = set()
    for _ in range(3):
        read = attempt(server, size, range(size))
        assert len(set(read)) == 1
        assert isinstance(read[0], bytes)
        seen.add(read[0])
    assert len(seen) == 3


def test_what_an_attempt_left_that_died_on_the_way_misleads_nobody(server: TCPStore) -> None:
    """Of three ranks one never came; then the first of them did not; then all come."""
    without_the_last = attempt(server, 3, [0, 1], seconds=1)
    assert "of 3 ranks these did not come: 2" in str(without_the_last[0])
    without_the_first = attempt(server, 3, [1, 2], seconds=1)
    assert all(isinstance(one, Exception) for one in without_the_first)
    read = attempt(server, 3, [0, 1, 2])
    assert len(set(read)) == 1
    assert isinstance(read[0], bytes)
    two = attempt(server, 2, [0, 1])
    assert len({*read, *two}) == 2


def test_only_ranks_that_did_not_come_are_named(server: TCPStore) -> None:
    first, last = attempt(server, 4, [0, 2], seconds=1)
    assert str(first) == "of 4 ranks these did not come: 1, 3"
    assert isinstance(last, Exception)


@pytest.mark.parametrize("hosted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_agents_need_not_agree_how_often_they_started_ranks(hosted: bool, server: TCPStore) -> None:
    """One restarted ranks that failed, the other came back: torchrun tells 1 and 0."""
    code = "from train.parallel.ranks import Ranks\nwith Ranks() as ranks: print(ranks.sum([2.0]))"
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    told["TORCHELASTIC_USE_AGENT_STORE"] = str(hosted)
    told["MASTER_PORT"] = str(server.port if hosted else free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **told, "RANK": str(n), "TORCHELASTIC_RESTART_COUNT": str(n)},
            stdout=subprocess.PIPE,
        )
        for n in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [b"[4.0]\n"] * 2
