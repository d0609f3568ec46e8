"""Where this process stands among the ranks, and a meeting of all of them that can't hang.

Ranks meet over a key-value store, not a process group: a rank that never comes, or stops in the
middle, is then known by its number.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]


class NoAnswerError(RuntimeError):
    """The first rank, or its store, did not answer in time; the message is one line."""


@dataclass(frozen=True)
class Place:
    """One process among the ranks of a launch. node: the number of its machine."""

    rank: int
    world_size: int
    local_rank: int
    node: int
    host: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """As torchrun, deepspeed's launcher or srun tell it; one process alone without them."""
        rank = int(environment.get("RANK", "0"))
        world_size = int(environment.get("WORLD_SIZE", "1"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        on_node = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1"
        node = rank // int(on_node)
        for name in ("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID"):
            if environment.get(name):
                node = int(environment[name])
                break
        return cls(rank, world_size, local_rank, node, socket.gethostname())


class Meeting:
    """The ranks of `place`'s world around one store; every wait ends after `seconds`.

    The calls are made by all ranks in the same order, each with a name of its own.
    """

    def __init__(self, store: Store, place: Place, seconds: float) -> None:
        self.store, self.place, self.seconds = store, place, seconds

    @classmethod
    def at_master(
        cls, place: Place, seconds: float, environment: Mapping[str, str] = os.environ
    ) -> Meeting:
        """Meet at MASTER_ADDR:MASTER_PORT, hosted by the first rank or by torchrun's agent.

        Raises NoAnswerError when nothing listens there in time.
        """
        host = environment.get("MASTER_ADDR", "127.0.0.1")
        port = int(environment.get("MASTER_PORT", "0"))
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = TCPStore(
                host,
                port,
                is_master=place.rank == 0 and not hosted,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
        except (RuntimeError, ValueError) as error:
            why = str(error).split("\n")[0]
            raise NoAnswerError(
                f"rank {place.rank} on {place.host}: nothing answered at {host}:{port} within "
                f"{seconds:g} s ({why}); is node 0 up, and can this node reach it?"
            ) from None
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"preflight/{attempt}", store), place, seconds)

    def gather(self, name: str, value: Any, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """On the first rank, the plain value of every rank (of `ranks`) that answered in time, by
        rank; on the others an empty dictionary."""
        self.store.set(f"{name}/{self.place.rank}", json.dumps(value))
        if self.place.rank > 0:
            return {}
        deadline = time.monotonic() + self.seconds
        found = {}
        for rank in range(self.place.world_size) if ranks is None else ranks:
            key = f"{name}/{rank}"
            left = max(deadline - time.monotonic(), 0.001)
            if self._arrives(key, left):
                found[rank] = json.loads(self.store.get(key))
        return found

    def share(self, name: str, value: Any = None) -> Any:
        """The first rank's plain `value`, on every rank. NoAnswerError when it does not come.

        The others wait for as long as the first one may have waited for a rank that is missing.
        """
        if self.place.rank == 0:
            self.store.set(name, json.dumps(value))
            return value
        most = 2 * self.seconds + 10
        if not self._arrives(name, most):
            raise NoAnswerError(
                f"rank {self.place.rank} on {self.place.host}: rank 0 did not answer within "
                f"{most:g} s"
            )
        return json.loads(self.store.get(name))

    def _arrives(self, key: str, seconds: float) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True

    def clock_offset(
        self, ranks: list[int], clock: Callable[[], float] = time.time, rounds: int = 8
    ) -> tuple[float, float] | None:
        """Seconds by which this rank's clock is ahead of the first rank's, and the half round trip
        that bounds the error; measured for `ranks` one after the other, by all ranks together.

        None on the other ranks, and where the first rank stopped answering.
        """
        best: tuple[float, float] | None = None
        for rank in ranks:
            for turn in range(rounds):
                ask, answer = f"clock/{rank}/{turn}", f"clock/{rank}/{turn}/answer"
                if self.place.rank == 0:
                    if not self._arrives(ask, self.seconds):
                        break
                    self.store.set(answer, repr(clock()))
                elif rank == self.place.rank:
                    sent = clock()
                    self.store.set(ask, "")
                    if not self._arrives(answer, 2 * self.seconds):
                        return None
                    theirs = float(self.store.get(answer))
                    came = clock()
                    half = (came - sent) / 2
                    if best is None or half < best[1]:
                        best = (sent + half - theirs, half)
        return best
