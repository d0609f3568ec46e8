"""Tell a person what is in a corpus or a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.corpus import Corpus
from data_pipeline.redaction import redact
from data_pipeline.tokenizer import Tokenizer

_BAR = 40
_SAMPLE_TOKENS = 60
LOSSY = "texts do not come back exactly: spaces, newlines or rare characters are changed or lost"


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    powers = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    for power in range(powers.min(), powers.max() + 1):
        bar = "#" * -(-int(counts[power]) * _BAR // int(counts.max()))
        yield f"  {1 << power:>9,} - {(2 << power) - 1:>9,}  {counts[power]:>9,}  {bar}"


def _short(text: str) -> str:
    return repr(text)[1:-1]


def describe_corpus(corpus: Corpus, samples: int) -> Iterator[str]:
    """Lines: counts, document lengths, shards, and `samples` documents' beginnings."""
    manifest = corpus.manifest
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    described = manifest["tokenizer"]
    yield redact(str(corpus.path))
    yield f"  fingerprint  {corpus.fingerprint}"
    yield f"  tokens       {corpus.num_tokens:,} in {corpus.num_documents:,} documents"
    yield (
        f"  text         {corpus.text_bytes:,} bytes, "
        f"{corpus.text_bytes / corpus.num_tokens:.2f} per token"
    )
    yield (
        f"  stored       {stored:,} bytes, {stored / corpus.num_tokens:.3f} per token, "
        f"{corpus.num_shards} shards of {manifest['dtype']}"
    )
    yield f"  tokenizer    {described['vocab_size']:,} tokens, sha256 {described['sha256'][:16]}"
    lengths = np.concatenate([corpus.document_lengths(n) for n in range(corpus.num_shards)])
    yield "documents by length in tokens"
    yield from _histogram(lengths)
    ends = np.cumsum(lengths)
    chosen = np.linspace(0, corpus.num_documents - 1, min(samples, corpus.num_documents))
    names = (name for n in range(corpus.num_shards) for name in corpus.names(n))
    wanted = {int(document) for document in chosen}
    for document, name in enumerate(names):
        if document in wanted:
            length = int(lengths[document])
            start = int(ends[document]) - length
            tokens = corpus.read(start, start + min(length, _SAMPLE_TOKENS))
            text = _short(corpus.tokenizer.decode(tokens))
            yield f"document {document}: {_short(name)}, {length:,} tokens"
            yield f"  {text}"


def describe_tokenizer(tokenizer: Tokenizer, text: str | None) -> Iterator[str]:
    """Lines: ids and sizes of the vocabulary; how `text` is cut."""
    sizes = tokenizer.token_bytes
    yield f"  vocabulary   {tokenizer.vocab_size:,} tokens, longest {sizes.max()} bytes"
    yield (
        f"  special      unk {tokenizer.unk_id}, bos {tokenizer.bos_id}, "
        f"eos {tokenizer.eos_id}, pad {tokenizer.pad_id}"
    )
    yield f"  sha256       {tokenizer.sha256}"
    if not tokenizer.lossless:
        yield f"  lossy        {LOSSY}"
    if text is not None:
        ids = tokenizer.encode(text)
        pieces = " | ".join(_short(tokenizer.piece(int(i))) for i in ids)
        exact = "comes back exactly" if tokenizer.decode(ids) == text else "DOES NOT COME BACK"
        yield f"  {len(ids)} tokens for {len(text.encode())} bytes, {exact}"
        yield f"  {pieces}"
