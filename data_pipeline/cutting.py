"""Cut large input files into pieces, so that several shards and processes can share one of them.

Where the cuts are follows from the file and the sizes asked for alone. A .jsonl file can be entered
at any byte, a Zstandard file where a frame begins, a .parquet file where a row group does. To get
anywhere else in them, and anywhere in a .gz file, a process has to decompress what is before it.
That takes a fraction of the time of encoding and is done again for each such piece; what keeps it
small is that they are few: none is smaller than `limit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, NamedTuple

import xxhash
import zstandard
from tqdm import tqdm

from data_pipeline.documents import open_parquet
from data_pipeline.sources import Source
from data_pipeline.streams import open_bytes, zstd_decompressor

_READ_BYTES = 1 << 20
_LARGEST_HEADER = 18
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_RUN_LENGTH = 1
_PLACES = 64


class _Place(NamedTuple):
    """Where a file can be cut.

    `at` is a position in stored bytes, or a row; `stored` the bytes before it; `enter` the last
    such position at which reading can begin, and `skipped` the bytes of content before that.
    """

    at: int
    stored: int
    enter: int
    skipped: int = 0


class _Header(NamedTuple):
    """Of a Zstandard frame: where its blocks begin, the bytes behind them, and its bytes of content
    or None. A frame to be skipped has no blocks."""

    end: int
    has_blocks: bool
    checksum: int
    content: int | None


class _NotWholeError(Exception):
    """The frames of a file do not follow each other up to its end."""


def _integer(file: BinaryIO, size: int) -> int:
    data = file.read(size)
    if len(data) < size:
        raise _NotWholeError
    return int.from_bytes(data, "little")


def _header(file: BinaryIO, start: int) -> _Header:
    file.seek(start)
    if _integer(file, 4) in _SKIPPABLE:
        return _Header(start + 8 + _integer(file, 4), False, 0, 0)
    file.seek(start)
    data = file.read(_LARGEST_HEADER)
    told = zstandard.get_frame_parameters(data)
    known = told.content_size != zstandard.CONTENTSIZE_UNKNOWN
    return _Header(
        start + zstandard.frame_header_size(data),
        True,
        4 if told.has_checksum else 0,
        told.content_size if known else None,
    )


def _content(file: BinaryIO, start: int, stop: int) -> int:
    """Bytes of content of the frame start .. stop, which does not tell them."""
    file.seek(start)
    decompressor, size = zstd_decompressor(), 0
    for at in range(start, stop, _READ_BYTES):
        size += len(decompressor.decompress(file.read(min(_READ_BYTES, stop - at))))
    return size


def _zst_places(file: BinaryIO, size: int) -> Iterator[_Place]:
    """The ends of all blocks and frames in the `size` bytes of a Zstandard file."""
    start = skipped = 0
    while start < size:
        at, more, checksum, content = _header(file, start)
        while more:
            file.seek(at)
            block = _integer(file, 3)
            more = not block & 1
            at += 3 + (1 if block >> 1 & 3 == _RUN_LENGTH else block >> 3)
            if more:
                yield _Place(at, at, start, skipped)
        at += checksum
        if at > size:
            raise _NotWholeError
        if at < size:
            skipped += _content(file, start, at) if content is None else content
            yield _Place(at, at, at, skipped)
        start = at


def _parquet_places(source: Source) -> Iterator[_Place]:
    """The beginnings of row groups, and some rows in between."""
    with open_parquet(source.path) as table:
        first = stored = 0
        for number in range(table.metadata.num_row_groups):
            group = table.metadata.row_group(number)
            columns = range(group.num_columns)
            size = sum(group.column(column).total_compressed_size for column in columns)
            for row in range(0, group.num_rows, max(1, group.num_rows // _PLACES)):
                yield _Place(first + row, stored + size * row // group.num_rows, first)
            first += group.num_rows
            stored += size


def _places(source: Source, limit: int) -> Iterator[_Place]:
    if source.name.endswith(".parquet"):
        yield from _parquet_places(source)
    elif source.name.endswith(".gz"):
        yield from (_Place(at, at, 0) for at in range(limit, source.size, limit))
    else:
        with open_bytes(source.path) as file:
            yield from _zst_places(file, source.size)


def _checksum(source: Source) -> str:
    digest = xxhash.xxh3_128()
    with (
        open_bytes(source.path) as file,
        tqdm(
            total=source.size, unit="B", unit_scale=True, desc="look through", disable=None
        ) as bar,
    ):
        while block := file.read(_READ_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _pieces(source: Source, size: int, limit: int) -> list[Source]:
    cuts = [_Place(0, 0, 0)]
    try:
        for place in _places(source, limit):
            wanted = size if place.enter == place.at else limit
            if place.stored - cuts[-1].stored >= wanted:
                cuts.append(place)
    except (zstandard.ZstdError, _NotWholeError):  # whoever reads it will say so
        return [source]
    if len(cuts) == 1:
        return [source]
    checksum = _checksum(source)
    pieces = []
    for cut, following in zip(cuts, [*cuts[1:], None], strict=True):
        stop, stored = (following.at, following.stored) if following else (None, source.size)
        pieces.append(
            replace(
                source,
                size=stored - cut.stored,
                start=cut.at,
                stop=stop,
                enter=cut.enter,
                skipped=cut.skipped,
                file_xxh3_128=checksum,
            )
        )
    return pieces


def split_source(source: Source, size: int, limit: int) -> list[Source]:
    """`source` as pieces of about `size` stored bytes, where its type allows for that.

    Pieces for which something before them has to be decompressed have at least `limit` bytes,
    which is not less than `size`. A .txt file is one document, and one piece.
    """
    if source.size <= size or source.name.endswith((".txt", ".txt.gz", ".txt.zst")):
        return [source]
    if not source.name.endswith(".jsonl"):
        return _pieces(source, size, limit)
    return [
        replace(source, size=min(size, source.size - at), start=at, stop=at + size)
        for at in range(0, source.size, size)
    ]
