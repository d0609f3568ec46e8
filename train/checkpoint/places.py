"""Files and folders of a checkpoint: on a local disk, or behind a URL that fsspec reads.

A local file is on the disk when `write` returns. Behind a URL there is no flush, no link and no
rename that happens at once: whatever is written there counts only through a marker written last.
Needs no torch.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from data_pipeline.files import sync_folder
from train.checkpoint.errors import CheckpointError

BLOCK = 1 << 24


@dataclass(frozen=True, order=True)
class URLPath:
    """A file or a folder behind a URL, with the few of pathlib's names that are used here."""

    url: str

    def __truediv__(self, name: str) -> URLPath:
        return URLPath(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> URLPath:
        """The folder that it is in."""
        return URLPath(self.url.rstrip("/").rpartition("/")[0])

    @property
    def files(self) -> Any:
        """The fsspec file system; CheckpointError where the package for it is missing."""
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"can't use {self.url}: {error}") from None

    def exists(self) -> bool:
        """Whether there is a file or a folder. Raises what is raised where that can't be known:
        fsspec's own `exists` says no then, and what is not complete is deleted."""
        self.files.invalidate_cache()
        try:
            self.files.info(self.url)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


Place = Path | URLPath


def as_place(text: str | Place) -> Place:
    """A path, or what stands behind a URL (anything with ://)."""
    if isinstance(text, URLPath):
        return text
    return URLPath(text) if isinstance(text, str) and "://" in text else Path(text)


def names(folder: Place) -> list[str]:
    """What lies in a folder, sorted; nothing where there is no folder."""
    try:
        if isinstance(folder, Path):
            return sorted(os.listdir(folder))
        folder.files.invalidate_cache()
        found = folder.files.ls(folder.url, detail=False)
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)
    except FileNotFoundError:
        return []


def opened(file: Place, mode: str = "rb") -> IO[bytes]:
    """Open a file for reading or writing bytes. Raises OSError for a pipe, which would wait."""
    if isinstance(file, Path):
        if file.is_fifo():
            raise OSError(errno.EINVAL, "it is a pipe and no file", str(file))
        return cast(IO[bytes], file.open(mode))
    return cast(IO[bytes], file.files.open(file.url, mode))


def read(file: Place) -> bytes:
    """The bytes of a file; FileNotFoundError where there is none."""
    with opened(file) as stream:
        return stream.read()


def size(file: Place) -> int:
    """Bytes of a file; FileNotFoundError where there is none."""
    if isinstance(file, Path):
        return file.stat().st_size
    file.files.invalidate_cache()
    return int(file.files.size(file.url))


def write(file: Place, buffers: Iterable[bytes | memoryview]) -> None:
    """Write a file, and flush it to the disk."""
    with opened(file, "wb") as stream:
        for buffer in buffers:
            view = memoryview(buffer)
            for start in range(0, len(view), BLOCK):
                stream.write(view[start : start + BLOCK])
        if isinstance(file, Path):
            stream.flush()
            os.fsync(stream.fileno())


def write_at_once(file: Place, content: bytes) -> None:
    """Write a small file that is there whole or not at all."""
    draft = file.parent / f"writing-{file.name}"
    write(draft, [content])
    rename(draft, file)


def checksum(file: Place) -> str:
    """XXH3-128 of a file, in hexadecimal; FileNotFoundError where there is none."""
    digest = xxhash.xxh3_128()
    with opened(file) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksum_of(buffers: Iterable[bytes | memoryview]) -> str:
    """XXH3-128 of bytes in memory, one after the other."""
    digest = xxhash.xxh3_128()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def link(old: Place, new: Place) -> bool:
    """Give a local file a second name in another folder; False where that can't be done."""
    if not (isinstance(old, Path) and isinstance(new, Path)):
        return False
    try:
        os.link(old, new)
    except OSError:
        return False
    return True


def make_folder(folder: Place) -> None:
    """Make a folder and those above it, where there are such things as folders."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder.files.makedirs(folder.url, exist_ok=True)


def flush_folder(folder: Place) -> None:
    """Flush the names in a local folder to the disk."""
    if isinstance(folder, Path):
        sync_folder(folder)


def rename(old: Place, new: Place) -> None:
    """Move a file or a folder to another name, which no folder has."""
    if isinstance(old, Path) and isinstance(new, Path):
        old.rename(new)
    elif isinstance(old, URLPath):
        old.files.mv(str(old), str(new), recursive=True)


def identity(place: Place) -> tuple[int, int] | str:
    """The same for two names of one file. Raises OSError where there is none."""
    if isinstance(place, URLPath):
        return place.url
    status = place.stat()
    return status.st_dev, status.st_ino


def remove(place: Place) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    try:
        if isinstance(place, URLPath):
            place.files.invalidate_cache()
            place.files.rm(place.url, recursive=True)
        elif place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()
    except FileNotFoundError:
        pass
