"""The watchdog of a rank: a thread that finds a hang, says who is missing, and ends the process.

Every rank writes a small heartbeat file into the run folder; only when its own training thread has
stood still for `timeout_s` does it read those of the others.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import torch
from pydantic import Field

from train.collective_waits import Beat, last_words, missing, wait_of_training
from train.parallel.pulse import REMEMBERED
from train.parallel.ranks import Ranks
from train.section import Section

HANG = 76  # exit status; also of a rank that lost another one in a collective
HEARTBEATS = ".heartbeats"


class WatchdogConfig(Section):
    """Ends the process, exit status 76, when its training thread makes no progress.

    timeout_s: without a new phase, micro-batch or collective. More than the longest of them takes:
    compilation, and the writing of a checkpoint.
    """

    enabled: bool = True
    timeout_s: float = Field(900.0, gt=0)


class Watchdog:
    """A context manager; the thread runs between entry and exit.

    A hang is found after timeout_s and at most 15 % more. A rank that moves on meanwhile was slow,
    and nothing happens.
    """

    def __init__(self, config: WatchdogConfig, run_dir: Path, ranks: Ranks) -> None:
        self.config, self.run_dir = config, run_dir
        self.rank, self.size, self.pulse = ranks.rank, ranks.size, ranks.pulse
        self.interval = min(5.0, config.timeout_s / 20)
        self._shares = False
        self._ticks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.config.enabled:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.config.enabled:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        if self._shares:
            self._file(self.rank).unlink(missing_ok=True)

    def share(self) -> None:
        """The run folder is ours from here on: write heartbeats into it, the first one now. A rank
        that stops before its thread's first would be one that never came."""
        if self.config.enabled and self.size > 1:
            (self.run_dir / HEARTBEATS).mkdir(parents=True, exist_ok=True)
            self._tell()
            self._shares = True  # the thread goes on from here

    def _watch(self) -> None:
        beats, idle, last = 0, 0.0, time.monotonic()
        while not self._ended.wait(self.interval):
            # A machine that was suspended or overloaded stopped this thread too: not a hang.
            now = time.monotonic()
            ran, last = min(now - last, 2 * self.interval), now
            idle = min(self.pulse.idle_seconds, ran + (idle if self.pulse.beats == beats else 0.0))
            beats = self.pulse.beats
            # A thread in C, for a training thread that holds the interpreter and this one with it.
            stderr = sys.__stderr__
            if stderr is not None:
                later = 2 * self.config.timeout_s + 10
                faulthandler.dump_traceback_later(later, exit=True, file=stderr)
            if self._shares:
                self._tell()
            if idle > self.config.timeout_s:
                self._suspect()

    def _suspect(self) -> None:
        """Look twice; if this rank still stands, say why and end the process."""
        beats, before = self.pulse.beats, self._read()
        if self._ended.wait(2 * self.interval):
            return
        if self._shares:
            self._tell()
        after = self._read()
        if self.pulse.beats != beats:
            return
        idle = self.pulse.idle_seconds
        lines = [
            f"watchdog: rank {self.rank} of {self.size} has made no progress for {idle:.1f} s "
            f"(watchdog.timeout_s={self.config.timeout_s:g})",
            *self._missing(before, after),
            "last collectives of this rank, oldest first:",
            *(f"  {call}" for call in list(self.pulse.collectives)),
            *_flight_recorder(),
            "stacks of all threads:",
        ]
        self._report("\n".join(lines) + "\n")
        os._exit(HANG)

    def _missing(self, before: dict[int, Beat], after: dict[int, Beat]) -> list[str]:
        """One line for every rank that keeps the others waiting."""
        call, wait = self.pulse.inside, wait_of_training()
        place = f"of step {self.pulse.step} ({self.pulse.phase})"
        others = [rank for rank in range(self.size) if rank != self.rank]
        if call is not None:
            late = [r for r in others if r not in after or after[r]["entered"] < call.number]
            mine = f"collective {call.number}, {call.name}, {place}"
            if late:
                return missing(self.rank, mine, late, before, after)
            words = {rank: last_words(after.get(rank), before.get(rank)) for rank in others}
            silent = [rank for rank in others if words[rank].startswith("silent")]
            if silent:
                return [f"rank {rank} did not leave {mine}: {words[rank]}" for rank in silent]
            return [f"every rank is alive in {mine}: the network hangs"]
        if wait is None:
            where = f"in phase {self.pulse.phase} of step {self.pulse.step}"
            if self.size == 1 or not torch.cuda.is_available():
                return [f"rank {self.rank} itself stands still, {where}, not in a collective"]
            words = {rank: last_words(after.get(rank), before.get(rank)) for rank in others}
            return [
                f"rank {self.rank} stands still, {where}: it computes, or waits for its GPU, and "
                "that in a collective for GPUs of ranks that are behind; of the others",
                *(f"  rank {rank}: {said}" for rank, said in words.items()),
            ]
        late = [rank for rank in wait.ranks if rank != self.rank]
        return missing(self.rank, f"{wait} {place}", late, before, after)

    def _report(self, text: str) -> None:
        """To hang-rankN.txt and to stderr, with the stacks."""
        stderr = sys.__stderr__
        try:
            path = self.run_dir / f"hang-rank{self.rank}.txt"
            with path.open("w") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            text = path.read_text()
        except OSError as error:
            if stderr is not None:
                faulthandler.dump_traceback(file=stderr, all_threads=True)
            text += f"above: {self.run_dir} can't be written to: {error.strerror}\n"
        if stderr is not None:
            stderr.write(text)
            stderr.flush()

    def _tell(self) -> None:
        """Write this rank's heartbeat."""
        self._ticks += 1
        # Not while it moves: reading a frame's variables keeps them alive until the frame ends.
        wait = wait_of_training() if self.pulse.idle_seconds > self.interval else None
        beat = {
            "ticks": self._ticks,
            "entered": self.pulse.entered,
            "phase": self.pulse.phase,
            "step": self.pulse.step,
            "time": time.time(),
            "wait": None if wait is None else (wait.name, wait.ranks),
        }
        draft = self._file(self.rank).with_suffix(".draft")
        try:
            draft.write_text(json.dumps(beat))
            draft.replace(self._file(self.rank))
        except OSError:
            return  # a full disk must not end the watch

    def _read(self) -> dict[int, Beat]:
        """The heartbeats of all ranks that have one."""
        found = {}
        for rank in range(self.size):
            try:
                found[rank] = json.loads(self._file(rank).read_text())
            except (OSError, ValueError):
                continue
        return found

    def _file(self, rank: int) -> Path:
        return self.run_dir / HEARTBEATS / f"rank{rank}.json"


def _flight_recorder() -> list[str]:
    """What torch itself recorded of the collectives: those of NCCL, and of gloo on CPUs."""
    import torch._C._distributed_c10d as c10d

    lines = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # the one where NCCL was built
        dump = getattr(c10d, name, None)
        entries = json.loads(dump()).get("entries") if dump is not None else None
        if entries:
            lines += ["torch's flight recorder:", json.dumps(entries[-REMEMBERED:])]
    return lines
