"""Find the files that a command is given, and read the documents in them.

Types by suffix: .txt (a document per file), .jsonl (a document per line), both also as .gz and
.zst, and .parquet (a document per row). What is called .json.gz or .json.zst holds lines too (C4,
Dolma); a plain .json beside texts is mostly about them, and left alone. Paths with :// go through
fsspec.
"""

from __future__ import annotations

import glob
import io
import json
import os
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any

import zstandard

from data_pipeline.errors import DataError
from data_pipeline.streams import (
    file_system,
    is_packed,
    is_url,
    open_bytes,
    open_decompressed,
    open_unpacked,
    remote_errors,
)

_TEXTS = (s + z for s in (".txt", ".jsonl") for z in ("", ".gz", ".zst"))
SUFFIXES = (*_TEXTS, ".json.gz", ".json.zst", ".parquet")
_TYPES = ", ".join(SUFFIXES)
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 1024


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


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    text_bytes: int


@dataclass(frozen=True)
class Reject:
    """A record that is no document: `line` counts from 1 (rows of a .parquet file likewise)."""

    file: str
    line: int
    reason: str


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


def _find_remote(given: str, others: dict[str, str]) -> list[Source]:
    with remote_errors(given):
        system, root = file_system(given)
        if system.isdir(root):
            matches = {root: {"type": "directory"}}
        else:
            matches = system.glob(root, detail=True)
        found: dict[str, str] = {}
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
        return sources


def _find_local(given: str, others: dict[str, str]) -> list[Source]:
    matches = [given] if os.path.exists(given) else glob.glob(given, recursive=True)
    found: dict[Path, str] = {}
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
    return [Source(str(file), _utf8(name), file.stat().st_size) for file, name in found.items()]


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


def find_sources(inputs: Sequence[str], others: dict[str, str] | None = None) -> list[Source]:
    """The files that `inputs` (files, folders searched deep, patterns, URLs) mean, by name.

    No two have the same name. A folder that a pattern means is searched like any other.
    DataError for an input that means no file, or a file of a type that is not read.

    others: gets the files of other types in folders, which are not read: path to name.
    """
    others = {} if others is None else others
    found: dict[str, Source] = {}
    for given in inputs:
        sources = (_find_remote if is_url(given) else _find_local)(given, others)
        if not sources:
            raise DataError(
                f"{given}: no input file there ({_TYPES}); name files, folders or patterns"
            )
        for source in sources:
            if not source.name.endswith(SUFFIXES):
                raise DataError(f"{source.path}: not a type that is read ({_TYPES})")
            key = source.path if is_url(source.path) else str(Path(source.path).resolve())
            found[key] = source
    return sorted(_told_apart(list(found.values())), key=lambda source: (source.name, source.path))


