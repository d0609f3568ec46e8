"""SIGINT, SIGTERM, SIGUSR1 and the walltime as a request to stop at the next safe place.

Exit statuses: 128 + n on SIGINT and SIGTERM; 75 (EX_TEMPFAIL) on SIGUSR1 and at the walltime, with
which a scheduler starts the job again. Imports next to nothing: what comes before everything else
is to listen.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from train.parallel.ranks import Ranks

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
WALLTIME = 0  # where a signal's number would stand
REASONS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, WALLTIME)
REQUEUE = 75

# torchrun and schedulers send one request twice: to the launcher, which passes it on, and to all.
SAME_REQUEST_S = 2.0


class StoppedError(Exception):
    """Asked to stop before there was anything to save."""

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped with exit status {status}")
        self.status = status


@dataclass
class StopSignals:
    """What asked this process to stop: a signal's number, or a deadline by time.monotonic().

    While it listens, the first signal is remembered instead of being died of. A further SIGINT or
    SIGTERM has its usual effect at once when it comes two seconds later or more: what comes sooner
    is the same request, passed on by a launcher.
    """

    received: int | None = None
    deadline: float | None = None
    _first: float = 0.0
    _usual: dict[int, Any] = field(default_factory=dict)

    def listen(self) -> None:
        """Take the signals from here on, until `release`."""
        self._usual = {number: signal.signal(number, self._remember) for number in HANDLED}

    def release(self) -> None:
        """Let signals have the effect that they had before."""
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def let_through(self) -> None:
        """Release, and let the one that came meanwhile have its effect too."""
        self.release()
        if self.received is not None:
            os.kill(os.getpid(), self.received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first = number, time.monotonic()
        elif number != signal.SIGUSR1 and time.monotonic() - self._first >= SAME_REQUEST_S:
            signal.signal(number, self._usual[number])
            os.kill(os.getpid(), number)

    @property
    def reason(self) -> int | None:
        """The number of the signal, WALLTIME, or None while there is no reason to stop."""
        if self.received is None and self.deadline is not None:
            return WALLTIME if time.monotonic() >= self.deadline else None
        return self.received


def agreed_status(signals: StopSignals, ranks: Ranks) -> int | None:
    """The exit status that any rank was asked to stop with, the same on all; None to go on."""
    told = ranks.sum([float(signals.reason == reason) for reason in REASONS])
    for reason, count in zip(REASONS, told, strict=True):
        if count > 0:
            return REQUEUE if reason in (signal.SIGUSR1, WALLTIME) else 128 + int(reason)
    return None


def walltime_deadline(walltime_s: float | Literal["slurm"] | None, margin_s: float) -> float | None:
    """When to stop, by time.monotonic(), so that margin_s are left to save in.

    walltime_s: seconds from now, or "slurm" for the end of the job that Slurm tells. Raises
    ConfigError when it tells none.
    """
    if walltime_s is None:
        return None
    if walltime_s == "slurm":
        from train.section import ConfigError

        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if not end.isdigit():
            raise ConfigError(
                "training.walltime_s=slurm needs SLURM_JOB_END_TIME, which is not set here; give "
                "the seconds instead"
            )
        walltime_s = int(end) - time.time()
    return time.monotonic() + walltime_s - margin_s


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Listen meanwhile."""
    signals = StopSignals()
    signals.listen()
    try:
        yield signals
    finally:
        signals.release()
