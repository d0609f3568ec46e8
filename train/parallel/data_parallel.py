"""Plain data parallelism: every rank holds the whole model and its rows of the global batch.

Gradients are sums over tokens, so ranks only add (`train.parallel.reduction`): the result does not
depend on how many rows each rank had.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from train.parallel.pulse import Pulse


class DataParallel:
    """This process's place among the data-parallel ranks, as torchrun's environment tells it.

    A context manager: the process group is made on entry and destroyed on exit. One process needs
    no group, and every collective is then the identity. pulse: where this process is.
    """

    def __init__(self) -> None:
        self.pulse = Pulse()
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))

    @classmethod
    def alone(cls) -> DataParallel:
        """One process by itself, whatever the environment says."""
        ranks = cls()
        ranks.size, ranks.rank = 1, 0
        return ranks

    def __enter__(self) -> DataParallel:
        if self.size > 1:
            with self.pulse.collective("init_process_group"):
                store, rank, size = next(rendezvous("env://"))
                # torchrun keeps one store over its restarts, with the addresses of ranks that died.
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = PrefixStore(f"restart {restart} of {size} ranks", store)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files and the logs."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Add numbers over the ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        with self.pulse.collective("all_reduce of numbers"):
            dist.all_reduce(total)
        return [float(value) for value in total]

    def broadcast(self, value: Any) -> Any:
        """The first rank's `value`, on every rank; plain data only."""
        if self.size == 1:
            return value
        box = [value]
        with self.pulse.collective("broadcast of plain data"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with self.pulse.collective("barrier"):
                dist.barrier()
