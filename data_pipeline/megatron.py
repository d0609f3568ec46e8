"""Megatron's indexed datasets (.bin and .idx), read and written.

.idx: the magic MMIDIDX and two zero bytes, version 1 (u64), a dtype code (u8), the number of
sequences (u64) and of document bounds (u64), then int32 lengths, int64 byte offsets into .bin, and
int64 document bounds, the first of which is 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.building import Part, build_corpus, wrap
from data_pipeline.corpus import Corpus
from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.files import replacing
from data_pipeline.recombining import documents_of
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.writer import Document

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SHARD_TOKENS = 1 << 26


class Index(NamedTuple):
    """lengths int [S] in tokens and offsets int [S] in bytes of the sequences; bounds int [D + 1]:
    which sequences each document consists of."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    bounds: np.ndarray


def _paths(prefix: str | Path) -> tuple[Path, Path]:
    base = str(prefix).removesuffix(".idx").removesuffix(".bin")
    return Path(base + ".bin"), Path(base + ".idx")


def read_index(prefix: str | Path) -> Index:
    """The index of prefix.bin; CorruptDataError if the two do not fit each other."""
    data_path, index_path = _paths(prefix)
    for path in (data_path, index_path):
        if not path.is_file():
            raise DataError(f"{path}: no such file; name the common beginning of .bin and .idx")
    data = index_path.read_bytes()
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise CorruptDataError(str(index_path), "not a Megatron index")
    _, version, code, sequences, documents = _HEAD.unpack_from(data)
    if version != 1 or code not in _DTYPES:
        raise CorruptDataError(str(index_path), f"version {version} and dtype code {code}")
    at = _HEAD.size
    if len(data) < at + 12 * sequences + 8 * documents:
        raise CorruptDataError(str(index_path), "the file is cut off")
    dtype = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(data, "<i4", sequences, at).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, at + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", documents, at + 12 * sequences)
    good = (
        documents > 0
        and bounds[0] == 0
        and bounds[-1] == sequences
        and (np.diff(bounds) >= 0).all()
        and (lengths >= 0).all()
        and (offsets >= 0).all()
        and (offsets + lengths * dtype.itemsize <= data_path.stat().st_size).all()
    )
    if not good:
        raise CorruptDataError(str(index_path), f"the index does not fit {data_path.name}")
    return Index(dtype, lengths, offsets, bounds)


def import_megatron(
    prefix: str | Path, tokenizer: Tokenizer, out: str | Path
) -> tuple[dict[str, Any], int]:
    """The corpus `out` of the documents in prefix.bin: (manifest, shards written).

    Each becomes bos ... eos, whichever of the two it had already. DataError for ids that
    `tokenizer` does not know.
    """
    data_path, index_path = _paths(prefix)
    index = read_index(prefix)
    described, sizes = tokenizer.describe(), tokenizer.token_bytes
    data = np.memmap(data_path, np.uint8, "r") if data_path.stat().st_size else np.empty(0, "u1")
    per_document = np.add.reduceat(np.append(index.lengths, 0), index.bounds[:-1]) * (
        np.diff(index.bounds) > 0
    )
    shard_of = (np.cumsum(per_document) - per_document) // _SHARD_TOKENS

    def documents(first: int, last: int) -> Iterator[Document]:
        for number in range(first, last):
            name = f"{data_path.name}@{number}"
            ids = [np.empty(0, np.int64)]
            for sequence in range(int(index.bounds[number]), int(index.bounds[number + 1])):
                start = int(index.offsets[sequence])
                stop = start + int(index.lengths[sequence]) * index.dtype.itemsize
                ids.append(data[start:stop].view(index.dtype).astype(np.int64))
            tokens = wrap(name, np.concatenate(ids), described)
            if len(tokens) > 2:
                yield name, tokens, int(sizes[tokens].sum())

    parts = []
    for shard in np.unique(shard_of):
        first, last = np.searchsorted(shard_of, [shard, shard + 1]).tolist()
        sequences = slice(int(index.bounds[first]), int(index.bounds[last]))
        digest = xxhash.xxh3_128(f"megatron\0{tokenizer.sha256}\0{first}\0".encode())
        digest.update(index.bounds[first : last + 1].tobytes())
        for start, length in zip(index.offsets[sequences], index.lengths[sequences], strict=True):
            digest.update(data[start : start + length * index.dtype.itemsize].tobytes())
        parts.append(Part(digest.hexdigest(), partial(documents, first, last)))
    return build_corpus(out, described, parts, f"import {index_path.stem}")


def export_megatron(folder: str | Path, prefix: str | Path) -> int:
    """Write a corpus as prefix.bin and prefix.idx, and return the number of documents.

    Each document is one sequence, without bos and with eos: Megatron's --append-eod. The index
    comes last.
    """
    corpus = Corpus.open(folder)
    data_path, index_path = _paths(prefix)
    for path in (data_path, index_path):
        if path.exists():
            raise DataError(f"{path}: is there already; name another --out or remove it")
    wide = corpus.vocab_size > 1 << 16
    dtype, code = np.dtype("<i4" if wide else "<u2"), 4 if wide else 8
    data_path.parent.mkdir(parents=True, exist_ok=True)
    lengths = []
    with replacing(data_path) as file:
        for shard in range(corpus.num_shards):
            for _, tokens, _ in documents_of(corpus, shard):
                lengths.append(len(tokens) - 1)
                file.write(tokens[1:].astype(dtype).tobytes())
    counts = np.array(lengths, "<i4")
    ends = np.cumsum(counts, dtype=np.int64) * dtype.itemsize
    with replacing(index_path) as file:
        file.write(_HEAD.pack(_MAGIC, 1, code, len(counts), len(counts) + 1))
        file.write(counts.tobytes())
        file.write((ends - counts * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(counts) + 1, dtype="<i8").tobytes())
    return len(counts)
