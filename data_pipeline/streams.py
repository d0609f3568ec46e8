"""Bytes from local files and URLs, decompressed on the way; cut-off data is an error."""

from __future__ import annotations

import errno
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import zstandard

from data_pipeline.errors import DataError

_READ_BYTES = 1 << 18
_LONGEST_WINDOW = 1 << 31


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


def zstd_decompressor() -> Any:
    """For one Zstandard frame, with a window as large as `zstd --long=31` makes it."""
    return zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()


class Unpacked(io.RawIOBase):
    """Reads Zstandard frames or gzip members one after the other, from where one begins on, and
    complains if the last one is cut off.

    `at` is the position of the file, and `marks` are later ones, in rising order. For each mark
    that was passed `reached` holds how many bytes of content the stored bytes between give: all
    that can be decoded of gzip; in Zstandard, marks have to stand between blocks.
    """

    def __init__(self, file: BinaryIO, gzipped: bool, at: int, marks: Sequence[int]) -> None:
        self._file, self._gzipped = file, gzipped
        self._at, self._marks = at, list(marks)
        self._rest, self._begun = b"", False
        self._object: Any = None
        self._ready = memoryview(b"")
        self._content = 0
        self.reached: dict[int, int] = {}

    def readable(self) -> bool:
        return True

    def _stored(self) -> bytes:
        """Stored bytes that are still to be unpacked, none of them behind the next mark."""
        if self._rest:
            return self._rest
        if self._marks and self._at == self._marks[0]:
            self.reached[self._marks.pop(0)] = self._content
        size = min(_READ_BYTES, self._marks[0] - self._at) if self._marks else _READ_BYTES
        packed = self._file.read(size)
        self._at += len(packed)
        return packed

    def _unpack(self) -> bool:
        """Unpack some more; False at the end."""
        packed = self._stored()
        if not packed:
            if self._object is not None:
                raise EOFError("the last frame is incomplete")
            if self._marks:
                raise EOFError("shorter than when the run began")
            return False
        if self._object is None and self._gzipped and self._begun:
            packed = packed.lstrip(b"\0")  # zeros may follow a member
        self._rest = b""
        if packed:
            self._object = self._object or self._decompressor()
            self._begun = True
            self._ready = memoryview(self._object.decompress(packed))
            self._content += len(self._ready)
            if self._object.eof:
                self._rest, self._object = self._object.unused_data, None
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._unpack():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressor(self) -> Any:
        return zlib.decompressobj(16 + zlib.MAX_WBITS) if self._gzipped else zstd_decompressor()

    def skip_to(self, mark: int) -> int:
        """Leave out the content before a mark; how many bytes that was."""
        while (self._at < mark or self._rest) and self._unpack():
            self._ready = memoryview(b"")
        return self._content


def is_packed(path: str) -> bool:
    """Whether the suffix of a path or URL, .gz or .zst, says that the file is compressed."""
    return _inner_name(path).endswith((".gz", ".zst"))


def _inner_name(path: str) -> str:
    return path.partition("::")[0] if is_url(path) else path


@contextmanager
def open_unpacked(path: str, enter: int = 0, marks: Sequence[int] = ()) -> Iterator[Unpacked]:
    """The content of a compressed file from the stored byte `enter` on, where a frame begins."""
    with open_bytes(path) as file:
        if enter:
            file.seek(enter)
        yield Unpacked(file, _inner_name(path).endswith(".gz"), enter, marks)


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """The content of a file whose suffix, .gz or .zst, says how it is compressed, if it is."""
    if is_packed(path):
        with open_unpacked(path) as unpacked:
            yield cast(BinaryIO, io.BufferedReader(unpacked, _READ_BYTES))
    else:
        with open_bytes(path) as file:
            yield file
