"""SIGINT and SIGTERM as a request to stop at the next safe place."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopSignals:
    """The number of the signal that asked this process to stop, or None."""

    received: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Remember the first SIGINT or SIGTERM instead of dying of it.

    A second signal of the same kind has its usual effect at once.
    """
    signals = StopSignals()

    def remember(number: int, _frame: FrameType | None) -> None:
        signals.received = number
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.signal(number, remember) for number in HANDLED}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
