"""Where this process is: its phase, its step, and the last collectives it entered.

The watchdog reads it, faults are aimed with it, and a collective that breaks is named by it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

STEP_PHASES = ("data", "forward", "backward", "reduce", "optimizer")
FIRST_RANK_PHASES = ("save-before-marker", "save-after-marker", "delete")
PHASES = ("open", "start", *STEP_PHASES, "evaluation", "save", *FIRST_RANK_PHASES)
"""open: opening the data and building the model; start: before the first step of this process."""

REMEMBERED = 32


class RankLostError(RuntimeError):
    """A collective broke: another rank died or its connection did; the message is one line."""


_GLOO = "gloo/transport"
"""In every message of gloo's about a broken connection; its errors have no type of their own."""


def _broken_collective(error: BaseException) -> BaseException | None:
    """What broke a collective, of an error and its causes; None if nothing did."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistBackendError | dist.DistNetworkError):
            return seen
        if isinstance(seen, RuntimeError) and _GLOO in str(seen):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _lost(what: str, when: Collective | Pulse, error: BaseException) -> RankLostError:
    return RankLostError(
        f"{what} step {when.step} ({when.phase}) failed, as it does when a rank is lost: "
        f"{' '.join(str(error).split())[:300]}"
    )


@dataclass
class Collective:
    """One call that every rank has to make, the `number`-th of this process."""

    number: int
    name: str
    phase: str
    step: int
    entered: float  # time.monotonic()
    left: float | None = None

    def __str__(self) -> str:
        took = "not left" if self.left is None else f"took {self.left - self.entered:.3f} s"
        return f"#{self.number} {self.name} (step {self.step}, {self.phase}), {took}"


class Pulse:
    """Beaten by the training thread alone, read by any.

    step: the number of the step that is being taken, or was last; beats: grows with every sign of
    life; entered: collectives so far; listeners: called with the name of every phase entered.
    """

    def __init__(self) -> None:
        self.phase = PHASES[0]
        self.step = 0
        self.beats = 0
        self.entered = 0
        self.collectives: deque[Collective] = deque(maxlen=REMEMBERED)
        self.listeners: list[Callable[[str], None]] = []
        self._last = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._last

    @property
    def inside(self) -> Collective | None:
        """The collective that the training thread waits in."""
        last = self.collectives[-1] if self.collectives else None
        return last if last is not None and last.left is None else None

    def enter(self, phase: str, step: int | None = None) -> None:
        """The training thread begins `phase`, of a new step where `step` says so."""
        assert phase in PHASES, phase
        self.phase = phase
        self.step = self.step if step is None else step
        self._beat()
        for listener in self.listeners:
            listener(phase)

    @contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """Around every collective. Raises RankLostError where it fails."""
        self.entered += 1
        call = Collective(self.entered, name, self.phase, self.step, time.monotonic())
        self.collectives.append(call)
        self._beat()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _lost(f"collective {call.number}, {name}, of", call, error) from error
        call.left = time.monotonic()
        self._beat()

    @contextmanager
    def library_collectives(self) -> Iterator[None]:
        """Around all that may call collectives by itself: FSDP2, DTensor, pipelines, DeepSpeed.
        Raises RankLostError where one of them fails."""
        try:
            yield
        except RuntimeError as error:
            broken = _broken_collective(error)
            if isinstance(error, RankLostError) or broken is None:
                raise
            raise _lost("a collective of", self, broken) from error

    def _beat(self) -> None:
        self.beats += 1
        self._last = time.monotonic()
