"""Run a function on several gloo processes, in tenths of a second.

A fork server that has torch loaded already makes the processes; they meet through a file.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "train.engines"])
Result = TypeVar("Result")


def run(
    world_size: int, function: Callable[..., Result], *arguments: Any, seconds: int = 120
) -> list[Result]:
    """`function(rank, *arguments)` on every rank of a gloo group; results in the order of ranks.

    function: importable, a module's own. Arguments and results go through torch.save, so tensors
    may travel both ways. Raises RuntimeError with the traceback of the first
    rank that failed, or that did not answer in time.
    """
    # Not as arguments of the process: tensors would travel as memory that all ranks share.
    packed = io.BytesIO()
    torch.save(arguments, packed)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        ends, processes = [], []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(
                target=_work,
                args=(theirs, rank, world_size, str(meeting), function, packed.getvalue(), seconds),
                daemon=True,
            )
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        try:
            return _collect(ends, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(ends: list[Connection], seconds: int) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = {rank: end for rank, end in enumerate(ends) if rank not in results}
        ready = wait(waiting.values(), timeout=seconds)
        if not ready:
            raise RuntimeError(f"ranks {list(waiting)} did not answer in {seconds} s")
        for rank, end in waiting.items():
            if end not in ready:
                continue
            try:
                failed, payload = end.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if failed:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(ends))]


def _work(
    end: Connection,
    rank: int,
    world_size: int,
    meeting: str,
    function: Callable[..., Any],
    arguments: bytes,
    seconds: int,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        result = io.BytesIO()
        given = torch.load(io.BytesIO(arguments), weights_only=False)
        torch.save(function(rank, *given), result)
        dist.barrier()
        dist.destroy_process_group()
        end.send((False, result.getvalue()))
    except BaseException:
        end.send((True, traceback.format_exc()))
    finally:
        end.close()
