"""Files of the run folder: lines added to an end, whatever becomes of the disk that they lie on,
and small texts that are whole at any moment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data_pipeline.redaction import redact


class LineFile:
    """A file that lines are added to. What the disk does not take (full, quota, gone read-only) is
    kept in memory and written before the next line; training goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept = b""
        self._replaces = False  # what is kept stands for the file, and does not follow it
        self._told = False

    def add(self, line: str) -> None:
        """Append a line, after what earlier calls had to keep."""
        self._kept += line.encode() + b"\n"
        self._write()

    def text(self) -> str:
        """All lines, those that the disk has not taken too; the last one may be cut short."""
        stands = self.path.exists() and not self._replaces
        written = self.path.read_bytes() if stands else b""
        return (written + self._kept).decode("utf-8", "replace")

    def replace(self, text: str) -> None:
        """Put other lines in the place of all; a kill leaves the old ones or the new."""
        self._kept, self._replaces = text.encode(), True
        self._write()

    def _write(self) -> None:
        try:
            if self._replaces:
                write_whole(self.path, self._kept.decode())
                self._kept, self._replaces = b"", False
            else:
                with self.path.open("ab", buffering=0) as file:
                    while self._kept:
                        self._kept = self._kept[file.write(self._kept) :]
            self._told = False
        except OSError as error:
            if not self._told:
                tell(f"{self.path} can't be written: {error.strerror}; training goes on")
            self._told = True


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a kill, at any moment, leaves the old text or the new one."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def tell(line: str) -> None:
    """A line without secrets on stderr, which may lie on a full disk as well."""
    try:
        print(redact(line), file=sys.stderr)
    except OSError:
        return
