"""Files that are either whole or absent."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import BinaryIO

import xxhash

from data_pipeline.errors import DataError

TEMPORARY = ".tmp-"
_READ_BYTES = 1 << 20


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` once it is complete and on the disk.

    Written beside it under a temporary name that begins with a dot; removed if the block raises.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}-{get_ident()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left in `folder`; call it while holding the folder's lock."""
    for left in folder.glob(f".*{TEMPORARY}*"):
        left.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if absent) against other writers; DataError if another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder}: another process is writing here; wait for it or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def file_checksum(path: Path) -> str:
    """XXH3 128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
