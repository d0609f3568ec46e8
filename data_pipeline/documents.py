"""Read the documents in files or pieces of them: .txt has one, .jsonl one in each line, .parquet
one in each row. What is called .json.gz or .json.zst holds lines too (C4, Dolma)."""

from __future__ import annotations

import io
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zstandard

from data_pipeline.errors import DataError
from data_pipeline.sources import Source
from data_pipeline.streams import is_packed, open_bytes, open_decompressed, open_unpacked

_READ_BYTES = 1 << 20
_PARQUET_ROWS = 1024


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
