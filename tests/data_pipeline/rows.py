"""Rows of batches as lists, and those that a list of documents must give."""

import numpy as np

from data_pipeline import IGNORE, Loader

ALIGN = 16


PACKINGS = ("concat", "aligned")


USUAL = {
    "seq_len": 64,
    "batch_size": 6,
    "seed": 3,
    "packing": "aligned",
    "align": ALIGN,
    "prefetch": 0,
}


def stream(documents, packing, pad):
    """The virtual stream as a list of (token, label or IGNORE, starts a document)."""
    out = []
    for document in documents:
        labels = [*document[1:], IGNORE]
        out += [(t, n, i == 0) for i, (t, n) in enumerate(zip(document, labels, strict=True))]
        while packing == "aligned" and len(out) % ALIGN:
            out.append((pad, IGNORE, False))
    return out


def expected_rows(documents, packing, pad, seq_len):
    flat = stream(documents, packing, pad)
    if packing == "aligned" and documents:  # trailing gap belongs to the stream
        assert len(flat) % ALIGN == 0
    flat += [(pad, IGNORE, False)] * (-len(flat) % seq_len)
    return [flat[i : i + seq_len] for i in range(0, len(flat), seq_len)]


def rows_of(batch):
    return [
        list(zip(t, n, s, strict=True))
        for t, n, s in zip(
            batch.tokens.tolist(),
            batch.labels.tolist(),
            batch.document_starts.tolist(),
            strict=True,
        )
    ]


def take(loader, steps):
    return [row for _ in range(steps) for row in rows_of(next(loader))]


def make(corpus, **changes):
    return Loader(corpus, **{**USUAL, **changes})


class Endless:
    """10**12 windows without a byte on disk: token t of the corpus is 4 + t % 1000."""

    fingerprint, tokenizer_sha256, path = "f" * 64, "0", "endless"
    num_tokens, bos_id, eos_id, pad_id, dtype = 64 * 10**12, 1, 2, 3, np.dtype("<u2")

    def read_into(self, out, start):
        out[:] = 4 + (start + np.arange(len(out))) % 1000
