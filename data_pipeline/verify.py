"""Check every stored byte of a corpus."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import zstandard
from tqdm import tqdm

from data_pipeline.corpus import Corpus
from data_pipeline.errors import CorruptDataError
from data_pipeline.files import file_checksum
from data_pipeline.processes import each
from data_pipeline.reader import ShardReader
from data_pipeline.shard_format import aligned


def verify(path: str | Path, workers: int = 1) -> tuple[Corpus, list[str]]:
    """Check the corpus in the folder `path` and return (corpus, damages), one line per damage.

    Checked: the manifest against its fingerprint, the embedded tokenizer against its hash, each
    file, footer and frame against its checksum, every id against the vocabulary, that documents
    begin with bos and end with eos and hold neither inside, and the counts of the manifest.
    DataError where the manifest itself cannot be used.
    """
    corpus = Corpus.open(path)
    damages: list[str] = []
    try:
        described = corpus.manifest["tokenizer"]
        if corpus.tokenizer.vocab_size != described["vocab_size"]:
            damages.append(f"{corpus.path}: the tokenizer has another vocabulary than the manifest")
    except CorruptDataError as error:
        damages.append(str(error))
    total = sum(shard["bytes"] for shard in corpus.manifest["shards"])
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        found: dict[int, list[str]] = {}
        shards = range(corpus.num_shards)
        for number, lines in each(partial(_verify_shard, corpus), shards, workers, corpus.path):
            found[number] = lines
            bar.update(corpus.manifest["shards"][number]["bytes"])
    return corpus, damages + [line for number in shards for line in found[number]]


def _verify_shard(corpus: Corpus, number: int) -> list[str]:
    entry = corpus.manifest["shards"][number]
    try:
        reader = corpus.shard(number)
    except CorruptDataError as error:
        return [str(error)]
    damages: list[str] = []
    decompressor = zstandard.ZstdDecompressor()
    frames = []
    for frame in range(reader.num_frames):
        try:
            tokens = reader.frame(frame, decompressor)
        except CorruptDataError as error:
            damages.append(str(error))
            continue
        frames.append(tokens)
        if tokens[0] != reader.first_tokens[frame]:
            damages.append(f"{reader.path}: frame {frame}: the index gives another first token")
    try:
        if len(reader.names()) != len(reader.document_lengths):
            damages.append(f"{reader.path}: {len(reader.names())} names of documents")
    except CorruptDataError as error:
        damages.append(str(error))
    counts = {
        "bytes": reader.path.stat().st_size,
        "tokens": reader.num_tokens,
        "documents": len(reader.document_lengths),
        "text_bytes": reader.text_bytes,
        "aligned_tokens": {
            align: int(aligned(reader.document_lengths, int(align)).sum())
            for align in entry["aligned_tokens"]
        },
    }
    same_frames = reader.frame_tokens == corpus.manifest["frame_tokens"]
    if not same_frames or any(entry[key] != counts[key] for key in counts):
        damages.append(f"{reader.path}: the manifest gives other counts")
    if not damages and reader.num_tokens:
        damages += _verify_documents(corpus, reader, np.concatenate(frames))
    if not damages and file_checksum(reader.path) != entry["xxh3_128"]:
        damages.append(f"{reader.path}: the file does not match the checksum in the manifest")
    return damages


def _verify_documents(corpus: Corpus, reader: ShardReader, tokens: np.ndarray) -> list[str]:
    ends = np.cumsum(reader.document_lengths)
    starts = ends - reader.document_lengths
    is_start, is_end = tokens == corpus.bos_id, tokens == corpus.eos_id
    good = (
        (reader.document_lengths >= 2).all()
        and is_start[starts].all()
        and is_end[ends - 1].all()
        and is_start.sum() == is_end.sum() == len(ends)
        and (corpus.pad_id == corpus.eos_id or not (tokens == corpus.pad_id).any())
    )
    return [] if good else [f"{reader.path}: bos and eos do not stand at the ends of documents"]
