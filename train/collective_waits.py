"""Who keeps whom waiting: read off the stack of a thread, and followed from rank to rank.

Most collectives are called by libraries (FSDP2, pipeline schedules, DeepSpeed), which tell nobody.
A thread that stands in one says so by its frames: what was called, and in which process group.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

COMMUNICATES = ("/torch/distributed/", "/deepspeed/", "/train/parallel/", "/train/zero/")
PASSES_ON = ("/torch/_ops.py", "/torch/_compile.py", "/torch/_dynamo/")
NAMELESS = {"wait", "_wait", "wait_tensor", "wrapper", "__call__", "decorate_context"}
NAMELESS |= {"trigger_wait", "unwrap", "__torch_dispatch__"}
LOOP = ("/train/trainer.py",)  # beyond it nothing says what is waited for
BACKWARD = "_engine_run_backward"  # elsewhere, on a GPU's own thread

Beat = dict[str, Any]
"""What a rank last wrote: ticks, entered, phase, step, time; `wait`, a Wait as (name, ranks)."""


@dataclass(frozen=True)
class Wait:
    """A call that a thread waits in. ranks: those, of the whole job, that have to make it too."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} of ranks {list(self.ranks)}"


def wait_of_training() -> Wait | None:
    """What the main thread of this process waits in; None where it computes, reads or writes."""
    if not dist.is_initialized():
        return None
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    own = frames.pop(threading.main_thread().ident or 0, None)
    searched = [] if own is None else [own]
    if own is not None and own.f_code.co_name == BACKWARD:
        searched = list(frames.values())
    try:
        return next((found for one in searched if (found := wait_of(one))), None)
    except Exception:  # of objects in strange frames: it must not end the watch
        return None


def wait_of(frame: FrameType) -> Wait | None:
    """What a thread whose innermost frame this is waits in, if it is a collective."""
    chain = [one for one in _outward(frame) if not _is_in(one, PASSES_ON)]
    if not chain or not _is_in(chain[0], COMMUNICATES):
        return None
    group, name = None, None
    for one in chain:
        if _is_in(one, LOOP) or (group and name):
            break
        if name is None and _is_in(one, COMMUNICATES) and one.f_code.co_name not in NAMELESS:
            name = one.f_code.co_name.lstrip("_")
        group = group or _group(one)
    ranks = dist.get_process_group_ranks(group or dist.distributed_c10d._get_default_group())
    return Wait(name or chain[0].f_code.co_name, tuple(ranks))


def missing(
    rank: int, mine: str, late: list[int], before: dict[int, Beat], after: dict[int, Beat]
) -> list[str]:
    """One line for every rank that others wait for and that waits for none itself.

    mine: what `rank` waits in, in words; late: whom it can be waiting for; before, after: the
    heartbeats of all ranks, read one after the other.
    """
    lines: list[str] = []
    reached: dict[int, tuple[int, str]] = dict.fromkeys(late, (rank, mine))
    queue = list(late)
    while queue:
        one = queue.pop(0)
        beat = after.get(one)
        words = last_words(beat, before.get(one))
        if beat is None or words.startswith("silent") or beat.get("wait") is None:
            waiting, call = reached[one]
            where = "" if waiting == rank else f", where rank {waiting} waits"
            lines.append(f"rank {one} did not arrive at {call}{where}: {words}")
            continue
        found = Wait(beat["wait"][0], tuple(beat["wait"][1]))
        for other in found.ranks:
            if other not in reached and other != rank:
                reached[other] = (one, str(found))
                queue.append(other)
    if lines:
        return lines
    calls = {one: str(Wait(*after[one]["wait"])) for one in sorted(reached)}
    if all(mine.startswith(call) for call in calls.values()):
        return [f"every rank is alive in {mine}: the network hangs"]
    each = sorted({**calls, rank: mine}.items())
    return ["ranks wait for each other:", *(f"  rank {one} in {call}" for one, call in each)]


def last_words(beat: Beat | None, earlier: Beat | None) -> str:
    """Where a rank was when it was last heard of, in words."""
    if beat is None:
        return "it left no sign of life"
    where = f"phase {beat['phase']} of step {beat['step']}, {beat['entered']} collectives entered"
    if earlier is not None and beat["ticks"] == earlier["ticks"]:
        ago = time.time() - beat["time"]
        silent = f"silent for {ago:.1f} s (stopped, dead, or its machine is)"
        return f"{silent}, last heard of in {where}"
    return f"alive, in {where}"


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_in(frame: FrameType, places: tuple[str, ...]) -> bool:
    path = frame.f_code.co_filename.replace("\\", "/")
    return any(place in path for place in places)


def _group(frame: FrameType) -> ProcessGroup | None:
    """The process group that a variable of a frame is, or has: a context of autograd, ranks, a
    pipeline's schedule with its stages."""
    for value in list(frame.f_locals.values()):
        if isinstance(value, ProcessGroup):
            return value
        held = getattr(value, "__dict__", {})
        stages = held.get("_stages") or [held.get("_stage")]
        for one in (value, held.get("ranks"), stages[0]):
            found = getattr(one, "__dict__", {}).get("group")
            if isinstance(found, ProcessGroup):
                return found
    return None
