"""python -m launch.preflight CONFIG [key=value ...]: is every node fit for this run?

Started by the launcher like the training itself, one process a rank. Prints a table and one line
for every problem, naming the node; exit status 0 when there is none, else 2 on every rank.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from data_pipeline.redaction import redact
from launch import checks
from launch.meeting import Meeting, NoAnswerError, Place
from launch.report import Nodes
from train.config import ConfigError, RunConfig, load_config
from train.parallel.ranks import end_groups

BAD = 2


@dataclass(frozen=True)
class Limits:
    """seconds: that a rank may take for each part; clock_skew: seconds between two clocks;
    memory, shared_memory: bytes that a node must have, the latter free."""

    seconds: float = 120.0
    clock_skew: float = 1.0
    memory: int = 0
    shared_memory: int = 64 << 20


@dataclass(frozen=True)
class Probes:
    """What the checks look at; a test puts a faulty one in."""

    versions: Callable[[], dict[str, str]] = checks.versions
    clock: Callable[[], float] = time.time
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    all_reduce: Callable[[Tensor], Any] = dist.all_reduce
    memory: Callable[[], tuple[int, int]] = checks.memory
    interfaces: Callable[[], dict[str, str]] = checks.interface_addresses


@dataclass
class Preflight:
    """The checks of one rank. config: the run, or why it can't be read."""

    meeting: Meeting
    config: RunConfig | ConfigError
    limits: Limits = Limits()
    probes: Probes = Probes()
    master: str = "127.0.0.1"
    gloo_interface: str | None = None
    hosts: list[str] = field(default_factory=list)

    def run(self) -> tuple[list[str], str]:
        """(problems, table), the same problems on every rank, the table on the first one only.

        Raises NoAnswerError on a rank that the first one does not answer.
        """
        meeting, place = self.meeting, self.meeting.place
        own = self._alone()
        reports = meeting.gather("alone", own)
        opening: dict[str, Any] = {}
        if place.rank == 0:
            nodes = Nodes(reports, self.hosts)
            opening["absent"] = nodes.missing(place.world_size, meeting.seconds, "arrive")
            opening["clocks"] = [ranks[0] for ranks in nodes.ranks.values() if ranks[0] > 0]
            opening["nonce"], opening["folder"] = uuid.uuid4().hex[:12], "no configuration"
            if isinstance(self.config, RunConfig):
                opening["folder"] = checks.write_nonce(self.config.run_dir, opening["nonce"])
        opening = meeting.share("opening", opening)
        try:
            if opening["absent"]:
                meeting.gather("leaving", None, reports)
                return opening["absent"], nodes.table({}) if place.rank == 0 else ""
            own["problems"] += self._together(opening)
            offset = meeting.clock_offset(opening["clocks"], self.probes.clock)
            own["clock"] = offset or ([0.0, 0.0] if place.rank == 0 else None)
            if offset and abs(offset[0]) - offset[1] > self.limits.clock_skew:
                own["problems"].append(
                    f"clock: {offset[0]:+.3f} s beside rank 0's, more than the "
                    f"{self.limits.clock_skew:g} s allowed; is a time service running?"
                )
            reports = meeting.gather("together", own)
        finally:
            if place.rank == 0 and isinstance(self.config, RunConfig):
                checks.nonce_file(self.config.run_dir, opening["nonce"]).unlink(missing_ok=True)
        problems: list[str] = []
        table = ""
        if place.rank == 0:
            problems, table = self._verdict(Nodes(reports, self.hosts))
        problems = meeting.share("verdict", problems)
        meeting.gather("leaving", None, reports)  # who hosts the store stays until all have read
        return problems, table

    def _alone(self) -> dict[str, Any]:
        """What this rank finds by itself."""
        place, limits, probes = self.meeting.place, self.limits, self.probes
        device, problems = checks.device_of(place.local_rank)
        facts = dict(probes.versions())
        if isinstance(self.config, ConfigError):
            problems.append(f"config: {self.config}")
        else:
            facts["config"] = checks.config_digest(self.config)
            if place.local_rank == 0:
                facts["data"], found = checks.check_data(self.config)
                problems += found
        problems += checks.check_matmul(device, probes.matmul)
        total, shared = probes.memory()
        if total < limits.memory:
            problems.append(f"memory: {total >> 20} MiB, {limits.memory >> 20} MiB are asked for")
        if shared < limits.shared_memory:
            problems.append(
                f"/dev/shm: {shared >> 20} MiB are free, {limits.shared_memory >> 20} MiB are "
                "asked for (docker: --shm-size)"
            )
        network, found = checks.network(self.master, probes.interfaces(), self.gloo_interface)
        return {
            "host": place.host,
            "node": place.node,
            "facts": facts,
            "problems": problems + found,
            "memory": total,
            "shared_memory": shared,
            "network": network,
            "device": str(device),
        }

    def _together(self, opening: dict[str, Any]) -> list[str]:
        """What takes the other ranks: the run folder and a collective. Returns the problems."""
        problems = []
        rank = self.meeting.place.rank
        if isinstance(self.config, RunConfig):
            deadline = time.monotonic() + min(10.0, self.limits.seconds)

            def wait() -> bool:
                time.sleep(0.2)
                return time.monotonic() < deadline

            problem = opening["folder"]
            if problem is None:
                problem = checks.check_folder(self.config.run_dir, opening["nonce"], rank, wait)
            elif rank > 0:
                problem = None  # the first rank's, told once
            problems += [f"folder: {problem}"] if problem else []
        return problems + self._collective()

    def _collective(self) -> list[str]:
        """Sum known values over the ranks, exactly, and gather what each one gave."""
        place, seconds = self.meeting.place, timedelta(seconds=self.limits.seconds)
        device, _ = checks.device_of(place.local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        problems = []
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self.meeting.store),
                rank=place.rank,
                world_size=place.world_size,
                timeout=seconds,
            )
            whole = False
            try:
                problems += self._sum_and_gather(torch.device("cpu"))
                if device.type == "cuda":
                    problems += self._sum_and_gather(device)
                whole = True
            finally:
                end_groups(whole)
        except (RuntimeError, ValueError) as error:
            problems.append(f"collective: {' '.join(str(error).split())[:200]}")
        return problems

    def _sum_and_gather(self, device: torch.device) -> list[str]:
        place = self.meeting.place
        pattern = torch.arange(1024, dtype=torch.float32, device=device) % 251
        mine = pattern * (place.rank + 1)
        every = [torch.full_like(mine, -1) for _ in range(place.world_size)]
        dist.all_gather(every, mine)
        total = pattern * (place.rank + 1)
        self.probes.all_reduce(total)  # whatever arrived: the others wait in it
        for rank, got in enumerate(every):
            if not torch.equal(got, pattern * (rank + 1)):
                return [f"collective: what rank {rank} sent on {device} arrived changed"]
        expected = pattern * (place.world_size * (place.world_size + 1) // 2)
        if not torch.equal(total, expected):
            wrong = int((total != expected).sum())
            return [f"collective: {wrong} of 1024 sums over the ranks are wrong on {device}"]
        return []

    def _verdict(self, nodes: Nodes) -> tuple[list[str], str]:
        found = {rank: list(report["problems"]) for rank, report in nodes.reports.items()}
        for rank, problems in nodes.differing().items():
            found[rank] += problems
        world = self.meeting.place.world_size
        silent = nodes.missing(world, self.meeting.seconds, "finish the checks")
        if silent:  # the others' collectives failed because of it
            found = {r: [p for p in ps if p[:11] != "collective:"] for r, ps in found.items()}
        return silent + nodes.lines(found), nodes.table(found)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 fit, 2 not (or bad input)."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.preflight", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("config", help="the YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as for python -m train"
    )
    limits = Limits()
    add = parser.add_argument
    add("--timeout", type=float, default=limits.seconds, help="seconds a rank has for each part")
    add("--max-clock-skew", type=float, default=limits.clock_skew, help="seconds")
    add("--min-memory-mib", type=int, default=limits.memory >> 20, help="of a node")
    add("--min-shm-mib", type=int, default=limits.shared_memory >> 20, help="free in /dev/shm")
    add("--hosts", default="", help="names of the nodes in the order of ranks, with commas")
    for same_as_train in ("--resume", "--resume-or-start"):
        add(same_as_train, action="store_true", help=argparse.SUPPRESS)
    add("--resume-from", help=argparse.SUPPRESS)
    add("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    config: RunConfig | ConfigError
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        config = error
    place = Place.from_environment()
    torch.set_num_threads(1)
    try:
        preflight = Preflight(
            Meeting.at_master(place, options.timeout),
            config,
            Limits(
                options.timeout,
                options.max_clock_skew,
                options.min_memory_mib << 20,
                options.min_shm_mib << 20,
            ),
            master=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
            hosts=[host for host in options.hosts.split(",") if host],
        )
        problems, table = preflight.run()
    except (NoAnswerError, dist.DistError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return BAD
    if place.rank == 0:
        print(table, flush=True)
        for problem in problems:
            print(redact(f"error: {problem}"), file=sys.stderr, flush=True)
    return BAD if problems else 0


if __name__ == "__main__":
    sys.exit(main())
