"""Read MosaicML Streaming's MDS datasets: index.json and shards, compressed or not."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from pydantic import BaseModel, Field, ValidationError, model_validator

from data_pipeline.building import Part, build_corpus, wrap
from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.files import file_checksum
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.writer import Document

_SHAPE_BYTES = {0: 1, 1: 2, 2: 4, 3: 8}
_VALUE_TYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64",
    65: "int64",
}  # fmt: skip


class _File(BaseModel):
    basename: str = Field(min_length=1)
    bytes: int


class _Shard(BaseModel):
    """What is read of a shard's part of index.json."""

    format: str
    raw_data: _File
    zip_data: _File | None = None
    compression: str | None = None
    samples: int
    column_names: list[str] = []
    column_encodings: list[str] = []
    column_sizes: list[int | None] = []

    @model_validator(mode="after")
    def _columns_are_whole(self) -> _Shard:
        sizes, encodings = len(self.column_sizes), len(self.column_encodings)
        if not sizes == encodings == len(self.column_names):
            raise ValueError("column_names, column_encodings and column_sizes differ in length")
        return self


class _Index(BaseModel):
    shards: list[_Shard]


def _index(path: Path) -> list[dict[str, Any]]:
    """The shards that index.json tells of; CorruptDataError if it is none."""
    try:
        shards: list[dict[str, Any]] = _Index.model_validate_json(path.read_bytes()).model_dump()[
            "shards"
        ]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise CorruptDataError(str(path), f"not an MDS index ({where}: {first['msg']})") from None
    return shards


def _array(encoding: str, data: bytes) -> np.ndarray:
    """The values of an ndarray column; dtype and shape stand in the encoding or before them."""
    dtype, _, shape = encoding.removeprefix("ndarray").removeprefix(":").partition(":")
    at = 0
    if not dtype:
        dtype, at = _VALUE_TYPES[data[0]], 1
    if not shape:
        at += 1 + (data[at] >> 2) * _SHAPE_BYTES[data[at] % 4]
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=at)


def _stored(folder: Path, shard: dict[str, Any]) -> tuple[str, str]:
    """(name of a shard's file, its compression); the uncompressed file where there is one."""
    name = shard["raw_data"]["basename"]
    if (folder / name).is_file():
        return name, ""
    zipped = shard.get("zip_data")
    if not zipped or not (folder / zipped["basename"]).is_file():
        raise DataError(f"{folder / name}: no such file; bring the whole dataset")
    kind = (shard["compression"] or "").partition(":")[0]
    if kind not in ("zstd", "gz"):
        file = folder / zipped["basename"]
        raise DataError(f"{file}: compression {kind!r} is not read; unpack the shards first")
    return zipped["basename"], kind


def _content(path: Path, kind: str) -> bytes:
    data = path.read_bytes()
    try:
        if kind == "zstd":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
        return gzip.decompress(data) if kind == "gz" else data
    except (zstandard.ZstdError, OSError, EOFError):
        raise CorruptDataError(str(path), "the compressed data is damaged") from None


def _samples(shard: dict[str, Any], data: bytes, column: int, file: str) -> Iterator[bytes]:
    """What stands in one column of each sample."""
    if len(data) != shard["raw_data"]["bytes"]:
        raise CorruptDataError(file, f"{len(data)} bytes, not {shard['raw_data']['bytes']}")
    count = int.from_bytes(data[:4], "little")
    if len(data) < 8 + 4 * count:
        raise CorruptDataError(file, f"too short for {count} samples")
    if count != shard["samples"]:
        raise CorruptDataError(file, f"{count} samples, not {shard['samples']}")
    bounds = np.frombuffer(data, "<u4", count + 1, 4).tolist()
    fixed = shard["column_sizes"]
    for begin, end in pairwise(bounds):
        at = begin + 4 * sum(not size for size in fixed)
        if not len(data) >= end >= at:
            raise CorruptDataError(file, "the sample offsets are damaged", None, begin)
        variable = iter(np.frombuffer(data, "<u4", (at - begin) // 4, begin).tolist())
        sizes = [size or next(variable) for size in fixed]
        at += sum(sizes[:column])
        if at + sum(sizes[column:]) != end:
            raise CorruptDataError(file, "the sample sizes are damaged", None, begin)
        yield data[at : at + sizes[column]]


@dataclass(frozen=True)
class _Documents:
    """A shard's part of index.json -> the documents in one of its columns."""

    folder: Path
    tokenizer: Tokenizer
    column: str
    dtype: str | None

    def __call__(self, shard: dict[str, Any]) -> Iterator[Document]:
        described, sizes = self.tokenizer.describe(), self.tokenizer.token_bytes
        file, kind = _stored(self.folder, shard)
        data = _content(self.folder / file, kind)
        place = shard["column_names"].index(self.column)
        encoding = shard["column_encodings"][place]
        for number, value in enumerate(_samples(shard, data, place, str(self.folder / file))):
            name = f"{file}@{number}"
            if encoding == "str":
                try:
                    tokens = self.tokenizer.encode_document(value.decode())
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.folder / name}: not UTF-8 ({error.reason})") from None
            else:
                tokens = wrap(name, self._ids(encoding, value, name), described)
            if len(tokens) > 2:
                yield name, tokens, int(sizes[tokens].sum())

    def _ids(self, encoding: str, value: bytes, name: str) -> np.ndarray:
        try:
            if encoding == "bytes":
                ids = np.frombuffer(value, self.dtype)
            else:
                ids = _array(encoding, value)
            if ids.dtype.kind in "iu":
                return ids.astype(np.int64)
            problem = f"values of {ids.dtype}"
        except (ValueError, TypeError, LookupError) as error:
            problem = str(error)
        raise DataError(
            f"{self.folder / name}: column {self.column} holds no token ids ({problem}); "
            "name another --column, or the --dtype of its bytes"
        )


def import_mds(
    folder: str | Path,
    tokenizer: Tokenizer,
    out: str | Path,
    column: str,
    dtype: str | None = None,
    workers: int = 1,
) -> tuple[dict[str, Any], int]:
    """The corpus `out` of one column of an MDS dataset: (manifest, shards written).

    A `str` column is text and is tokenized; an `ndarray` column holds token ids, and so does a
    `bytes` column, whose `dtype` has to be given. Every sample is a document, bos ... eos.
    """
    root = Path(folder)
    shards = _index(root / "index.json")
    parts = []
    for shard in shards:
        if shard["format"] != "mds" or column not in shard["column_names"]:
            has = ", ".join(shard["column_names"])
            raise DataError(
                f"{root}: a {shard['format']} shard with the columns {has}: no {column}"
            )
        encoding = shard["column_encodings"][shard["column_names"].index(column)]
        if encoding == "bytes" and dtype is None:
            raise DataError(f"{root}: column {column} holds bytes; say what with --dtype")
        if encoding not in ("bytes", "str") and not encoding.startswith("ndarray"):
            raise DataError(f"{root}: column {column} holds {encoding}, neither text nor tokens")
        name, _ = _stored(root, shard)
        what = f"mds\0{tokenizer.sha256}\0{column}\0{dtype}\0{name}\0{file_checksum(root / name)}"
        parts.append(Part(xxhash.xxh3_128_hexdigest(what.encode()), shard))
    documents = _Documents(root, tokenizer, column, dtype)
    doing = f"import {root.name}"
    return build_corpus(out, tokenizer.describe(), parts, documents, doing, workers)
