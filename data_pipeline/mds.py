"""Read MosaicML Streaming's MDS datasets: index.json and shards, compressed or not."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from data_pipeline.building import Part, build_corpus, wrap
from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.writer import Document

_SHAPE_BYTES = {0: 1, 1: 2, 2: 4, 3: 8}
_VALUE_TYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64",
    65: "int64",
}  # fmt: skip


def _array(encoding: str, data: bytes) -> np.ndarray:
    """The values of an ndarray column; dtype and shape stand in the encoding or before them."""
    dtype, _, shape = encoding.removeprefix("ndarray").removeprefix(":").partition(":")
    at = 0
    if not dtype:
        dtype, at = _VALUE_TYPES[data[0]], 1
    if not shape:
        at += 1 + (data[at] >> 2) * _SHAPE_BYTES[data[at] % 4]
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=at)


def _raw_shard(folder: Path, shard: dict[str, Any]) -> tuple[bytes, str]:
    """(content of a shard, its file name): the uncompressed file where there is one."""
    name = shard["raw_data"]["basename"]
    if (folder / name).is_file():
        return (folder / name).read_bytes(), name
    zipped = shard.get("zip_data")
    if not zipped or not (folder / zipped["basename"]).is_file():
        raise DataError(f"{folder / name}: no such file; bring the whole dataset")
    name, kind = zipped["basename"], shard["compression"].partition(":")[0]
    data = (folder / name).read_bytes()
    try:
        if kind == "zstd":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data), name
        if kind == "gz":
            return gzip.decompress(data), name
    except (zstandard.ZstdError, OSError, EOFError):
        raise CorruptDataError(str(folder / name), "the compressed data is damaged") from None
    raise DataError(f"{folder / name}: compression {kind!r} is not read; unpack the shards first")


def _samples(shard: dict[str, Any], data: bytes, column: int, file: str) -> Iterator[bytes]:
    """What stands in one column of each sample."""
    if len(data) != shard["raw_data"]["bytes"]:
        raise CorruptDataError(file, f"{len(data)} bytes, not {shard['raw_data']['bytes']}")
    count = int(np.frombuffer(data, "<u4", 1)[0])
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


def import_mds(
    folder: str | Path,
    tokenizer: Tokenizer,
    out: str | Path,
    column: str,
    dtype: str | None = None,
) -> tuple[dict[str, Any], int]:
    """The corpus `out` of one column of an MDS dataset: (manifest, shards written).

    A `str` column is text and is tokenized; an `ndarray` column holds token ids, and so does a
    `bytes` column, whose `dtype` has to be given. Every sample is a document, bos ... eos.
    """
    root = Path(folder)
    try:
        shards = json.loads((root / "index.json").read_bytes())["shards"]
    except OSError as error:
        raise DataError(f"{root / 'index.json'}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise CorruptDataError(str(root / "index.json"), "not an MDS index") from None
    described, token_bytes = tokenizer.describe(), tokenizer.token_bytes

    def tokens_of(name: str, encoding: str, data: bytes) -> np.ndarray:
        if encoding == "str":
            return tokenizer.encode_document(data.decode())
        values = np.frombuffer(data, dtype) if encoding == "bytes" else _array(encoding, data)
        return wrap(name, values.astype(np.int64), described)

    def documents(shard: dict[str, Any], data: bytes, name: str) -> Iterator[Document]:
        place = shard["column_names"].index(column)
        encoding = shard["column_encodings"][place]
        for number, value in enumerate(_samples(shard, data, place, str(root / name))):
            tokens = tokens_of(f"{name}@{number}", encoding, value)
            if len(tokens) > 2:
                yield f"{name}@{number}", tokens, int(token_bytes[tokens].sum())

    parts = []
    for shard in shards:
        if shard["format"] != "mds" or column not in shard["column_names"]:
            has = ", ".join(shard.get("column_names", []))
            raise DataError(
                f"{root}: a {shard['format']} shard with the columns {has}: no {column}"
            )
        encoding = shard["column_encodings"][shard["column_names"].index(column)]
        if encoding == "bytes" and dtype is None:
            raise DataError(f"{root}: column {column} holds bytes; say what with --dtype")
        if encoding not in ("bytes", "str") and not encoding.startswith("ndarray"):
            raise DataError(f"{root}: column {column} holds {encoding}, neither text nor tokens")

        def make(shard: dict[str, Any] = shard) -> Iterator[Document]:
            return documents(shard, *_raw_shard(root, shard))

        data, name = _raw_shard(root, shard)
        digest = xxhash.xxh3_128(f"mds\0{tokenizer.sha256}\0{column}\0{dtype}\0{name}\0".encode())
        digest.update(data)
        parts.append(Part(digest.hexdigest(), make))
    return build_corpus(out, described, parts, f"import {root.name}")