def _txt(source: Source) -> Iterator[Document | Reject]:
    with open_decompressed(source.path) as file:
        data = file.read()
    try:
        yield Document(source.name, data.decode("utf-8"), len(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Reject(source.name, line, f"byte {error.start} of the file is not UTF-8")


def _document(record: Any, text_field: str, id_field: str | None, place: str) -> Document | str:
    """The document in a record, or why there is none."""
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, not an object"
    text = record.get(text_field)
    if not isinstance(text, str):
        return (
            f"field {text_field!r} is not text"
            if text_field in record
            else (f"no field {text_field!r}")
        )
    name = place if id_field is None else record.get(id_field)
    if not isinstance(name, str | int):
        return f"no field {id_field!r} with a text or a number"
    for field, value in ((text_field, text), (id_field, str(name))):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"field {field!r} holds half of a surrogate pair"
    return Document(str(name), text, len(text.encode()))


def _parse(data: bytes, text_field: str, id_field: str | None, place: str) -> Document | str | None:
    """The document in a line of JSON, or why there is none; None for an empty line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    return _document(record, text_field, id_field, place)


def _newlines_before(path: str, stop: int) -> int:
    """Newlines in the first `stop` bytes of the content."""
    lines = 0
    with open_decompressed(path) as file:
        while stop > 0 and (block := file.read(min(stop, _READ_BYTES))):
            lines += block.count(b"\n")
            stop -= len(block)
    return lines


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """The lines of a source, each with the byte of the file at which it begins."""
    if is_packed(source.path):
        yield from _unpacked_lines(source)
        return
    with open_bytes(source.path) as file:
        at = source.start
        if source.start:
            file.seek(source.start - 1)
            at = source.start - 1 + len(file.readline())
        for line in file:
            if source.stop is not None and at >= source.stop:
                return
            yield at, line
            at += len(line)


def _unpacked_lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """As `_lines`; of the content of a piece that does not begin the file, the first byte belongs
    to the piece before, for whether a line begins there shows in what comes before it."""
    marks = [mark for mark in (source.start, source.stop) if mark]
    with open_unpacked(source.path, source.enter, marks) as unpacked:
        at = source.skipped + (unpacked.skip_to(source.start) if source.start else 0)
        file = io.BufferedReader(unpacked, _READ_BYTES)
        if source.start:
            at += len(file.readline())
        for line in file:
            end = unpacked.reached.get(source.stop) if source.stop else None
            if end is not None and at > source.skipped + end:
                return
            yield at, line
            at += len(line)


def _jsonl(source: Source, text_field: str, id_field: str | None) -> Iterator[Document | Reject]:
    before: int | None = None
    for number, (at, line) in enumerate(_lines(source), 1):
        if number == 1:
            first = at
        data = line.removeprefix(BOM_UTF8) if at == 0 else line
        record = _parse(data, text_field, id_field, f"{source.name}@{at}")
        if isinstance(record, str):
            if before is None:
                before = _newlines_before(source.path, first)
            yield Reject(source.name, before + number, record)
        elif record is not None:
            yield record


def _rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a RecordBatch; None for one with a string that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # raised before the first row
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """The pyarrow.parquet.ParquetFile of a path or URL.

    DataError where pyarrow is missing, or the file turns out to be damaged while it is open.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: reading .parquet needs `pip install pyarrow`") from None
    with open_bytes(path) as file:
        try:
            yield parquet.ParquetFile(file, page_checksum_verification=True)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole .parquet file ({error})") from None


def _groups(metadata: Any, source: Source) -> tuple[list[int], int, int]:
    """The row groups that a source has rows in, the first row of these, and the row behind them."""
    ends = [0]
    for group in range(metadata.num_row_groups):
        ends.append(ends[-1] + metadata.row_group(group).num_rows)
    if ends[-1] != metadata.num_rows:
        raise OSError(f"{ends[-1]} rows, not {metadata.num_rows}")
    stop = ends[-1] if source.stop is None else source.stop
    groups = [n for n in range(len(ends) - 1) if ends[n] < stop and ends[n + 1] > source.start]
    return (groups, ends[groups[0]], ends[groups[-1] + 1]) if groups else ([], 0, 0)


def _parquet(source: Source, text_field: str, id_field: str | None) -> Iterator[Document | Reject]:
    columns = [text_field, *([id_field] if id_field else [])]
    with open_parquet(source.path) as table:
        names = table.schema_arrow.names
        for name in columns:
            if (there := names.count(name)) != 1:
                number = "several columns" if there else "no column"
                raise DataError(f"{source.path}: {number} {name}; it has {', '.join(names)}")
        groups, row, end = _groups(table.metadata, source)
        for batch in table.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=columns):
            before = min(max(source.start - row, 0), batch.num_rows)
            row += before
            for record in _rows(batch.slice(before)):
                if row == source.stop:
                    return
                found = (
                    "not UTF-8"
                    if record is None
                    else _document(record, text_field, id_field, f"{source.name}@{row}")
                )
                row += 1
                yield Reject(source.name, row, found) if isinstance(found, str) else found
        if row != end:
            raise OSError(f"{row} rows, not {end}")


def read_source(
    source: Source, text_field: str = "text", id_field: str | None = None
) -> Iterator[Document | Reject]:
    """The documents of a source, and what in it is none, in order.

    A document is named by its field `id_field`, or by its file and where in it it begins (byte or
    row). DataError where the file as a whole cannot be read.
    """
    kind = source.name.removesuffix(".gz").removesuffix(".zst")
    try:
        if kind.endswith(".txt"):
            yield from _txt(source)
        elif kind.endswith((".jsonl", ".json")):
            yield from _jsonl(source, text_field, id_field)
        else:
            yield from _parquet(source, text_field, id_field)
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{source.path}: the compressed data is damaged or cut off ({error}); get it again"
        ) from None


def read_texts(sources: Sequence[Source], text_field: str = "text") -> Iterator[str]:
    """The texts of all documents, in order; DataError at the first record that is none."""
    for source in sources:
        for document in read_source(source, text_field):
            if isinstance(document, Reject):
                raise DataError(
                    f"{source.path}: line {document.line}: {document.reason}; "
                    "correct the file or leave it out"
                )
            yield document.text
