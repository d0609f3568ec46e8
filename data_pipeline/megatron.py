"""Megatron's indexed datasets (.bin and .idx), read and written.

.idx: the magic MMIDIDX and two zero bytes, version 1 (u64), a dtype code (u8), the number of
sequences (u64) and of document bounds (u64), then int32 lengths, int64 byte offsets into .bin, and
int64 document bounds, the first of which is 0.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tqdm import tqdm

from data_pipeline.building import Part, build_corpus, wrap
from data_pipeline.corpus import Corpus
from data_pipeline.errors import CorruptDataError, DataError
from data_pipeline.files import only_writer, replacing, sync_folder, write_whole
from data_pipeline.processes import each
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


class _Documents:
    """(first, last) -> the documents first .. last of prefix.bin, wrapped in bos and eos."""

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer) -> None:
        self._prefix, self._tokenizer = prefix, tokenizer
        self.path, _ = _paths(prefix)
        self.index = read_index(prefix)
        empty = not self.path.stat().st_size
        self.data = np.empty(0, "u1") if empty else np.memmap(self.path, np.uint8, "r")
        self._described, self._sizes = tokenizer.describe(), tokenizer.token_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _Documents, (self._prefix, self._tokenizer)

    def __call__(self, key: tuple[int, int]) -> Iterator[Document]:
        index = self.index
        for number in range(*key):
            name = f"{self.path.name}@{number}"
            ids = [np.empty(0, np.int64)]
            for sequence in range(int(index.bounds[number]), int(index.bounds[number + 1])):
                start = int(index.offsets[sequence])
                stop = start + int(index.lengths[sequence]) * index.dtype.itemsize
                ids.append(self.data[start:stop].view(index.dtype).astype(np.int64))
            tokens = wrap(name, np.concatenate(ids), self._described)
            if len(tokens) > 2:
                yield name, tokens, int(self._sizes[tokens].sum())

    def source(self, first: int, last: int) -> str:
        """A checksum of the tokens of these documents, and of how they are divided."""
        index = self.index
        bounds = index.bounds[first : last + 1]
        starts = index.offsets[bounds[0] : bounds[-1]]
        lengths = index.lengths[bounds[0] : bounds[-1]]
        digest = xxhash.xxh3_128(f"megatron\0{self._tokenizer.sha256}\0{first}\0".encode())
        digest.update(bounds.tobytes())
        digest.update(lengths.tobytes())
        stops = starts + lengths * index.dtype.itemsize
        gaps = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        for run in np.split(np.arange(len(starts)), gaps):
            if run.size:
                digest.update(self.data[starts[run[0]] : stops[run[-1]]].data)
        return digest.hexdigest()


def import_megatron(
    prefix: str | Path, tokenizer: Tokenizer, out: str | Path, workers: int = 1
) -> tuple[dict[str, Any], int]:
    """The corpus `out` of the documents in prefix.bin: (manifest, shards written).

    Each becomes bos ... eos, whichever of the two it had already. DataError for ids that
    `tokenizer` does not know.
    """
    documents = _Documents(prefix, tokenizer)
    index = documents.index
    per_document = np.add.reduceat(np.append(index.lengths, 0), index.bounds[:-1]) * (
        np.diff(index.bounds) > 0
    )
    shard_of = (np.cumsum(per_document) - per_document) // _SHARD_TOKENS
    parts = []
    for shard in np.unique(shard_of):
        first, last = np.searchsorted(shard_of, [shard, shard + 1]).tolist()
        parts.append(Part(documents.source(first, last), (first, last)))
    doing = f"import {documents.path.stem}"
    return build_corpus(out, tokenizer.describe(), parts, documents, doing, workers)


@dataclass(frozen=True)
class _Exporter:
    """shard -> the lengths int32 [D] of its sequences, which are written to their place in a file.

    `notes` holds a checksum for each shard that was written, so that a killed export can go on.
    """

    corpus: Corpus
    data: Path
    dtype: np.dtype
    notes: Path

    def place(self, shard: int) -> int:
        """Where a shard's tokens begin, in bytes: every document lacks its bos."""
        documents = sum(entry["documents"] for entry in self.corpus.manifest["shards"][:shard])
        return (self.corpus.shard_start(shard) - documents) * self.dtype.itemsize

    def __call__(self, shard: int) -> np.ndarray:
        lengths = (self.corpus.document_lengths(shard) - 1).astype("<i4")
        note = self.notes / f"{shard}.json"
        start, size = self.place(shard), int(lengths.sum()) * self.dtype.itemsize
        with open(self.data, "r+b") as file:
            file.seek(start)
            if note.exists() and xxhash.xxh3_128_hexdigest(file.read(size)) == note.read_text():
                return lengths
            first = self.corpus.shard_start(shard)
            tokens = self.corpus.read(first, first + int(lengths.sum()) + len(lengths))
            kept = np.delete(tokens, np.cumsum(lengths + 1) - lengths - 1).astype(self.dtype)
            file.seek(start)
            file.write(kept.tobytes())
            file.flush()
            os.fsync(file.fileno())
        write_whole(note, xxhash.xxh3_128_hexdigest(kept.tobytes()).encode())
        return lengths


def export_megatron(folder: str | Path, prefix: str | Path, workers: int = 1) -> int:
    """Write a corpus as prefix.bin and prefix.idx, and return the number of documents.

    Each document is one sequence, without bos and with eos: Megatron's --append-eod. The index
    comes last. A run that was killed leaves prefix.unfinished, where the next one goes on.
    """
    corpus = Corpus.open(folder)
    data_path, index_path = _paths(prefix)
    unfinished = data_path.with_suffix(".unfinished")
    notes = unfinished / corpus.fingerprint
    partial_path, shards = notes / "data", range(corpus.num_shards)
    # where a run was stopped between the two files, the first is its own
    ours = not partial_path.exists() and all((notes / f"{n}.json").exists() for n in shards)
    for path in (data_path, index_path):
        if path.exists() and not (ours and data_path.exists()):
            raise DataError(f"{path}: is there already; name another --out or remove it")
    wide = corpus.vocab_size > 1 << 16
    dtype, code = np.dtype("<i4" if wide else "<u2"), 4 if wide else 8
    with only_writer(unfinished):
        notes.mkdir(exist_ok=True)
        if data_path.exists():
            os.replace(data_path, partial_path)
        exporter = _Exporter(corpus, partial_path, dtype, notes)
        with open(partial_path, "ab") as file:
            file.truncate(exporter.place(corpus.num_shards))
        found: dict[int, np.ndarray] = {}
        with tqdm(total=len(shards), desc="export", unit=" shards", disable=None) as bar:
            for shard, lengths in each(exporter, shards, workers, str(data_path)):
                found[shard] = lengths
                bar.update()
        counts = np.concatenate([found[shard] for shard in shards])
        os.replace(partial_path, data_path)
        sync_folder(data_path.parent)
        ends = np.cumsum(counts, dtype=np.int64) * dtype.itemsize
        with replacing(index_path) as file:
            file.write(_HEAD.pack(_MAGIC, 1, code, len(counts), len(counts) + 1))
            file.write(counts.tobytes())
            file.write((ends - counts * dtype.itemsize).astype("<i8").tobytes())
            file.write(np.arange(len(counts) + 1, dtype="<i8").tobytes())
        shutil.rmtree(unfinished)
    return len(counts)
