"""Local copies of remote shards: fetched with retries, checked on arrival, bounded in size."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.files import TEMPORARY, replacing
from data_pipeline.streams import file_system, open_bytes

DEFAULT_BYTES = 64 << 30
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.2
_READ_BYTES = 1 << 20
_ABANDONED_SECONDS = 3600
T = TypeVar("T")


def with_retries(action: Callable[[], T], what: str) -> T:
    """action(), tried again with growing pauses while it fails; DataError in the end."""
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except FileNotFoundError:
            raise DataError(f"{what}: there is no such file; check the address") from None
        except Exception as error:  # each library of a remote store has errors of its own
            if isinstance(error, DataError) and not isinstance(error, CorruptDataError):
                raise
            if attempt + 1 == _ATTEMPTS:
                raise DataError(f"{what}: failed {_ATTEMPTS} times, last with: {error}") from error
            time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def read_remote(url: str) -> bytes:
    """The content of a small remote file."""

    def read() -> bytes:
        system, path = file_system(url)
        content: bytes = system.cat_file(path)
        return content

    return with_retries(read, url)


class ShardCache:
    """A folder of shards named by their checksums; processes of a node may share it.

    `limit` is in bytes: the shards that were not opened for longest make room for new ones. A shard
    that is being read stays readable after its removal.
    """

    def __init__(self, folder: str | Path, limit: int = DEFAULT_BYTES) -> None:
        self.folder, self.limit = Path(folder), limit

    def path(self, entry: dict[str, Any]) -> Path:
        return self.folder / f"{entry['xxh3_128']}.tok"

    def fetch(self, url: str, entry: dict[str, Any]) -> Path:
        """The local copy of the shard at `url`, whose manifest entry is `entry`.

        DataError where it cannot be had or kept, or does not match its checksum however often it is
        read.
        """
        path = self.path(entry)
        try:
            try:
                os.utime(path)
                return path
            except FileNotFoundError:
                pass
            if entry["bytes"] > self.limit:
                raise DataError(
                    f"{url}: {entry['bytes']} bytes do not fit into a cache of {self.limit}: "
                    "raise it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(entry["bytes"])
        except OSError as error:
            raise self._unusable(error) from None
        with_retries(lambda: self._download(url, entry, path), url)
        return path

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.folder}: {error.strerror or error}: shards of URLs are kept there; "
            "name another cache_dir, or make room in it"
        )

    def _download(self, url: str, entry: dict[str, Any], path: Path) -> None:
        digest = xxhash.xxh3_128()
        try:
            with open_bytes(url) as source, replacing(path) as file:
                while block := source.read(_READ_BYTES):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != entry["xxh3_128"]:
                    raise CorruptDataError(url, "arrived with another checksum than the manifest's")
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.filename == url:  # of the store
                raise
            raise self._unusable(error) from None

    def _make_room(self, needed: int) -> None:
        for path in self.folder.glob(f".*{TEMPORARY}*"):  # of processes that were killed
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        kept = []
        for path in self.folder.glob("*.tok"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            kept.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + needed <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size
