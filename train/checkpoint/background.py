"""Who writes a rank's part: this process at once, or one beside it from a copy in shared memory.

The copy is what training waits for; where there is a GPU its memory is pinned. Everything is
copied, what has not moved since the last save too: the counters by which torch tells that a tensor
was written to are not raised by its fused optimizers.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from train.checkpoint.pieces import FilePlan, bytes_of
from train.checkpoint.retention import Retention, describe
from train.checkpoint.writer import NewFile, Target, attempt, finish, write_part

Answer = dict[str, Any]
"""{"result": ...} or {"error": one line}."""

EXIT_SECONDS = 20
"""For what is being written when a run fails: of a rank that was killed the part never comes, and
torchrun gives those that are left 30 s to end by themselves."""
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Save:
    """What the ranks have agreed to write; plain, rules: of the first rank."""

    target: Target
    files: list[FilePlan]
    plain: dict[str, Any]
    rules: Retention


class Writer(Protocol):
    """Takes one save at a time."""

    def start(self, save: Save) -> None:
        """Begin; the tensors may change as soon as this returns."""

    def part(self) -> Answer:
        """Wait for this rank's part."""

    def outcome(self) -> Answer:
        """On the first rank, once every rank has its part: wait for the whole."""

    def abandon(self) -> None:
        """Give up the save under way."""

    def close(self) -> None:
        """End what is under way in good order."""


class DirectWriter:
    """Writes from the tensors themselves while training waits.

    entering: told of "save-before-marker", "save-after-marker" and "delete" when they begin.
    """

    def __init__(self, entering: Callable[[str], None]) -> None:
        self._entering = entering
        self._part: Answer = {}
        self._finish: Callable[[], Any] | None = None

    def start(self, save: Save) -> None:
        files = (
            NewFile(plan.name, [plan.header, *map(bytes_of, plan.sources)], plan.tensors)
            for plan in save.files
        )
        self._part = attempt(lambda: write_part(save.target, list(files)))
        self._finish = lambda: finish(save.target, save.plain, save.rules, self._entering)

    def part(self) -> Answer:
        return self._part

    def outcome(self) -> Answer:
        assert self._finish is not None
        return attempt(self._finish)

    def abandon(self) -> None:
        self._finish = None

    def close(self) -> None:
        self._finish = None


class SharedMemory:
    """Memory shared with the process that writes: a region for each file, kept from save to save.

    A region that has become too small is left for a new one; files hardly ever grow. To CUDA its
    addresses must be what they were before then: the next region to lie there would be copied to
    where the old one was.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("checkpoint")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self._end = 0
        self._regions: dict[str, tuple[int, Tensor]] = {}

    def region(self, name: str, size: int) -> tuple[int, Tensor]:
        """(first byte, uint8 [size]) of the region of that name."""
        start, memory = self._regions.get(name, (0, torch.empty(0, dtype=torch.uint8)))
        if memory.numel() < size:
            start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self._end = start + size
            os.ftruncate(self.descriptor, self._end)
            memory = torch.frombuffer(
                mmap.mmap(self.descriptor, size, offset=start), dtype=torch.uint8
            )
            if torch.cuda.is_available():
                torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)
            self._leave(name)
            self._regions[name] = (start, memory)
        return start, memory[:size]

    def _leave(self, name: str) -> None:
        """Unmap the region of that name, if there is one."""
        if name in self._regions:
            _, memory = self._regions.pop(name)
            if torch.cuda.is_available():
                torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def close(self) -> None:
        """Give the memory back."""
        for name in list(self._regions):
            self._leave(name)
        os.close(self.descriptor)


class BackgroundWriter:
    """Copies the tensors, and lets a process beside this one write the copy.

    That process starts with the first save, and again after one that failed.
    """

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent: str | None = None

    def start(self, save: Save) -> None:
        self._unsent = attempt(lambda: self._begin(save)).get("error")

    def _begin(self, save: Save) -> None:
        memory = self._memory = self._memory or SharedMemory()
        files = [self._copy(plan, memory) for plan in save.files]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        target = save.target
        job = {
            "draft": str(target.draft),
            "final": str(target.final),
            "rank": target.rank,
            "ranks": target.ranks,
            "files": files,
            "plain": save.plain if target.rank == 0 else None,
            "rules": describe(save.rules),
        }
        self._send(job, memory.descriptor)

    def part(self) -> Answer:
        return self._receive()

    def outcome(self) -> Answer:
        return self._receive()

    def abandon(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """Let what is being written be written, for EXIT_SECONDS at most."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.write(b'{"stop": true}\n')
                self._process.stdin.flush()
                self._process.wait(EXIT_SECONDS)
        self.abandon()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _copy(self, plan: FilePlan, shared: SharedMemory) -> dict[str, Any]:
        """Copy a file's tensors; the file as part of a job."""
        start, memory = shared.region(plan.name, plan.bytes)
        sizes = [source.nbytes for source in plan.sources]
        for source, part in zip(plan.sources, memory.split(sizes), strict=True):
            part.view(source.dtype).view(source.shape).copy_(source, non_blocking=True)
        return {
            "name": plan.name,
            "header": plan.header.decode("latin-1"),
            "start": start,
            "bytes": plan.bytes,
            "tensors": plan.tensors,
        }

    def _send(self, job: dict[str, Any], descriptor: int) -> None:
        if self._process is None or self._process.poll() is not None:
            path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "train.checkpoint.writer", str(descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[descriptor],
                start_new_session=True,  # Ctrl-C is for the trainer
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> Answer:
        if self._unsent is not None:
            return {"error": self._unsent}
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            return {"error": f"the process that writes checkpoints ended (exit status {code})"}
        answer: Answer = json.loads(line)
        return answer
