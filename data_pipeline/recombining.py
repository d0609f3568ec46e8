"""Make corpora from corpora: merge several into one, split one in two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.building import Part, build_corpus
from data_pipeline.corpus import Corpus
from data_pipeline.errors import DataError
from data_pipeline.writer import Document

TRAIN, VALIDATION = "train", "validation"


def documents_of(corpus: Corpus, shard: int) -> Iterator[Document]:
    """(name, tokens, bytes of text) of each document of a shard, in order."""
    sizes = corpus.token_bytes
    start = corpus.shard_start(shard)
    names = corpus.names(shard)
    for name, length in zip(names, corpus.document_lengths(shard).tolist(), strict=True):
        tokens = corpus.read(start, start + length)
        start += length
        yield name, tokens, int(sizes[tokens].sum())


def _source(corpus: Corpus, shard: int, purpose: str) -> str:
    content = corpus.manifest["shards"][shard]["xxh3_128"]
    return xxhash.xxh3_128_hexdigest(f"{purpose}\0{content}".encode())


def _of_one(corpora: Sequence[Corpus], key: tuple[int, int]) -> Iterator[Document]:
    corpus, shard = corpora[key[0]], key[1]
    text_bytes = corpus.shard(shard).text_bytes  # of all of them, and only the sum is stored
    for name, tokens, _ in documents_of(corpus, shard):
        yield name, tokens, text_bytes
        text_bytes = 0


def merge(
    folders: Sequence[str | Path], out: str | Path, workers: int = 1
) -> tuple[dict[str, Any], int]:
    """One corpus of the documents of several, in the order given: (manifest, shards written).

    DataError unless all were made with one tokenizer.
    """
    corpora = [Corpus.open(folder) for folder in folders]
    for corpus in corpora[1:]:
        if corpus.tokenizer_sha256 != corpora[0].tokenizer_sha256:
            raise DataError(
                f"{corpus.path}: made with another tokenizer than {corpora[0].path}; "
                "tokenize both with one"
            )
    parts = [
        Part(_source(corpus, shard, f"merge {number}"), (number, shard))
        for number, corpus in enumerate(corpora)
        for shard in range(corpus.num_shards)
    ]
    documents = partial(_of_one, corpora)
    return build_corpus(out, corpora[0].manifest["tokenizer"], parts, documents, "merge", workers)


def held_out(tokens: np.ndarray, every: int) -> bool:
    """Whether a document of these tokens is for validation: a function of its content alone."""
    return xxhash.xxh3_64_intdigest(tokens.astype("<u4").tobytes()) % every == 0


def _of_side(corpus: Corpus, every: int, validation: bool, shard: int) -> Iterator[Document]:
    for document in documents_of(corpus, shard):
        if held_out(document[1], every) == validation:
            yield document


def split(
    folder: str | Path, out: str | Path, every: int, workers: int = 1
) -> dict[str, tuple[dict[str, Any], int]]:
    """Two corpora, out/train and out/validation: one document in `every`, by its hash, for the
    latter. Equal documents stay together.

    Returns (manifest, shards written) of each. DataError where one would be empty.
    """
    if every < 2:
        raise DataError(f"--holdout {every}: give 2 or more, to hold out one document in so many")
    corpus = Corpus.open(folder)
    made = {}
    for name in (TRAIN, VALIDATION):
        parts = [
            Part(_source(corpus, shard, f"{name} {every}"), shard)
            for shard in range(corpus.num_shards)
        ]
        made[name] = build_corpus(
            Path(out) / name,
            corpus.manifest["tokenizer"],
            parts,
            partial(_of_side, corpus, every, name == VALIDATION),
            f"split {name}",
            workers,
        )
    return made
