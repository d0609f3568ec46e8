"""Lines at the end of a file of the run folder, whatever becomes of the disk that it lies on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data_pipeline.redaction import redact


class LineFile:
    """A file that is only added to. What the disk does not take (full, quota, gone read-only) is
    kept in memory and written before the next line; training goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = b""

    def add(self, line: str) -> None:
        """Append a line, after what earlier calls had to keep."""
        told = bool(self._kept)
        self._kept += line.encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                while self._kept:
                    self._kept = self._kept[file.write(self._kept) :]
        except OSError as error:
            if not told:
                tell(f"{self.path} can't be written: {error.strerror}; training goes on")

    def text(self) -> str:
        """All lines, those that the disk has not taken too; the last one may be cut short."""
        written = self.path.read_bytes() if self.path.exists() else b""
        return (written + self._kept).decode("utf-8", "replace")

    def replace(self, text: str) -> None:
        """Put other lines in the place of all; a kill leaves the old ones or the new."""
        draft = self.path.with_suffix(".draft")
        draft.write_text(text)
        os.replace(draft, self.path)
        self._kept = b""


def tell(line: str) -> None:
    """A line without secrets on stderr, which may lie on a full disk as well."""
    try:
        print(redact(line), file=sys.stderr)
    except OSError:
        return
