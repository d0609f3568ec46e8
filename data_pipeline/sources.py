"""Find the files that a command is given.

Types by suffix: .txt, .jsonl, both also as .gz and .zst, .json.gz and .json.zst (lines too, as C4
and Dolma have them), and .parquet. A plain .json beside texts is mostly about them, and left alone.
Paths with :// go through fsspec.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.streams import file_system, is_url, remote_errors

_TEXTS = (s + z for s in (".txt", ".jsonl") for z in ("", ".gz", ".zst"))
SUFFIXES = (*_TEXTS, ".json.gz", ".json.zst", ".parquet")
_TYPES = ", ".join(SUFFIXES)


@dataclass(frozen=True)
class Source:
    """An input file, or a piece of one, start .. stop: rows of a .parquet file, or the lines that
    begin in what these stored bytes hold.

    `name` is its path below the input that it was found in, `size` its bytes as stored. A piece of
    a compressed file is read from the stored byte `enter` on, which has `skipped` bytes of content
    before it; `file_xxh3_128` is the checksum of the whole file, where what a piece holds depends
    on more of it than start .. stop.
    """

    path: str
    name: str
    size: int
    start: int = 0
    stop: int | None = None
    enter: int = 0
    skipped: int = 0
    file_xxh3_128: str = ""


class Found(NamedTuple):
    """The files that are to be read, and those of other types in folders, which are not: path to
    name."""

    sources: list[Source]
    others: dict[str, str]


def _complain(error: OSError) -> None:
    raise error


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder. Links to folders are followed too, each folder once and by its own
    name where it has one here. OSError where a folder cannot be listed."""
    waiting, seen = [folder], set()
    for start in waiting:
        for at, folders, files in os.walk(start, onerror=_complain):
            status = os.stat(at)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()
            waiting += [Path(at, name) for name in folders if os.path.islink(Path(at, name))]
            yield from (Path(at, name) for name in sorted(files))


def _utf8(name: str) -> str:
    """The name of a file as text that can be stored: a byte that is not UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _address(given: str, path: str) -> str:
    """The URL of a path of the file system that `given` names; that of HTTP calls its files by
    their whole URLs. What `given` has after :: (an archive that the path is in) stays there."""
    first, chain, rest = given.partition("::")
    if not is_url(path):
        prefix = first[: first.index("://") + 3]
        path = prefix + (path if prefix == "file://" else path.lstrip("/"))
    return path + chain + rest


def _find_remote(given: str) -> Found:
    with remote_errors(given):
        system, root = file_system(given)
        if system.isdir(root):
            matches = {root: {"type": "directory"}}
        else:
            matches = system.glob(root, detail=True)
        found: dict[str, str] = {}
        others: dict[str, str] = {}
        for match in sorted(matches):
            if matches[match]["type"] != "directory":
                found.setdefault(match, PurePosixPath(match).name)
                continue
            for path in system.find(match):
                into = found if path.endswith(SUFFIXES) else others
                into.setdefault(path, path[len(match) :].lstrip("/"))
        sources = []
        for path, name in found.items():
            size = system.size(path)
            if size is None:
                raise DataError(f"{given}: the server does not say how long it is; copy it here")
            sources.append(Source(_address(given, path), name, size))
        return Found(sources, others)


def _find_local(given: str) -> Found:
    matches = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
    found: dict[Path, str] = {}
    others: dict[str, str] = {}
    for match in map(Path, sorted(matches)):
        if not match.is_dir():
            found.setdefault(match, match.name)
            continue
        for file in _below(match):
            name = file.relative_to(match).as_posix()
            if file.name.endswith(SUFFIXES):
                found.setdefault(file, name)
            else:
                others.setdefault(str(file), _utf8(name))
    for file in found:
        if not S_ISREG(file.stat().st_mode):
            raise DataError(f"{file}: a pipe or a device; write what comes from it to a file")
    sources = [Source(str(file), _utf8(name), file.stat().st_size) for file, name in found.items()]
    return Found(sources, others)


def _told_apart(sources: Sequence[Source]) -> list[Source]:
    """`sources` with as much of their paths before equal names as makes them different."""
    longest = max(source.path.count("/") for source in sources) + 1
    for parts in range(2, longest + 1):
        times = Counter(source.name for source in sources)
        if max(times.values()) == 1:
            break
        sources = [
            source
            if times[source.name] == 1
            else replace(source, name=_utf8("/".join(source.path.split("/")[-parts:])))
            for source in sources
        ]
    return list(sources)


def find(inputs: Sequence[str]) -> Found:
    """The files that `inputs` (files, folders searched deep, patterns, URLs) mean, by name.

    No two have the same name. A folder that a pattern means is searched like any other.
    DataError for an input that means no file, or a file of a type that is not read.
    """
    found: dict[str, Source] = {}
    others: dict[str, str] = {}
    for given in inputs:
        here = (_find_remote if is_url(given) else _find_local)(given)
        if not here.sources:
            raise DataError(
                f"{given}: no input file there ({_TYPES}); name files, folders or patterns"
            )
        for source in here.sources:
            if not source.name.endswith(SUFFIXES):
                raise DataError(f"{source.path}: not a type that is read ({_TYPES})")
            key = source.path if is_url(source.path) else str(Path(source.path).resolve())
            found[key] = source
        others = here.others | others
    sources = _told_apart(list(found.values()))
    return Found(sorted(sources, key=lambda source: (source.name, source.path)), others)


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files to be read of `find`."""
    return find(inputs).sources
