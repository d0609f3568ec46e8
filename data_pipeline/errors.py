"""The two errors this package raises on purpose."""

from __future__ import annotations

from typing import Any


class DataError(ValueError):
    """Bad input or a request that cannot be met: the message says what, where and what to do."""


class CorruptDataError(DataError):
    """A stored byte is not what was written.

    `file` is the damaged file, `frame` the number of the damaged frame in it (None when the damage
    is not inside a frame) and `offset` where in the file, in bytes, the damaged part begins.
    """

    def __init__(self, file: str, problem: str, frame: int | None = None, offset: int = 0) -> None:
        self.file, self.problem, self.frame, self.offset = str(file), problem, frame, offset
        where = f"frame {frame} at byte {offset}" if frame is not None else f"at byte {offset}"
        super().__init__(
            f"{file}: {where}: {problem}; restore the file from a copy or make the corpus again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.problem, self.frame, self.offset)
