"""Runs of the trainer on several real processes, as torchrun would start and end them.

A fork server that has everything imported makes the processes in tenths of a second; they meet
through a TCP store on this machine, like those of a launcher.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.__main__", "torch._dynamo", "torch.distributed.tensor"])

GRACE_S = 10.0


@dataclass
class Attempt:
    """How one start of all ranks ended: exit statuses (negative: the signal that killed it)."""

    statuses: list[int]
    started: float  # time.time()
    ended: list[float]

    @property
    def succeeded(self) -> bool:
        """Whether every rank came to the end."""
        return not any(self.statuses)


def attempt(
    arguments: list[str], ranks: int, log: Path, grace_s: float = GRACE_S, limit_s: float = 120.0
) -> Attempt:
    """`python -m train ARGUMENTS` on `ranks` processes.

    When one fails, the others get SIGTERM, and SIGKILL after grace_s: they may find out by
    themselves. Raises TimeoutError, with all of them killed, after limit_s. log: what all wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.time()
    processes = [
        CONTEXT.Process(target=_rank, args=(arguments, rank, ranks, port, str(log)))
        for rank in range(ranks)
    ]
    ended = [0.0] * ranks
    for process in processes:
        process.start()
    waiting = {rank: process.sentinel for rank, process in enumerate(processes)}
    deadline, terminated = started + limit_s, False
    try:
        while waiting:
            ready = wait(waiting.values(), timeout=max(0.0, deadline - time.time()))
            for rank in [rank for rank, sentinel in waiting.items() if sentinel in ready]:
                del waiting[rank]
                processes[rank].join()
                ended[rank] = time.time()
                if processes[rank].exitcode and not terminated:
                    terminated = True
                    deadline = min(deadline, time.time() + grace_s)
                    for other in waiting:
                        processes[other].terminate()
            if waiting and time.time() >= deadline:
                if not terminated:
                    raise TimeoutError(f"ranks {list(waiting)}: {limit_s} s, see {log}")
                for rank in waiting:
                    processes[rank].kill()
                deadline += 60
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Attempt([process.exitcode or 0 for process in processes], started, ended)


def _rank(arguments: list[str], rank: int, ranks: int, port: int, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    from train.__main__ import main
    from train.callbacks import metrics

    metrics.plot_loss = lambda *_: None  # the picture takes longer than the steps
    sys.exit(main(arguments))
