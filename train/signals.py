"""SIGINT and SIGTERM as a request to stop at the next safe place."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopSignals:
    """Context manager that remembers the first SIGINT or SIGTERM instead of dying of it.

    A second signal of the same kind has its usual effect at once.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in self.HANDLED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])  # type: ignore[arg-type]
