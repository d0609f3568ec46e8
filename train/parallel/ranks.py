"""A group of ranks that talk: all of the job, or those along some of its axes."""

from __future__ import annotations

import hashlib
import os
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from train.parallel.attempts import of_this_attempt
from train.parallel.pulse import Pulse


class NoDeviceError(RuntimeError):
    """There are more ranks on this machine than GPUs; the message is one line."""


def own_device(local_rank: int, devices: int) -> int:
    """Which of the GPUs that this process sees is its rank's: the only one, where the launcher
    shows each rank its own. Raises NoDeviceError where there is none for it."""
    if devices > 1 and local_rank >= devices:
        raise NoDeviceError(
            f"local rank {local_rank} has no GPU of its own: there are {devices} here; start at "
            "most as many ranks on a machine"
        )
    return local_rank if devices > 1 else 0


def current_device() -> torch.device:
    """Where this rank computes: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def end_groups(whole: bool) -> None:
    """End all process groups. whole: what was given to devices will be done; destroying would wait
    for it, and that for ranks that know of no failure."""
    if whole or not torch.cuda.is_available():
        dist.destroy_process_group()
    else:
        dist.distributed_c10d._abort_process_group()


class Ranks:
    """This process's place among a group of ranks; by default all, as torchrun's environment tells.

    A context manager: the process group is made on entry and destroyed on exit. One process needs
    no group, and every collective is then the identity. pulse: where this process is.

    group: a part of the job (`Ranks.of`); None for all of it.
    """

    def __init__(self) -> None:
        self.pulse = Pulse()
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.group: dist.ProcessGroup | None = None

    @classmethod
    def alone(cls) -> Ranks:
        """One process by itself, whatever the environment says."""
        ranks = cls()
        ranks.size, ranks.rank = 1, 0
        return ranks

    @classmethod
    def of(cls, group: dist.ProcessGroup, pulse: Pulse) -> Ranks:
        """The ranks of a process group that this process is in; pulse: the process's."""
        ranks = cls()
        ranks.pulse = pulse
        ranks.group, ranks.size, ranks.rank = (
            group,
            dist.get_world_size(group),
            dist.get_rank(group),
        )
        return ranks

    def __enter__(self) -> Ranks:
        if self.size > 1:
            backend = "gloo"
            if torch.cuda.is_available():
                local_rank = int(os.environ.get("LOCAL_RANK", "0"))
                torch.cuda.set_device(own_device(local_rank, torch.cuda.device_count()))
                backend = "cpu:gloo,cuda:nccl"
            with self.pulse.collective("init_process_group"):
                store, rank, size = next(rendezvous("env://"))
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    store = of_this_attempt(store, rank, size)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.size > 1:
            end_groups(whole=kind is None)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files and the logs."""
        return self.rank == 0

    def global_rank(self, rank: int) -> int:
        """The rank in the whole job of a rank of this group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def sum(self, values: list[float]) -> list[float]:
        """Add numbers over the ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        with self.pulse.collective("all_reduce of numbers"):
            dist.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def broadcast(self, value: Any) -> Any:
        """The first rank's `value`, on every rank; plain data only."""
        if self.size == 1:
            return value
        box = [value]
        with self.pulse.collective("broadcast of plain data"):
            dist.broadcast_object_list(box, src=self.global_rank(0), group=self.group)
        return box[0]

    def says_first(self, text: str) -> bool:
        """Whether this rank is the first of the job to say so. No collective: others may be at
        something else, or gone; where the store went with the first rank, that has spoken."""
        if self.size == 1:
            return True
        key = f"said {hashlib.sha256(text.encode()).hexdigest()}"
        try:
            return dist.distributed_c10d._get_default_store().add(key, 1) == 1
        except RuntimeError:
            return self.is_first

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with self.pulse.collective("barrier"):
                dist.barrier(group=self.group)
