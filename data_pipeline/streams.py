"""Bytes from local files and URLs, decompressed on the way; cut-off data is an error."""

from __future__ import annotations

import errno
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


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it, which for a chain such as
    zip://a.txt::s3://b/c.zip is that of its first part.

    DataError where the package for it is missing.
    """
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except OSError:
        raise
    except Exception as error:  # a missing package, a name it does not know, a damaged archive
        raise DataError(f"{url}: {error}") from None
    return system, path


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Whatever the library of a remote store raises becomes an OSError that names `url`."""
    try:
        yield
    except (FileNotFoundError, DataError):
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise OSError(errno.EIO, message, url) from error


class _Remote(io.RawIOBase):
    """Reads a file of a remote store."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        with remote_errors(self._url):
            return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        with remote_errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The stored bytes of a local file or a URL."""
    if is_url(path):
        with remote_errors(path):
            system, inner = file_system(path)
            remote = system.open(inner, "rb")
        with remote:
            yield io.BufferedReader(_Remote(remote, path), _READ_BYTES)
    else:
        with open(path, "rb") as file:
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
    name = path.partition("::")[0] if is_url(path) else path
    with open_bytes(path) as file:
        if name.endswith(".gz"):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif name.endswith(".zst"):
            yield cast(BinaryIO, io.BufferedReader(_Zstandard(file), _READ_BYTES))
        else:
            yield file
