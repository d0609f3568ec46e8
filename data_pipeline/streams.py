"""Bytes from local files and URLs, decompressed on the way; cut-off data is an error."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import zstandard

from data_pipeline.errors import DataError

_READ_BYTES = 1 << 18


def is_url(path: str) -> bool:
    return "://" in path


def file_system(url: str) -> Any:
    """The fsspec file system of a URL; DataError where the package for it is missing."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from None


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The stored bytes of a local file or a URL."""
    with file_system(path).open(path, "rb") if is_url(path) else open(path, "rb") as file:
        yield file


class _Zstandard(io.RawIOBase):
    """Reads Zstandard frames one after the other, and complains if the last one is cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""
        self._object: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._file.read(_READ_BYTES)
            if not packed:
                if self._object is not None:
                    raise EOFError("the last frame is incomplete")
                return 0
            if self._object is None:
                self._object = zstandard.ZstdDecompressor().decompressobj()
            self._ready, self._rest = memoryview(self._object.decompress(packed)), b""
            if self._object.eof:
                self._rest, self._object = self._object.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """The content of a file whose suffix, .gz or .zst, says how it is compressed, if it is."""
    with open_bytes(path) as file:
        if path.endswith(".gz"):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif path.endswith(".zst"):
            yield cast(BinaryIO, io.BufferedReader(_Zstandard(file), _READ_BYTES))
        else:
            yield file
